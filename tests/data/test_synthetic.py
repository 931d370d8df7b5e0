"""Synthetic tasks: pure functions of their arguments, within their length, with answers that their own text proves."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.data import ByteTokenizer, DataError, open_data
from glm5.data.build import build_data
from glm5.data.synthetic import TASKS, WORDS, Shape, encode_item, make_item
from glm5.recipes import BuildRecipe

TOKENIZER = ByteTokenizer()
NEEDLES = [task for task in TASKS if task.startswith("niah")]
TEXT = "def f(x):\n    return x * 2  # zq=1\n\n" * 400

tasks = st.sampled_from(list(TASKS))
indices = st.integers(0, 2**40)
lengths = st.integers(256, 1500)
haystacks = st.sampled_from([None, TEXT])


@settings(max_examples=60)
@given(task=tasks, seed=st.integers(0, 2**32), index=indices, length=lengths, haystack=haystacks, held_out=st.booleans())
def test_an_item_is_a_function_of_its_arguments_and_fills_its_length(task, seed, index, length, haystack, held_out):
    options = dict(haystack=haystack, held_out=held_out)
    item = make_item(task, seed, index, length, TOKENIZER, **options)
    assert item == make_item(task, seed, index, length, TOKENIZER, **options)
    ids, mask = encode_item(item, TOKENIZER)
    assert np.array_equal(ids, TOKENIZER.encode_document(item.text)) and len(mask) == len(ids)
    assert length - 80 <= len(ids) <= length
    assert TOKENIZER.decode(ids[mask == 1]) == "".join(text for text, is_answer in item.parts if is_answer)
    assert all(reference in item.answer for reference in item.references)
    assert item.text == item.prompt + item.answer and item.answer.endswith("\n")
    for other in (dict(seed=seed + 1), dict(index=index + 1), dict(held_out=not held_out)):
        changed = dict(seed=seed, index=index, held_out=held_out, haystack=haystack) | other
        assert make_item(task, changed.pop("seed"), changed.pop("index"), length, TOKENIZER, **changed) != item


@settings(max_examples=60)
@given(task=st.sampled_from(NEEDLES), index=indices, length=lengths, haystack=haystacks, questions=st.integers(1, 4))
def test_needles_are_in_the_haystack_once_and_only_they_answer(task, index, length, haystack, questions):
    shape = Shape(questions=questions)
    item = make_item(task, 3, index, length, TOKENIZER, shape=shape, haystack=haystack)
    context, *asked = item.text.split("\n? ")
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r" ([a-z]+)=([a-z]+); ", context):
        found.setdefault(key, []).append(value)
    values = [value for drawn in found.values() for value in drawn]
    assert len(set(values)) == len(values) and not set(values) & set(found)
    assert len(asked) == (1 if task == "niah-single" else questions)
    assert len(found) == (1 if task == "niah-single" else shape.needles)
    for question in asked:
        if task == "niah-multiquery":
            keys, answer = question.split(":", 1)
            assert answer == "".join(f" {key}={found[key][0]};" for key in keys.split()) + "\n"
        else:
            key, answer = question.split("=", 1)
            assert answer == " ".join(found[key]) + "\n"
    assert [len(found[key]) for key in found if len(found[key]) > 1] == ([3] if task == "niah-multivalue" else [])


@settings(max_examples=30)
@given(index=indices, length=lengths)
def test_variables_are_those_that_the_statements_lead_to(index, length):
    item = make_item("variable-tracking", 0, index, length, TOKENIZER)
    holds: dict[str, str] = {}
    for name, value in re.findall(r" set ([a-z]+) = ([a-z]+); ", item.prompt):
        holds[name] = holds.get(value, value)
    asked = re.search(r"which are ([a-z]+): $", item.prompt)[1]
    assert [name for name, value in holds.items() if value == asked] == item.answer.split() == list(item.references)
    assert len(set(holds.values())) == 2


@settings(max_examples=30)
@given(task=st.sampled_from(["common-words", "frequent-words"]), index=indices, length=lengths)
def test_the_asked_words_are_the_most_frequent_without_a_tie(task, index, length):
    item = make_item(task, 0, index, length, TOKENIZER)
    counts = Counter(item.prompt.split("\n")[0].split()).most_common()
    assert [word for word, _ in counts[:3]] == item.answer.split()
    assert counts[0][1] > counts[1][1] > counts[2][1] > counts[3][1]


@settings(max_examples=30)
@given(index=indices, length=lengths)
def test_coreference_asks_for_one_of_several_equal_requests(index, length):
    item = make_item("coreference", 0, index, length, TOKENIZER)
    kind, which, topic = re.search(r"u: (\w+) (\d+) on (\w+) again\na: $", item.prompt).groups()
    replies = re.findall(rf"u: {kind} on {topic}\na: (\w+)\n", item.prompt)
    assert len(replies) == 4 == len(set(replies)) and replies[int(which) - 1] == item.answer.strip()


def test_answers_and_depths_are_spread_evenly():
    items = [make_item("niah-multikey", 0, i, 512, TOKENIZER) for i in range(400)]
    assert len({item.references for item in items}) > 250  # 676 values
    depths = [item.prompt.index(f"={item.references[0]};") / len(item.prompt) for item in items]
    quarters = np.histogram(depths, bins=4, range=(0, 1))[0]
    assert quarters.min() > 60, quarters
    which = Counter(len(re.findall(r"\w=\w", item.prompt[: item.prompt.index(f"={item.references[0]};")])) for item in items)
    assert len(which) == 8 and min(which.values()) > 20  # the asked key is any of the eight


def test_words_are_different_and_plain():
    assert len(set(WORDS)) == 512 and all(word.isalpha() for word in WORDS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "niah"}, "no task 'niah'; there are niah-single"),
        ({"length": 60}, r"niah-multikey needs \d+ tokens, but the length is 60"),
        ({"haystack": "   "}, "holds no word"),
    ],
)
def test_impossible_items_are_errors(change, said):
    arguments = dict(task="niah-multikey", seed=0, index=0, length=256, tokenizer=TOKENIZER) | change
    with pytest.raises(ValueError, match=said):
        make_item(**arguments)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"needles": 0}, "needles is 0"),
        ({"queries": 9}, "queries is 9, want at most needles, 8"),
        ({"questions": 9}, "questions is 9"),
        ({"value_length": 1}, "value_length is 1, too few letters"),
        ({"key_length": 1}, "key_length is 1, too few letters"),
    ],
)
def test_impossible_shapes_are_errors(fields, said):
    with pytest.raises(ValueError, match=said):
        Shape(**fields)


# ---- as a source of a data recipe ----


def recipe(*, text=None, **keys):
    sources = {"recall": {"kind": "synthetic", "domain": "recall", "count": 60} | keys}
    if text is not None:
        sources["text"] = {"kind": "folder", "domain": "text", "path": str(text), "filters": {"min_bytes": 1, "quality": 0}}
    return BuildRecipe.model_validate({"name": "test", "sources": sources, "validation_one_in": 5})


def test_a_build_holds_the_items_task_by_task_and_length_by_length(tmp_path):
    names = ("niah-single", "coreference")
    data = build_data(recipe(tasks=names, lengths=(256, 400), shape={"requests": 3}, seed=7), tmp_path / "out")
    assert open_data(tmp_path / "out", verify=True).digest == data.digest
    built = {TOKENIZER.decode(data.domain(d).tokens(i)) for d in data.domains for i in range(data.domain(d).num_documents)}
    shape = Shape(requests=3)
    wanted = {make_item(names[i % 2], 7, i, (256, 400)[i // 2 % 2], TOKENIZER, shape=shape).text for i in range(60)}
    assert built == wanted and set(data.domains) == {"recall", "recall/validation"}
    assert data.domain("recall").mask(0) is None


def test_only_answers_are_learnt_where_the_recipe_says_so(tmp_path):
    data = build_data(recipe(loss="answers"), tmp_path / "out")
    domain = data.domain("recall")
    for i in range(domain.num_documents):
        answer = TOKENIZER.decode(domain.tokens(i)[domain.mask(i) == 1])
        assert TOKENIZER.decode(domain.tokens(i)).endswith(answer) and 3 <= len(answer) <= 22


def test_a_haystack_is_training_text_of_another_source(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document{i} " * 200)
    data = build_data(recipe(text=tmp_path / "text", haystack="text"), tmp_path / "out")

    def words(domain):
        mine = data.domain(domain)
        return {w for i in range(mine.num_documents) for w in re.findall(r"document\d+", TOKENIZER.decode(mine.tokens(i)))}

    hay = words("recall") | words("recall/validation")
    assert hay and not hay & words("text/validation") and hay <= words("text")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"tasks": ("niah",)}, "source recall: no task 'niah'"),
        ({"lengths": (40,)}, "source recall: an item of niah-single|source recall: .* needs"),
        ({"shape": {"nedles": 3}}, "source recall: .*nedles"),
    ],
)
def test_a_source_that_cannot_be_is_named(tmp_path, keys, said):
    with pytest.raises(ValueError, match=said):
        build_data(recipe(**keys), tmp_path / "out")


def test_a_haystack_must_be_a_source_of_text(tmp_path):
    with pytest.raises(ValueError, match="haystack is 'recall', want the name of a source of text"):
        recipe(haystack="recall")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="source text has no text for a haystack"):
        build_data(recipe(text=tmp_path / "text", haystack="text"), tmp_path / "out")
