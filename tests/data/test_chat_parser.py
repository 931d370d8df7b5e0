"""Ids back to messages: what was rendered renders again, whatever a model samples is read, and every call has a status."""

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from glm5.data import ByteTokenizer, ChatError, ChatTemplate
from glm5.data.chat_parser import CallStatus
from glm5.data.tokenizer import SPECIAL_TOKENS
from tests.data.conversations import PLAIN, TRICKY, VERSIONS, conversations
from tests.data.test_chat import GOLDEN, SplittingTokenizer, renderers  # noqa: F401

TEMPLATES = {version: ChatTemplate(version) for version in VERSIONS}
GLM5 = TEMPLATES["glm-5"]


def ids_of(text: str) -> list[int]:
    """Ids of text, special tokens where it spells one."""
    return SplittingTokenizer().encode(text)


# ---- conversations ----


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=200)
@given(case=conversations(TRICKY))
def test_what_was_rendered_renders_again(version, case):
    turns, tools, flags = case
    template = TEMPLATES[version]
    ids = template.render(turns, tools, **flags).ids
    read = template.parse(ids)
    assert template.render(read.messages, read.tools, **read.options).ids.tolist() == ids.tolist()
    assert all(call.status is CallStatus.OK for call in read.calls)
    # And what was read says the same when it is read again.
    again = template.parse(template.render(read.messages, read.tools, **read.options).ids)
    assert again == read


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("enable_thinking", [True, False])
@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "content": "U"}, {"role": "assistant", "reasoning_content": " ", "content": "a"}],
        [{"role": "assistant", "reasoning_content": " ", "content": "a"}, {"role": "user", "content": "U"}],
        [{"role": "system", "content": "Reasoning Effort: Max"}],
        [{"role": "system", "content": "Reasoning Effort: High"}, {"role": "user", "content": "U"}],
        [{"role": "user", "content": "U"}, {"role": "assistant", "content": ""}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, {"role": "assistant", "content": ""}],
    ],
)
def test_what_could_be_read_in_two_ways_renders_again(version, enable_thinking, turns):
    template = TEMPLATES[version]
    ids = template.render(turns, enable_thinking=enable_thinking, clear_thinking=False).ids
    read = template.parse(ids)
    assert template.render(read.messages, read.tools, **read.options).ids.tolist() == ids.tolist()


def test_bpe_ids_come_back_too():
    pytest.importorskip("tokenizers", reason="needs: pip install -c constraints.txt tokenizers")
    from tests.data.test_tokenizer import bpe

    tool = {"type": "function", "function": {"name": "f", "description": "the value"}}
    for version in VERSIONS:
        template = ChatTemplate(version, bpe())
        ids = template.render(GOLDEN, [tool], add_generation_prompt=True).ids
        read = template.parse(ids)
        assert template.render(read.messages, read.tools, **read.options).ids.tolist() == ids.tolist()
        assert read.tools == [tool]


def test_messages_come_back():
    read = GLM5.parse(GLM5.render(GOLDEN, clear_thinking=False, add_generation_prompt=True, enable_thinking=False).ids)
    calls = [{"type": "function", "function": call["function"]} for call in GOLDEN[2]["tool_calls"]]
    assert read.messages == [{**m, "content": m["content"] or ""} | ({"tool_calls": calls} if i == 2 else {})
                             for i, m in enumerate(GOLDEN)]  # fmt: skip
    assert read.options == {"add_generation_prompt": True, "enable_thinking": False, "clear_thinking": False}
    assert GLM5.parse(GLM5.render(GOLDEN).ids).messages[2]["reasoning_content"] == ""


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"do not begin with \[gMASK\] <sop>"),
        ("[gMASK]<sop>", "the ids have no message"),
        ("[gMASK]<sop>hi", "id 2 is text, want <|system|>".replace("|", r"\|")),
        ("[gMASK]<sop><think><|user|>", "id 2 is <think>"),
        ("[gMASK]<sop><|user|>a<think>b", "id 4 is <think>, within a user turn"),
        ("[gMASK]<sop><|system|>a<tool_call>", "id 4 is <tool_call>, within a system turn that does not list tools"),
        ("[gMASK]<sop><|assistant|>hi", "id 3: an assistant's turn does not begin as glm-5's do"),
        ("[gMASK]<sop><|observation|>hi", "id 3: an observation is not made of <tool_response>"),
        ("[gMASK]<sop><|observation|><tool_response>hi", "id 3: an observation is not made of"),
        ("[gMASK]<sop><|observation|><|user|>", r"id 2 is <\|observation\|> without a result"),
        ("[gMASK]<sop><|observation|><tool_response><think></tool_response>", "id 4 is <think>, within a tool's result"),
        ("[gMASK]<sop><|user|>a<|endoftext|>", "id 4 is <.endoftext.>, within a user turn"),
    ],
)
def test_ids_that_are_no_conversation(text, message):
    with pytest.raises(ChatError, match=message):
        GLM5.parse(ids_of(text))


def test_other_ids_that_are_no_conversation():
    with pytest.raises(ChatError, match="id -1 is negative"):
        GLM5.parse([258, 260, -1])
    with pytest.raises(ChatError, match="does not begin as glm-5.2's do"):
        TEMPLATES["glm-5.2"].parse(ids_of("[gMASK]<sop><|user|><|assistant|></think>hi"))


@given(
    st.lists(st.sampled_from(SPECIAL_TOKENS) | st.sampled_from(("a", " ", "\n", "π")), max_size=12),
    st.sampled_from(VERSIONS),
)
def test_any_ids_are_read_or_refused(names, version):
    try:
        TEMPLATES[version].parse(ids_of("[gMASK]<sop><|user|>" + "".join(names)))
    except ChatError:
        pass


# ---- completions ----


def complete(text, **options):
    return GLM5.parse_completion(ids_of(text), **options)


def test_a_completion_and_what_ended_it():
    read = complete("r</think>hi<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call><|observation|>rest")
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert read.message == {"role": "assistant", "content": "hi", "reasoning_content": "r", "tool_calls": [call]}
    assert read.stop == "<|observation|>" and read.thought_closed and read.num_ids == 14
    assert read.calls[0].status is CallStatus.OK and read.calls[0].span == (4, 13)
    assert complete("a").stop is None and not complete("a").thought_closed
    assert complete("a</think>b<|user|>").stop == "<|user|>" and complete("").message["content"] == ""
    assert complete("a", enable_thinking=False).message == {"role": "assistant", "content": "a", "reasoning_content": ""}


@pytest.mark.parametrize("enable_thinking", [True, False])
@settings(max_examples=200)
@given(case=conversations(TRICKY, lists=False))
def test_what_the_assistant_is_to_write_is_read_back(enable_thinking, case):
    """A turn's sampled tokens, read as a completion, are the turn."""
    turns, tools, flags = case
    turn = next((turn for turn in turns if turn["role"] == "assistant"), None)
    assume(turn is not None)
    turn = {"reasoning_content": "", **turn}
    if not enable_thinking:
        turn["reasoning_content"] = ""
    for version in VERSIONS:
        template = TEMPLATES[version]
        prompt = template.render([{"role": "user"}], enable_thinking=enable_thinking, add_generation_prompt=True)
        whole = template.render([{"role": "user"}, turn], enable_thinking=enable_thinking)
        if whole.ids[: len(prompt.ids)].tolist() != prompt.ids.tolist():
            assert version == "glm-5" and enable_thinking and not turn["reasoning_content"]
            continue
        assert not whole.sampled[: len(prompt.ids)].any() and whole.sampled[len(prompt.ids) :].all()
        read = template.parse_completion(whole.ids[len(prompt.ids) :], enable_thinking=enable_thinking)
        assert read.message["content"] == (turn["content"] or "").strip()
        assert read.message["reasoning_content"].strip() == turn["reasoning_content"].strip() and read.thought_closed
        assert template.render([{"role": "user"}, read.message], enable_thinking=enable_thinking).text == whole.text


@given(st.lists(st.integers(0, 300), max_size=30), st.booleans())
@example(ids_of("<tool_call>" * 3), True)
@example(ids_of("</think></tool_call><arg_value>"), True)
def test_anything_a_model_samples_is_read(ids, enable_thinking):
    read = GLM5.parse_completion(ids, tools=[{"name": "f"}], enable_thinking=enable_thinking)
    assert isinstance(read.message["content"], str) and 0 <= read.num_ids <= len(ids)
    assert (read.stop is not None) == any(i in GLM5.stop_ids for i in ids)
    assert read.num_ids == len(ids) or ids[read.num_ids - 1] in GLM5.stop_ids
    spans = [call.span for call in read.calls]
    assert spans == sorted(spans) and all(ids[a] == GLM5.tokenizer.special_ids["<tool_call>"] for a, _ in spans)
    sayable = {CallStatus.OK, CallStatus.UNKNOWN_TOOL, CallStatus.INVALID_JSON}
    assert len(read.message.get("tool_calls", ())) == sum(call.status in sayable for call in read.calls)
    if read.calls:  # a message that was read can be rendered
        GLM5.render([read.message])


ARGUMENT = "<arg_key>{}</arg_key><arg_value>{}</arg_value>".format
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {
    "text": {"type": "string"},
    "number": {"type": "integer"},
    "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
    "perhaps": {"type": ["string", "null"]},
    "named": {"$ref": "#/$defs/count"},
    "both": {"allOf": [{"type": ["string", "integer"]}, {"type": ["integer", "null"]}]},
    "choice": {"enum": ["1", "2"]},
    "self": {"$ref": "#/properties/self"},
    "free": {},
}, "$defs": {"count": {"type": "integer"}}}}}  # fmt: skip


@pytest.mark.parametrize(
    "body, status, name, arguments",
    [
        ("f</tool_call>", "ok", "f", {}),
        ("\nf\n" + ARGUMENT("a", "b") + "\n" + ARGUMENT("c", "d") + "\n</tool_call>", "ok", "f", {"a": "b", "c": "d"}),
        ("f" + ARGUMENT("a", " b\n") + "</tool_call>", "ok", "f", {"a": " b\n"}),
        ("f" + ARGUMENT("a", "b"), "unclosed_block", None, {}),
        ("</tool_call>", "missing_name", None, {}),
        (ARGUMENT("a", "b") + "</tool_call>", "missing_name", None, {"a": "b"}),
        ("g</tool_call>", "unknown_tool", "g", {}),
        ("f<arg_value>b</arg_value></tool_call>", "malformed_structure", "f", {}),
        ("f<arg_key>a</arg_key></tool_call>", "malformed_structure", "f", {}),
        ("f" + ARGUMENT("a", "b") + "<arg_key>c</tool_call>", "malformed_structure", "f", {"a": "b"}),
        ("f" + ARGUMENT("a", "b") + "text</tool_call>", "malformed_structure", "f", {"a": "b"}),
        ("f" + ARGUMENT("a", "b") + ARGUMENT("a", "c") + "</tool_call>", "malformed_structure", "f", {"a": "c"}),
        ("f<arg_key>a</arg_key> x <arg_value>b</arg_value></tool_call>", "malformed_structure", "f", {"a": "b"}),
        ("f" + ARGUMENT("a", "b<think>") + "</tool_call>", "malformed_structure", "f", {}),
        ("f" + ARGUMENT("number", "one") + "</tool_call>", "invalid_json", "f", {"number": "one"}),
    ],
)
def test_statuses(body, status, name, arguments):
    call = complete("</think><tool_call>" + body, tools=[TOOL]).calls[0]
    assert (call.status.value, call.name, call.arguments) == (status, name, arguments)
    assert call.text == body.removesuffix("</tool_call>")


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("text", "123", "123"),
        ("text", '{"a": 1}', '{"a": 1}'),
        ("number", "123", 123),
        ("number", " 123 ", 123),
        ("either", "7", 7),
        ("either", "[7]", "[7]"),
        ("either", "seven", "seven"),
        ("perhaps", "null", None),
        ("perhaps", "5", "5"),
        ("named", "5", 5),
        ("both", "5", 5),
        ("choice", "1", "1"),
        ("self", "1", 1),
        ("free", "[1, 2]", [1, 2]),
        ("free", "[1,2]", "[1,2]"),  # a string: as JSON it would have been written otherwise
        ("free", '"a"', '"a"'),
        ("unheard of", "true", True),
    ],
)
def test_values_have_the_types_their_tool_declares(key, text, value):
    call = complete("</think><tool_call>f" + ARGUMENT(key, text) + "</tool_call>", tools=[TOOL]).calls[0]
    assert call.status is CallStatus.OK and call.arguments == {key: value} and type(call.arguments[key]) is type(value)


def test_without_tools_nothing_is_unknown():
    assert complete("</think><tool_call>g" + ARGUMENT("a", "123") + "</tool_call>").calls[0].arguments == {"a": 123}
    assert complete("</think><tool_call>g</tool_call>").calls[0].status is CallStatus.OK
    assert complete("</think><tool_call>g</tool_call>", tools=[]).calls[0].status is CallStatus.UNKNOWN_TOOL
    with pytest.raises(ChatError, match=r"tools\[0\] has no name"):
        complete("", tools=[{"type": "function"}])


def test_a_call_within_a_thought_is_not_lost():
    read = complete("r<tool_call>f</tool_call><|observation|>")
    assert read.message["reasoning_content"] == "r" and read.calls[0].status is CallStatus.OK and read.thought_closed
    # Spelled as text it is no call, and neither is a stop token.
    ids = ByteTokenizer().encode("<tool_call>f</tool_call><|user|>")
    assert not GLM5.parse_completion(ids, enable_thinking=False).calls
    assert GLM5.parse_completion(ids, enable_thinking=False).message["content"] == "<tool_call>f</tool_call><|user|>"


@settings(max_examples=200)
@given(st.lists(st.sampled_from(("<think>", "</think>", "<tool_call>", "</tool_call>")) | PLAIN, max_size=10), st.booleans())
def test_the_renderers_package_reads_the_same(renderers, pieces, enable_thinking):  # noqa: F811
    renderer = renderers["glm-5"](SplittingTokenizer())
    renderer.config = type(renderer.config)(enable_thinking=enable_thinking)
    ids = ids_of("".join(pieces))
    theirs, ours = renderer.parse_response(ids), complete("".join(pieces), enable_thinking=enable_thinking)
    assert ours.message["content"].strip() == theirs.content.strip()
    assert ours.message["reasoning_content"].rstrip() == (theirs.reasoning_content or "")
    assert ours.thought_closed == theirs.reasoning_complete
    assert [(call.name, call.status.value, call.span) for call in ours.calls] == [
        (call.name, call.status.value, call.token_span) for call in theirs.tool_calls
    ]


def test_a_long_completion_is_read_in_time_that_grows_with_it():
    body = "f" + ARGUMENT("a", "b") * 2000 + "</tool_call>"
    assert complete("</think><tool_call>" + body).calls[0].arguments == {"a": "b"}
    assert np.asarray(ids_of(body)).size > 10000
