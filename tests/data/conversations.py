"""Conversations for tests: whatever the chat format can say, from hypothesis, and what the format's oracles need."""

import json

import jinja2
import jinja2.ext
import jinja2.sandbox
from hypothesis import strategies as st

from glm5.data.tokenizer import SPECIAL_TOKENS

VERSIONS = ("glm-5", "glm-5.1", "glm-5.2")

MARKERS = st.sampled_from(SPECIAL_TOKENS)
WORDS = st.text(alphabet="ab é\n\t{\"'<>|/\u2028π😀", max_size=6)
PLAIN = WORDS.filter(lambda text: not any(name in text for name in SPECIAL_TOKENS))
TRICKY = st.lists(MARKERS | WORDS | st.sampled_from(("None", "Reasoning Effort: Max", "[1,2]", "\n# Tools\n\n")), max_size=3)
TRICKY = TRICKY.map("".join)
NAMES = st.sampled_from(("f", "get_weather", "a.b-c", "größe"))


def json_values(text):
    leaves = st.none() | st.booleans() | st.integers(-99, 10**12) | st.floats(allow_nan=False, allow_infinity=False) | text
    grow = lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2)  # noqa: E731
    return st.recursive(leaves, grow, max_leaves=3)


@st.composite
def tools(draw, text=PLAIN):
    properties = st.dictionaries(text, st.sampled_from(({"type": "string"}, {"type": "integer"}, {})), max_size=2)
    function = {"name": draw(NAMES), "description": draw(text), "parameters": {"properties": draw(properties)}}
    function |= draw(st.sampled_from(({}, {"strict": True}, {"defer_loading": False})))
    return draw(st.sampled_from((function, {"type": "function", "function": function})))


@st.composite
def messages(draw, text=PLAIN, lists=True, nones=True):
    """Messages of one to eight turns in any order of roles."""
    parts = st.lists(text | text.map(lambda t: {"type": "text", "text": t}), max_size=2)
    contents = text | parts if lists else text
    contents = contents | st.none() if nones else contents
    results = st.lists(text | text.map(lambda t: {"output": t}), min_size=1, max_size=3) | text if lists else text
    roles = ("system", "user", "assistant", "assistant", "tool")
    turns = []
    for role in draw(st.lists(st.sampled_from(roles), min_size=1, max_size=8)):
        turn = {"role": role, "content": draw(results if role == "tool" else contents)}
        if role == "assistant":
            turn |= draw(st.just({}) | text.map(lambda t: {"reasoning_content": t}))
            calls = draw(st.lists(st.tuples(NAMES, st.dictionaries(text, json_values(text), max_size=2)), max_size=2))
            if calls:
                turn["tool_calls"] = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
        turns.append(turn)
    return turns


@st.composite
def conversations(draw, text=PLAIN, **options):
    """Arguments of render: (messages, tools, keywords)."""
    turns = draw(messages(text, **options))
    flags = {name: draw(st.booleans()) for name in ("enable_thinking", "clear_thinking", "add_generation_prompt")}
    if turns[-1].get("tool_calls"):
        flags["add_generation_prompt"] = False
    return turns, draw(st.none() | st.lists(tools(text), max_size=2)), flags


def jinja_text(template, messages, tools, **flags) -> str:
    """What Transformers makes of the template: its environment, its tojson, its raise_exception."""
    return _compiled(template.jinja).render(messages=messages, tools=tools, **flags)


_CACHE = {}


def _compiled(source):
    if source not in _CACHE:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = lambda value, ensure_ascii=False: json.dumps(value, ensure_ascii=ensure_ascii)
        environment.globals["raise_exception"] = _raise
        _CACHE[source] = environment.from_string(source)
    return _CACHE[source]


def _raise(message):
    raise jinja2.exceptions.TemplateError(message)
