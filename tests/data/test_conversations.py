"""Conversations as training documents: every sampled token is learnt once, after what a server would have shown."""

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from glm5.data import ByteTokenizer, ChatError, ChatTemplate
from glm5.data.conversations import MODES, chat_documents, mode_of, read_conversations
from tests.data.conversations import TRICKY, VERSIONS, messages
from tests.data.test_chat import GOLDEN

TEMPLATES = {version: ChatTemplate(version) for version in VERSIONS}
GLM5 = TEMPLATES["glm-5"]
CALLS = (
    "<tool_call>f<arg_key>a</arg_key><arg_value>x</arg_value><arg_key>n</arg_key>"
    '<arg_value>[1, "é"]</arg_value></tool_call><tool_call>g</tool_call>'
)


def learnt(document) -> list[str]:
    """The runs of tokens that the loss counts, as text."""
    edges = np.flatnonzero(np.diff(document.mask.astype(int), prepend=0, append=0))
    return [text(document.ids[a:b]) for a, b in edges.reshape(-1, 2)]


def text(ids) -> str:
    return ByteTokenizer().decode(ids, skip_special=False)


def talk(*turns):
    """user, (thought, answer), user, ..."""
    return [
        {"role": "user", "content": turn}
        if isinstance(turn, str)
        else {"role": "assistant", "reasoning_content": turn[0], "content": turn[1]}
        for turn in turns
    ]


def test_one_turn():
    (document,) = chat_documents({"messages": talk("U", ("r", "a"))}, GLM5)
    assert text(document.ids) == "[gMASK]<sop><|user|>U<|assistant|><think>r</think>a<|user|>"
    assert learnt(document) == ["r</think>a<|user|>"]
    assert document.ids.dtype == np.int32 and document.mask.dtype == np.uint8


def test_modes():
    conversation = talk("U", ("r", "a"), "V", ("s", "b"))
    documents = chat_documents({"messages": conversation}, GLM5, "interleaved")
    assert [learnt(d) for d in documents] == [["r</think>a<|user|>"], ["s</think>b<|user|>"]]
    assert "<|assistant|></think>a<|user|>V" in text(documents[1].ids)
    (document,) = chat_documents({"messages": conversation}, GLM5, "preserved")
    assert learnt(document) == ["r</think>a<|user|>", "s</think>b<|user|>"]
    (document,) = chat_documents({"messages": conversation, "thinking": "off"}, GLM5, "preserved")
    assert text(document.ids) == "[gMASK]<sop><|user|>U<|assistant|></think>a<|user|>V<|assistant|></think>b<|user|>"
    assert learnt(document) == ["a<|user|>", "b<|user|>"]
    # A thought within content is left out too.
    inline = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "<think>r</think>a"}]
    assert learnt(chat_documents({"messages": inline}, GLM5, "off")[0]) == ["a<|user|>"]
    # Without thoughts to leave out one document holds all turns, and in glm-5.2 the </think> that each turn sampled.
    conversation = talk("U", ("", "a"), "V", ("", "b"))
    assert learnt(chat_documents({"messages": conversation}, GLM5)[0]) == ["a<|user|>", "b<|user|>"]
    (document,) = chat_documents({"messages": conversation}, TEMPLATES["glm-5.2"])
    assert learnt(document) == ["</think>a<|user|>", "</think>b<|user|>"]


def test_tools_and_the_token_that_ends_a_call():
    turns = GOLDEN[:-1]
    (document,) = chat_documents({"messages": turns}, GLM5)
    assert learnt(document) == [f"r1</think>{CALLS}<|observation|>", "r2</think>ans<|user|>"]
    (document,) = chat_documents({"messages": turns[:3], "tools": [{"name": "f"}]}, GLM5)
    assert learnt(document) == [f"r1</think>{CALLS}<|observation|>"]
    assert text(document.ids).count('{"name": "f"}\n</tools>') == 1
    # What no assistant is to write has no loss: a last user message.
    (document,) = chat_documents({"messages": GOLDEN}, GLM5, "preserved")
    assert learnt(document)[-1] == "r2</think>ans<|user|>" and text(document.ids).endswith("<|user|>U2")


def test_a_message_without_loss_stays_in_context():
    conversation = talk("U", ("r", "wrong"), "V", ("s", "right"))
    conversation[1]["loss"] = False
    (document,) = chat_documents({"messages": conversation}, GLM5, "preserved")
    assert learnt(document) == ["s</think>right<|user|>"] and "wrong<|user|>V" in text(document.ids)
    (document,) = chat_documents({"messages": conversation}, GLM5, "interleaved")
    assert learnt(document) == ["s</think>right<|user|>"]


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=100)
@given(turns=messages(TRICKY), mode=st.sampled_from(list(MODES)), data=st.data())
def test_every_turn_is_learnt_once_and_as_it_was_sampled(version, turns, mode, data):
    template = TEMPLATES[version]
    turns = [{**turn, "loss": data.draw(st.booleans())} if data.draw(st.booleans()) else turn for turn in turns]
    expected, shown = [], []
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant" and turn.get("loss", True):
            # As it was when the model went on from it: what the model wrote, and what it stopped with.
            so_far = [_without_thought(t) for t in turns[: i + 1]] if mode == "off" else turns[: i + 1]
            rendered = template.render(so_far, **MODES[mode])
            shown.append(rendered.ids.tolist())
            expected += rendered.ids[rendered.sampled & (rendered.messages == i)].tolist()
            after = turns[i + 1]["role"] if i + 1 < len(turns) else "tool" if turn.get("tool_calls") else "user"
            if after in ("user", "tool"):
                expected.append(template.stop_id({"tool_calls": after == "tool"}))
    if not expected:
        with pytest.raises(ChatError, match="no token to learn"):
            chat_documents({"messages": turns}, template, mode)
        return
    documents = chat_documents({"messages": turns}, template, mode)
    assert sum((d.ids[d.mask == 1].tolist() for d in documents), []) == expected
    assert all(any(d.ids[: len(ids)].tolist() == ids for d in documents) for ids in shown)
    # No document begins another: the longer one holds it.
    for a in documents:
        assert not any(a is not b and b.ids[: len(a.ids)].tolist() == a.ids.tolist() for b in documents)


def _without_thought(turn):
    if turn["role"] != "assistant":
        return turn
    content = turn["content"]
    if turn.get("reasoning_content") is None and isinstance(content, str) and "</think>" in content:
        content = content.split("</think>", 1)[1]
    return {**turn, "reasoning_content": "", "content": content}


def test_a_file_of_conversations(tmp_path):
    path = tmp_path / "chat.jsonl"
    records = [{"messages": talk("U", ("r", "é"))}, {"messages": talk("V", ("", "b")), "thinking": "off", "id": 3}]
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n\n")
    documents = list(read_conversations(path, GLM5))
    assert [learnt(d) for d in documents] == [["r</think>é<|user|>"], ["b<|user|>"]]

    for line, message in (
        ("{", "line 2: not JSON"),
        ("[]", "line 2: it is a JSON list, want an object with messages"),
        ("{}", "line 2: messages is missing or no list"),
        ('{"messages": []}', "line 2: messages is missing or no list"),
        ('{"messages": ["hi"]}', r"line 2: messages\[0\] is str"),
        (
            '{"messages": [{"role": "user"}], "thinking": "loud"}',
            "thinking is 'loud', want one of interleaved, preserved, off",
        ),
        ('{"messages": [{"role": "bot"}]}', "line 2: messages.0..role is 'bot'"),
        ('{"messages": [{"role": "user"}]}', "has no token to learn"),
        ('{"messages": [{"role": "assistant", "loss": 0}]}', r"messages\[0\].loss is 0, want true or false"),
        ('{"messages": [{"role": "assistant", "loss": false}]}', "has no token to learn"),
        ('{"messages": [{"role": "assistant"}], "reasoning_effort": "low"}', "glm-5 has no such line"),
        (b"\xff", "line 2: not JSON"),
    ):
        path.write_bytes(json.dumps(records[0]).encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()))
        with pytest.raises(ChatError, match=message) as caught:
            list(read_conversations(path, GLM5))
        assert str(caught.value).startswith(str(path))
    path.write_text("\n\n")
    with pytest.raises(ChatError, match="has no conversation, want one JSON object a line"):
        list(read_conversations(path, GLM5))


@given(st.text(max_size=5), st.dictionaries(st.sampled_from(list(MODES)), st.sampled_from((0, 0.5, 2)), min_size=1))
def test_a_mode_is_one_of_those_with_weight(name, weights):
    assume(sum(weights.values()) > 0)
    assert weights[mode_of(name, weights)] > 0 and mode_of(name, weights) == mode_of(name, dict(reversed(weights.items())))


def test_modes_have_their_shares():
    modes = [mode_of(str(i), {"interleaved": 2, "preserved": 1, "off": 1}) for i in range(4000)]
    assert [abs(modes.count(mode) - share) < 120 for mode, share in zip(MODES, (2000, 1000, 1000), strict=True)] == [
        True
    ] * 3
    for weights, message in (({"loud": 1}, "thinking mode 'loud'"), ({"off": 0}, "want none below zero and one above")):
        with pytest.raises(ValueError, match=message):
            mode_of("a", weights)
