"""Long-context scores: a model that knows gets all, one that does not none, and batching changes no answer."""

import json
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5.cli.main import main
from glm5.data import ByteTokenizer
from glm5.data.synthetic import TASKS, make_item
from glm5.eval.longctx import answers, evaluate, string_match, to_json, wilson
from glm5.model import Glm5Config, Glm5ForCausalLM
from glm5.report import scores_table
from glm5.report.table import table_lines

TOKENIZER = ByteTokenizer()


class Oracle:
    """Looks the item of a prompt up and writes `edit(answer)`; counts what it was asked for."""

    def __init__(self, items, edit=lambda answer: answer):
        frame = TOKENIZER.encode_document("")[:-1].tolist()
        self.known = {tuple(frame + TOKENIZER.encode(item.prompt).tolist()): edit(item.answer) for item in items}
        self.config = types.SimpleNamespace(max_position_embeddings=4096)
        self.head_weight, self.attention, self.batches = torch.zeros(1), "dense", []

    def generate(self, ids, tokens, *, attention_mask, stop_tokens, chunk):
        self.batches.append(tuple(ids.shape))
        out = torch.full((len(ids), tokens), TOKENIZER.eos_id)
        for row, (prompt, there) in enumerate(zip(ids, attention_mask, strict=True)):
            answer = TOKENIZER.encode(self.known[tuple(prompt[there == 1].tolist())])[:tokens]
            out[row, : len(answer)] = torch.from_numpy(answer)
        return torch.cat([ids, out], 1)


def asked(task, length=300, items=40):
    return [make_item(task, 0, i, length, TOKENIZER, held_out=True) for i in range(items)]


@pytest.mark.parametrize("task", TASKS)
def test_who_knows_the_answer_gets_all_of_it_and_who_does_not_gets_nothing(task):
    for edit, share in ((lambda answer: answer, 1.0), (lambda answer: answer[::-1] + "??", None), (lambda _: "", 0.0)):
        scores = evaluate(Oracle(asked(task), edit), TOKENIZER, [300], [task], 40)[300]
        assert scores[task].items == 40 and scores["average"].share == scores[task].share
        assert share is None or scores[task].share == share
        assert scores[task].low <= scores[task].share <= scores[task].high


def test_a_part_of_the_answer_counts_for_its_part():
    items = asked("niah-multivalue")
    scores = evaluate(Oracle(items, lambda answer: answer.split()[0]), TOKENIZER, [300], ["niah-multivalue"], 40)
    assert scores[300]["niah-multivalue"].share == pytest.approx(1 / 3)


def test_no_more_is_read_than_the_answer_is_long():
    items = asked("niah-single")
    said = answers(Oracle(items, lambda answer: "?????" + answer), TOKENIZER, items)
    assert all(len(text) <= len(item.answer) for text, item in zip(said, items, strict=True))


def test_matching_is_rulers():
    assert string_match("The value is AB and cd", ["ab", "cd", "ef"]) == pytest.approx(2 / 3)
    assert string_match("ef", ["ab", "cd", "ef"], "part") == 1 and string_match("x", ["ab"], "part") == 0


@given(found=st.integers(0, 1000), more=st.integers(0, 1000))
def test_the_interval_holds_the_share_and_narrows_with_the_count(found, more):
    count = found + more
    share = found / count if count else 0.0
    low, high = wilson(share, count)
    assert 0 <= low <= share <= high + 1e-12 and high <= 1
    assert wilson(share, 10 * count + 1)[1] - wilson(share, 10 * count + 1)[0] <= high - low


def test_wilsons_interval_is_the_known_one():
    assert wilson(0.9, 100) == pytest.approx((0.82563, 0.94477), abs=1e-4)  # 90 of 100
    assert wilson(0.0, 1000)[1] == pytest.approx(0.0038, abs=1e-4)


@pytest.fixture(scope="module")
def model():
    config = Glm5Config.preset("tiny", hidden_size=32, num_hidden_layers=2, index_topk=16)
    return Glm5ForCausalLM(config, seed=1)


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_answers_are_those_of_one_item_at_a_time(model, attention):
    model.attention = attention
    items = [item for task in ("niah-single", "coreference") for item in asked(task, items=3)]
    together = answers(model, TOKENIZER, items)
    assert together == [answers(model, TOKENIZER, [item])[0] for item in items]
    frame = TOKENIZER.encode_document("")[:-1].tolist()
    ids = torch.tensor(frame + TOKENIZER.encode(items[0].prompt).tolist())
    alone = model.generate(ids, len(items[0].answer), stop_tokens=(TOKENIZER.eos_id,))[len(ids) :]
    assert TOKENIZER.decode(alone.tolist()) == together[0]


def test_the_form_of_attention_is_given_back(model):
    model.attention = "dense"
    evaluate(model, TOKENIZER, [256], ["niah-single"], 2, attention="sparse")
    assert model.attention == "dense"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lengths": [9000]}, "a length of 9000 tokens, want at most max_position_embeddings, 8192"),
        ({"lengths": []}, "no length"),
        ({"items": 0}, "items is 0"),
        ({"tasks": ["niah"]}, "no task 'niah'"),
    ],
)
def test_what_cannot_be_asked_is_an_error(model, change, said):
    with pytest.raises(ValueError, match=said):
        evaluate(model, TOKENIZER, **(dict(lengths=[256], tasks=["niah-single"], items=2) | change))


def test_tables_have_a_model_a_row_and_a_length_a_column(model):
    scores = to_json(evaluate(model, TOKENIZER, [256, 300], ["niah-single", "coreference"], 2))
    assert table_lines([("dense", scores), ("+ sparse", {})], list(scores)) == [
        ("average", "256", "300"),
        ("dense", "0.0", "0.0"),
        ("+ sparse", "", ""),
    ]
    text = scores_table(scores, 2)
    assert len(text.splitlines()) == 5 and "coreference" in text and "0.0 [0.0, 65.8]" in text


def test_the_command_prints_a_table_and_writes_json(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save(tmp_path / "model")
    (tmp_path / "hay.txt").write_text("some words\n" * 100)
    options = ["--lengths", "256", "--items", "3", "--tasks", "niah-multikey", "--json", str(tmp_path / "scores.json")]
    command = ["eval", "longctx", "--model", str(tmp_path / "model"), "--haystack", str(tmp_path / "hay.txt"), *options]
    assert main(command) == 0
    assert "niah-multikey" in capsys.readouterr().out
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["attention"] == "sparse" and written["scores"]["256"]["niah-multikey"]["items"] == 3
    assert main([*command, "--needles", "200"]) == 1
    assert "too few letters" in capsys.readouterr().err
