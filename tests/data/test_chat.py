"""Chat templates: golden vectors, three oracles, and what text, thoughts and the model's own tokens become."""

import json
import re
import sys
import types

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings

from glm5.data import ByteTokenizer, ChatError, ChatTemplate
from glm5.data.tokenizer import SPECIAL_TOKENS
from tests.data.conversations import PLAIN, TRICKY, VERSIONS, conversations, jinja_text

TEMPLATES = {version: ChatTemplate(version) for version in VERSIONS}
SPECIAL = ByteTokenizer().special_ids

CALLS = [{"function": {"name": "f", "arguments": {"a": "x", "n": [1, "é"]}}}, {"function": {"name": "g", "arguments": {}}}]
GOLDEN = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": None, "reasoning_content": "r1", "tool_calls": CALLS},
    {"role": "tool", "content": "T1"},
    {"role": "tool", "content": "T2"},
    {"role": "assistant", "content": "ans", "reasoning_content": "r2"},
    {"role": "user", "content": "U2"},
]
CALLS_TEXT = (
    '<tool_call>f<arg_key>a</arg_key><arg_value>x</arg_value><arg_key>n</arg_key><arg_value>[1, "é"]</arg_value></tool_call>'
    "<tool_call>g</tool_call>"
)
RESULTS = "<|observation|><tool_response>T1</tool_response><tool_response>T2</tool_response>"


def golden(first: str, second: str, end: str, begin: str = "") -> str:
    asked = f"[gMASK]<sop>{begin}<|system|>S<|user|>U1<|assistant|>"
    return f"{asked}{first}{CALLS_TEXT}{RESULTS}<|assistant|>{second}ans<|user|>U2{end}"


EFFORT = "<|system|>Reasoning Effort: Max"


@pytest.mark.parametrize(
    "version, flags, text",
    [
        ("glm-5", {}, golden("</think>", "</think>", "<|assistant|><think>")),
        ("glm-5", {"clear_thinking": False}, golden("<think>r1</think>", "<think>r2</think>", "<|assistant|><think>")),
        ("glm-5", {"enable_thinking": False}, golden("</think>", "</think>", "<|assistant|></think>")),
        ("glm-5.1", {}, golden("</think>", "</think>", "<|assistant|><think>")),
        ("glm-5.2", {}, golden("<think></think>", "<think></think>", "<|assistant|><think>", EFFORT)),
        ("glm-5.2", {"enable_thinking": False}, golden(*["<think></think>"] * 2, "<|assistant|><think></think>")),
        (
            "glm-5.2",
            {"clear_thinking": False, "reasoning_effort": "high"},
            golden("<think>r1</think>", "<think>r2</think>", "<|assistant|><think>", EFFORT.replace("Max", "High")),
        ),
    ],
)
def test_golden_vectors(version, flags, text):
    assert TEMPLATES[version].render(GOLDEN, add_generation_prompt=True, **flags).text == text


@pytest.mark.parametrize(
    "version, text", [("glm-5", "</think>hi"), ("glm-5.1", "<think></think>hi"), ("glm-5.2", "<think></think>hi")]
)
def test_a_turn_without_a_thought(version, text):
    turns = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "hi"}]
    assert TEMPLATES[version].render(turns).text.endswith("<|user|>U<|assistant|>" + text)


def test_interleaved_thinking_keeps_the_thoughts_of_the_last_turn():
    turns = GOLDEN[:-1]
    assert (
        TEMPLATES["glm-5"].render(turns).text == golden("<think>r1</think>", "<think>r2</think>", "")[: -len("<|user|>U2")]
    )


def test_tools_are_listed_as_each_version_does():
    function = {"name": "f", "description": "é", "strict": True, "parameters": {"type": "object"}}
    tool = {"type": "function", "function": function}
    head = (
        "[gMASK]<sop><|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    )
    tail = (
        "\n</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
        "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>"
        "<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call><|user|>hi"
    )
    turns = [{"role": "user", "content": "hi"}]
    assert TEMPLATES["glm-5"].render(turns, [tool]).text == head + json.dumps(tool, ensure_ascii=False) + tail
    unwrapped = '{"name": "f", "description": "é", "parameters": {"type": "object"}}'
    for given_tool in (tool, function):
        assert TEMPLATES["glm-5.1"].render(turns, [given_tool]).text == head + unwrapped + tail


# ---- three oracles ----


FEW, MANY = 150, 3000


def check_jinja(version, case):
    turns, tools, flags = case
    assert jinja_text(TEMPLATES[version], turns, tools, **flags) == TEMPLATES[version].render(turns, tools, **flags).text


class SplittingTokenizer:
    """Bytes, and special tokens wherever text spells one: what a tokenizer of Transformers does, and renderers expects."""

    unk_token_id, eos_token_id = None, SPECIAL["<|endoftext|>"]

    def convert_tokens_to_ids(self, name):
        return SPECIAL[name]

    def encode(self, text, add_special_tokens=False):
        pieces = re.split("(" + "|".join(re.escape(name) for name in SPECIAL_TOKENS) + ")", text)
        ids = [[SPECIAL[piece]] if piece in SPECIAL else ByteTokenizer().encode(piece).tolist() for piece in pieces]
        return [i for piece in ids for i in piece]

    def decode(self, ids, skip_special_tokens=False):
        return ByteTokenizer().decode(ids, skip_special=skip_special_tokens)


@pytest.fixture(scope="module")
def renderers():
    """The package without its HTTP client, whose dependencies are many."""
    pytest.importorskip("pydantic_config", reason="needs: make test")
    names = ("MalformedGenerateResponseError", "OverlongPromptError")
    client = types.ModuleType("renderers.client")
    vars(client).update(dict.fromkeys(names, Exception))
    sys.modules.setdefault("renderers.client", client)
    module = pytest.importorskip("renderers.glm5", reason="needs: make test")
    return {"glm-5": module.GLM5Renderer, "glm-5.1": module.GLM51Renderer}


def check_renderers(renderers, version, case):
    turns, tools, flags = case
    renderer = renderers[version](SplittingTokenizer())
    config = {name: flags[name] for name in ("enable_thinking", "clear_thinking")}
    renderer.config = type(renderer.config)(**config)
    theirs = renderer.render(turns, tools=tools, add_generation_prompt=flags["add_generation_prompt"])
    ours = TEMPLATES[version].render(turns, tools, **flags)
    assert ours.ids.tolist() == theirs.token_ids
    assert ours.sampled.tolist() == theirs.sampled_mask
    assert ours.messages.tolist() == theirs.message_indices


COUNTS = [FEW, pytest.param(MANY, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_jinja_template_says_the_same(version, count):
    @settings(max_examples=count)
    @given(case=conversations(TRICKY))
    def check(case):
        check_jinja(version, case)

    check()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("version", ["glm-5", "glm-5.1"])
def test_the_renderers_package_gives_the_same_tokens(renderers, version, count):
    @settings(max_examples=count)
    @given(case=conversations(PLAIN, lists=False, nones=False))
    def check(case):
        check_renderers(renderers, version, case)

    check()


@pytest.mark.parametrize("version", VERSIONS)
def test_transformers_applies_a_saved_template(version, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs: pip install -c constraints.txt transformers")
    pytest.importorskip("tokenizers")
    from tests.data.test_tokenizer import bpe

    tool = {"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}
    for tokenizer in (ByteTokenizer(), bpe()):
        template = ChatTemplate(version, tokenizer)
        tokenizer.save(tmp_path)
        template.save(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for flags in ({}, {"clear_thinking": False}, {"enable_thinking": False}):
            flags = flags | {"add_generation_prompt": True}
            ours = template.render(GOLDEN, [tool], **flags)
            assert theirs.apply_chat_template(GOLDEN, [tool], tokenize=False, **flags) == ours.text
            ids = theirs.apply_chat_template(GOLDEN, [tool], tokenize=True, return_dict=False, **flags)
            assert ids == ours.ids.tolist()


# ---- what belongs to what ----


def blank(value, key=None):
    """The same conversation with x for every text that says something: the same special tokens should stand in it."""
    if isinstance(value, dict):
        return {k: blank(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [blank(v, key) for v in value]
    if not isinstance(value, str) or key in ("role", "type", "name"):
        return value
    return "x" if value.strip() else value


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=100)
@given(case=conversations(TRICKY))
def test_text_never_becomes_a_special_token(version, case):
    turns, tools, flags = case
    for turn in turns:  # "a</think>b" as content is a thought and an answer: said so by the caller
        if turn["role"] == "assistant":
            turn.setdefault("reasoning_content", "")
    template = TEMPLATES[version]
    rendered = template.render(turns, tools, **flags)
    assert template.tokenizer.decode(rendered.ids, skip_special=False) == rendered.text
    twin = template.render(blank(turns), blank(tools), **flags)
    assert rendered.ids[rendered.ids >= 256].tolist() == twin.ids[twin.ids >= 256].tolist()


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=100)
@given(case=conversations(TRICKY))
def test_every_token_has_a_place(version, case):
    turns, tools, flags = case
    rendered = TEMPLATES[version].render(turns, tools, **flags)
    assert len(rendered.ids) == len(rendered.roles) == len(rendered.messages) == len(rendered.sampled)
    for role, message, sampled in zip(rendered.roles, rendered.messages, rendered.sampled, strict=True):
        assert role == ("template" if message < 0 else turns[message]["role"])
        assert not sampled or role == "assistant"
    # Messages stand in their order. Only a user's that says nothing can have no token: the assistant's stop is its first.
    within = rendered.messages[rendered.messages >= 0]
    assert (np.diff(within) >= 0).all()
    assert all(turns[i]["role"] == "user" and i > 0 for i in set(range(len(turns))) - set(within.tolist()))


def spans(rendered, wanted: bool) -> list[str]:
    """The texts of runs of tokens that are sampled, or given."""
    edges = np.flatnonzero(np.diff(rendered.sampled, prepend=~rendered.sampled[:1], append=~rendered.sampled[-1:]))
    runs = zip(edges[:-1], edges[1:], strict=True)
    return [ByteTokenizer().decode(rendered.ids[a:b], skip_special=False) for a, b in runs if rendered.sampled[a] == wanted]


def test_what_is_sampled():
    rendered = TEMPLATES["glm-5"].render(GOLDEN, clear_thinking=False)
    assert spans(rendered, True) == [f"r1</think>{CALLS_TEXT}<|observation|>", "r2</think>ans<|user|>"]
    rendered = TEMPLATES["glm-5"].render(GOLDEN)
    assert spans(rendered, True) == [f"{CALLS_TEXT}<|observation|>", "ans<|user|>"]
    # With thinking on the model closes an empty thought itself; with thinking off the prompt does.
    turns = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "hi"}]
    for version in ("glm-5.1", "glm-5.2"):
        assert spans(TEMPLATES[version].render(turns), True) == ["</think>hi"]
        assert spans(TEMPLATES[version].render(turns, enable_thinking=False), True) == ["hi"]
    assert spans(TEMPLATES["glm-5.2"].render([*turns, *turns]), True) == ["hi<|user|>", "</think>hi"]


@given(text=TRICKY, thought=TRICKY)
def test_a_thought_within_content(text, thought):
    """Servers that do not part thoughts from answers return both as content."""
    if "</think>" in thought or "<think>" in thought:
        return
    turn = {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n{text}"}
    parted = {"role": "assistant", "reasoning_content": thought.strip("\n"), "content": text.lstrip("\n")}
    assert TEMPLATES["glm-5"].render([turn]).text == TEMPLATES["glm-5"].render([parted]).text


def test_only_the_first_end_of_a_thought_within_content_is_one():
    turn = {"role": "assistant", "content": "a</think>b</think>c"}
    expected = "[gMASK]<sop><|assistant|><think>a</think>b</think>c"
    rendered = TEMPLATES["glm-5"].render([turn])
    assert rendered.text == expected == jinja_text(TEMPLATES["glm-5"], [turn], None)
    assert TEMPLATES["glm-5"].parse(rendered.ids).messages[0]["content"] == "b</think>c"


@given(conversations(TRICKY))
def test_arguments_may_be_json_text(case):
    turns, tools, flags = case
    expected = TEMPLATES["glm-5"].render(turns, tools, **flags)
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    assert TEMPLATES["glm-5"].render(turns, tools, **flags).text == expected.text


def test_no_content_is_empty_content():
    turns = [{"role": "user"}, {"role": "assistant", "content": None}, {"role": "tool", "content": None}]
    expected = "[gMASK]<sop><|user|><|assistant|></think><|observation|><tool_response></tool_response>"
    assert TEMPLATES["glm-5"].render(turns).text == expected == jinja_text(TEMPLATES["glm-5"], turns, None)


def test_a_list_of_results_is_an_observation_of_its_own():
    turns = [
        {"role": "tool", "content": "a"},
        {"role": "tool", "content": ["b", {"output": "c"}, {"type": "text", "text": "d"}]},
    ]
    one = "<tool_response>{}</tool_response>".format
    expected = f"[gMASK]<sop><|observation|>{one('a')}<|observation|>{one('b')}{one('c')}{one('d')}"
    assert TEMPLATES["glm-5"].render(turns).text == expected == jinja_text(TEMPLATES["glm-5"], turns, None)


# ---- bad input ----


def call(**function):
    return [{"role": "assistant", "tool_calls": [{"function": function}]}]


USER = {"role": "user", "content": "U"}
BAD = [
    ([], {}, "messages is empty"),
    (["hi"], {}, r"messages\[0\] is str, want a mapping"),
    ([{"role": "developer", "content": ""}], {}, r"messages\[0\].role is 'developer', want one of system, user"),
    ([USER, {"content": ""}], {}, r"messages\[1\].role is None"),
    ([{"role": "user", "content": 3}], {}, r"messages\[0\].content is int, want text"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], {}, r"content\[0\] is of type 'image_url', want text"),
    ([{"role": "tool", "content": [3]}], {}, r"content\[0\] is of type int, want text"),
    ([{"role": "tool", "content": []}], {}, r"content is an empty list, want at least one result"),
    ([{"role": "user", "tool_calls": [{}]}], {}, "has role 'user' and tool_calls"),
    ([{"role": "assistant", "reasoning_content": 3}], {}, "reasoning_content is int, want text"),
    ([{"role": "assistant", "tool_calls": ["f"]}], {}, r"messages\[0\].tool_calls\[0\] is not a mapping"),
    (call(name=""), {}, "the name is '', want text"),
    (call(name=" f"), {}, "the name is ' f', want text without spaces"),
    (call(name="f", arguments="{"), {}, "the arguments of f are not JSON"),
    (call(name="f", arguments="[1]"), {}, "the arguments of f are no JSON object"),
    (call(name="f", arguments={1: 2}), {}, "the arguments of f are no JSON object"),
    (call(name="f", arguments={"a": {1}}), {}, "f's a cannot be written as JSON"),
    (call(name="f"), {"add_generation_prompt": True}, r"messages\[0\] ends in a tool call: want its result"),
    ([USER], {"tools": ["f"]}, r"tools\[0\] is str, want a JSON object"),
    ([USER], {"tools": [{"a": {1}}]}, r"tools\[0\] cannot be written as JSON"),
    ([USER], {"reasoning_effort": "high"}, "reasoning_effort is 'high', want none: glm-5 has no such line"),
    ([{"role": "user", "content": "\ud800"}], {}, "lone surrogate"),
]


@pytest.mark.parametrize("turns, options, message", BAD)
def test_bad_input(turns, options, message):
    with pytest.raises(ValueError, match=message):
        TEMPLATES["glm-5"].render(turns, **options)


def test_more_bad_input():
    with pytest.raises(ValueError, match="version is 'glm-4.5', want one of glm-5, glm-5.1, glm-5.2"):
        ChatTemplate("glm-4.5")
    with pytest.raises(ChatError, match="reasoning_effort is 'low', want max or high"):
        TEMPLATES["glm-5.2"].render([USER], reasoning_effort="low")
    with pytest.raises(ChatError, match=r"tools\[0\].function is str"):
        TEMPLATES["glm-5.1"].render([USER], [{"function": "f"}])


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "developer", "content": ""}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": 3}],
        [{"role": "tool", "content": []}],
        call(name="f", arguments="{}"),
    ],
)
def test_the_jinja_template_refuses_too(turns):
    with pytest.raises(jinja2.exceptions.TemplateError):
        jinja_text(TEMPLATES["glm-5"], turns, None)
