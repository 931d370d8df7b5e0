"""Messages and tool calls from token ids, the other way of ``ChatTemplate.render``.

Works on ids, so only special tokens are markers, never text that looks like one. ``parse_completion`` takes anything a model
may sample and says of every tool call what became of it; ``parse`` wants a conversation of the format and gives back what
renders to the same ids.
"""

import enum
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from glm5.data.chat import CALL_EXAMPLE, EFFORTS, TOOLS_BEGIN, TOOLS_END, ChatError, ChatTemplate
from glm5.data.tokenizer import SPECIAL_TOKENS

# A thought that is there and empty, where it will be stripped: "" would be no thought, which is written otherwise.
EMPTY_THOUGHT = "\n"


class CallStatus(str, enum.Enum):
    """What became of a tool call. The first that applies, in this order."""

    UNCLOSED_BLOCK = "unclosed_block"  # the ids end, or the turn, before </tool_call>
    MISSING_NAME = "missing_name"
    UNKNOWN_TOOL = "unknown_tool"  # tools were given, and it is none of them
    MALFORMED_STRUCTURE = "malformed_structure"  # keys and values out of order, text between them, or a key twice
    INVALID_JSON = "invalid_json"  # a value that is no string by its tool's schema, and no JSON; it is kept as text
    OK = "ok"


@dataclass(frozen=True)
class ParsedCall:
    """A tool call as a model wrote it."""

    name: str | None
    arguments: dict
    status: CallStatus
    text: str  # between <tool_call> and </tool_call>, markers spelled out
    span: tuple[int, int]  # its ids, markers included: from, to

    @property
    def message(self) -> dict:
        """The call in a message's tool_calls."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


_SAYABLE = (CallStatus.OK, CallStatus.UNKNOWN_TOOL, CallStatus.INVALID_JSON)


@dataclass(frozen=True)
class Completion:
    """An assistant's turn as a model sampled it."""

    # role, content, reasoning_content and, if there are any whose name and structure are right, tool_calls.
    message: dict
    calls: tuple[ParsedCall, ...]  # all
    stop: str | None  # the special token that ended it, or None: it was cut short
    num_ids: int  # of the turn, the stop token included; what a model wrote after it is not read
    thought_closed: bool  # False: it ends within its thought


@dataclass(frozen=True)
class Conversation:
    """A whole conversation. ``template.render(c.messages, c.tools, **c.options)`` has the ids it was read from."""

    messages: list[dict]
    tools: list[dict] | None
    options: dict  # render's keywords
    calls: tuple[ParsedCall, ...]


def parse_completion(
    template: ChatTemplate, ids, tools: Sequence[Mapping] | None = None, enable_thinking: bool = True
) -> Completion:
    """Reads what a model sampled after a generation prompt. Any ids will do.

    The first of ``<|endoftext|>``, ``<|user|>`` and ``<|observation|>`` ends the turn. With `enable_thinking` the ids begin
    within a thought; without, ``<think>`` and ``</think>`` are text. A tool call ends a thought that was not closed, and
    text after a call belongs to the content. Special tokens that mean nothing where they stand are spelled out.

    Args:
        template: says what the ids mean.
        ids: integers.
        tools: specifications of the tools there are: other names get UNKNOWN_TOOL, and arguments the types they declare.
            Without it a value is JSON if writing it again gives the same text, else a string.
        enable_thinking: what the generation prompt was made with.
    """
    reader = _Reader(template, ids, tools)
    end = next((i for i, name in enumerate(reader.names) if name in _STOPS), len(reader.ids))
    turn = reader.assistant(0, end, "reasoning" if enable_thinking else "content", markers=enable_thinking)
    stop = reader.names[end] if end < len(reader.ids) else None
    return Completion(turn.message(turn.reasoning or ""), turn.calls, stop, min(end + 1, len(reader.ids)), turn.closed)


def parse(template: ChatTemplate, ids, tools: Sequence[Mapping] | None = None) -> Conversation:
    """Reads a conversation that ``template.render`` wrote, or that a model went on with.

    Thoughts that were left out stay out. What a text says twice (an assistant's turn without any token at the very end, or a
    generation prompt; a turn "Reasoning Effort: Max", or the line) is read so that the ids come back.

    Args:
        template: says what the ids mean.
        ids: integers.
        tools: specifications to judge calls by; those within the ids are read, but not used for that.

    Raises:
        ChatError: the ids are not of the format; the message names the place.
    """
    return _Reader(template, ids, tools).conversation()


_STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")
_TURNS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_ARGUMENT = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")


@dataclass(frozen=True)
class _Turn:
    reasoning: str | None  # None: no thought
    content: str
    calls: tuple[ParsedCall, ...]
    closed: bool

    def message(self, reasoning: str) -> dict:
        message = {"role": "assistant", "content": self.content, "reasoning_content": reasoning}
        calls = [call.message for call in self.calls if call.status in _SAYABLE]
        return message | ({"tool_calls": calls} if calls else {})


class _Reader:
    """Ids, and beside each the name of the special token it is, or None."""

    def __init__(self, template: ChatTemplate, ids, tools):
        self.template, self.tokenizer = template, template.tokenizer
        self.ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        if len(self.ids) and self.ids.min() < 0:
            raise ChatError(f"id {self.ids.min()} is negative")
        base = self.tokenizer.base
        self.names = [None] * len(self.ids)
        for i in np.flatnonzero((self.ids >= base) & (self.ids < base + len(SPECIAL_TOKENS))).tolist():
            self.names[i] = SPECIAL_TOKENS[self.ids[i] - base]
        self.schemas = None if tools is None else _schemas(tools)

    def text(self, begin: int, end: int) -> str:
        """The text of ids begin to end, special tokens spelled out."""
        return self.tokenizer.decode(self.ids[begin:end].tolist(), skip_special=False)

    def plain(self, begin: int, end: int, what: str) -> str:
        """The text of ids begin to end, which must have no special token."""
        for i in range(begin, end):
            if self.names[i] is not None:
                raise ChatError(f"id {i} is {self.names[i]}, within {what}")
        return self.text(begin, end)

    # ---- an assistant's turn ----

    def assistant(self, begin: int, end: int, state: str, markers: bool = True) -> _Turn:
        """A turn's ids from `begin` to `end`. `state` is "reasoning" or "content"."""
        reasoning, content, calls = [] if state == "reasoning" else None, [], []
        at = begin
        while at < end:
            name = self.names[at]
            if name == "<tool_call>":
                call, at = self.call(at, end)
                calls.append(call)
                state = "content"
                continue
            if markers and name == "<think>":
                state, reasoning = "reasoning", reasoning or []
            elif markers and name == "</think>":
                state = "content"
            else:
                upto = at + 1
                while upto < end and self.names[upto] is None:
                    upto += 1
                (reasoning if state == "reasoning" else content).append(self.text(at, upto))
                at = upto
                continue
            at += 1
        thought = None if reasoning is None else "".join(reasoning)
        return _Turn(thought, "".join(content), tuple(calls), state != "reasoning")

    def call(self, begin: int, end: int) -> tuple[ParsedCall, int]:
        """The call whose ``<tool_call>`` is at `begin`, and where what follows it begins."""
        close = next((i for i in range(begin + 1, end) if self.names[i] == "</tool_call>"), None)
        if close is None:
            return ParsedCall(None, {}, CallStatus.UNCLOSED_BLOCK, self.text(begin + 1, end), (begin, end)), end
        first = next((i for i in range(begin + 1, close) if self.names[i] in _ARGUMENT), close)
        name = self.text(begin + 1, first).strip()
        arguments, whole, valid = self._arguments(first, close, (self.schemas or {}).get(name, {}))
        if not name:
            status = CallStatus.MISSING_NAME
        elif self.schemas is not None and name not in self.schemas:
            status = CallStatus.UNKNOWN_TOOL
        elif not whole:
            status = CallStatus.MALFORMED_STRUCTURE
        else:
            status = CallStatus.OK if valid else CallStatus.INVALID_JSON
        return ParsedCall(name or None, arguments, status, self.text(begin + 1, close), (begin, close + 1)), close + 1

    def _arguments(self, begin: int, end: int, schemas: dict) -> tuple[dict, bool, bool]:
        """(arguments, whether keys and values take turns, whether all values are what their schema says)."""
        arguments, whole, valid, at = {}, True, True, begin
        while at < end:
            marks = list(itertools.islice((i for i in range(at, end) if self.names[i] is not None), 4))
            if not marks and not self._says(at, end):
                break
            if [self.names[i] for i in marks] != list(_ARGUMENT):
                return arguments, False, valid
            key, text = self.text(marks[0] + 1, marks[1]), self.text(marks[2] + 1, marks[3])
            between = self._says(at, marks[0]) or self._says(marks[1] + 1, marks[2])
            whole = whole and not between and key not in arguments
            arguments[key], is_valid = _value(text, schemas.get(key))
            valid = valid and is_valid
            at = marks[3] + 1
        return arguments, whole, valid

    def _says(self, begin: int, end: int) -> bool:
        return bool(self.text(begin, end).strip())

    # ---- a conversation ----

    def conversation(self) -> Conversation:
        if self.names[:2] != ["[gMASK]", "<sop>"]:
            raise ChatError("the ids do not begin with [gMASK] <sop>")
        turns = [i for i, name in enumerate(self.names) if name in _TURNS]
        if len(self.ids) > 2 and (not turns or turns[0] != 2):
            raise ChatError(f"id 2 is {self.names[2] or 'text'}, want {', '.join(_TURNS)}")
        spans = list(itertools.pairwise([*turns, len(self.ids)]))

        effort, spans = self._effort(spans)
        tools, spans = self._tools(spans)
        thinking, spans = self._generation_prompt(spans, effort)
        prompt = thinking is not None

        messages, calls, lone = [], [], False
        for k, (begin, end) in enumerate(spans):
            name = self.names[begin]
            if name == "<|assistant|>":
                turn = self._assistant_turn(begin, end, k == len(spans) - 1 and not prompt)
                messages.append(turn.message(self._reasoning(turn)))
                calls += turn.calls
                lone = lone or turn.reasoning is None
            elif name == "<|observation|>":
                is_next = k > 0 and self.names[spans[k - 1][0]] == "<|observation|>"
                messages += self._results(begin, end, is_next)
            else:
                role = name[2:-2]
                messages.append({"role": role, "content": self.plain(begin + 1, end, f"a {role} turn")})
                lone = lone and role != "user"
        if not messages:
            raise ChatError("the ids have no message")
        if self.template.format.states_effort:
            thinking = effort is not None
        elif thinking is None or self.template.format.empty_thoughts == "current":
            thinking = (thinking is None or thinking) and not (lone and self.template.format.empty_thoughts == "current")
        options = {"add_generation_prompt": prompt, "enable_thinking": thinking, "clear_thinking": False}
        if effort is not None:
            options["reasoning_effort"] = effort
        return Conversation(messages, tools, options, tuple(calls))

    def _effort(self, spans) -> tuple[str | None, list]:
        """The line of glm-5.2 that says how much to think, if there is one and a conversation after it."""
        if self.template.format.states_effort and len(spans) > 1 and self.names[spans[0][0]] == "<|system|>":
            begin, end = spans[0]
            for effort in EFFORTS:
                if all(name is None for name in self.names[begin + 1 : end]) and (
                    self.text(begin + 1, end) == f"Reasoning Effort: {effort.capitalize()}"
                ):
                    return effort, spans[1:]
        return None, spans

    def _tools(self, spans) -> tuple[list[dict] | None, list]:
        """The tools that a first system turn lists. It has special tokens, which no message can have."""
        if not spans or self.names[spans[0][0]] != "<|system|>":
            return None, spans
        begin, end = spans[0]
        first = next((i for i in range(begin + 1, end) if self.names[i] is not None), None)
        if first is None:
            return None, spans
        text = self.text(begin + 1, first)
        if not (
            text.startswith(TOOLS_BEGIN) and text.endswith(TOOLS_END) and self.text(first, end) == "".join(CALL_EXAMPLE)
        ):
            raise ChatError(f"id {first} is {self.names[first]}, within a system turn that does not list tools")
        lines = text[len(TOOLS_BEGIN) : -len(TOOLS_END)].split("\n")[:-1]
        try:
            tools = [json.loads(line) for line in lines]
        except ValueError as error:
            raise ChatError(f"a tool's specification is not JSON: {error}") from None
        if self.template.format.unwraps_tools:
            tools = [{"type": "function", "function": tool} for tool in tools]
        return tools, spans[1:]

    def _generation_prompt(self, spans, effort) -> tuple[bool | None, list]:
        """Whether a generation prompt at the end asks for a thought; None if there is none."""
        if len(spans) < 2 or self.names[spans[-1][0]] != "<|assistant|>":
            return None, spans
        before = spans[-2]
        if self.names[before[0]] == "<|assistant|>" and self.names[before[1] - 1] == "</tool_call>":
            return None, spans  # a generation prompt does not follow a tool call
        body = self.names[spans[-1][0] + 1 : spans[-1][1]]
        if body == ["<think>"]:
            return True, spans[:-1]
        always = self.template.format.empty_thoughts == "always"
        if body == (["<think>", "</think>"] if always else ["</think>"]) and effort is None:
            return False, spans[:-1]
        return None, spans

    def _assistant_turn(self, begin: int, end: int, last: bool) -> _Turn:
        opening = self.names[begin + 1] if begin + 1 < end else None
        always = self.template.format.empty_thoughts == "always"
        if opening not in (("<think>",) if always else ("<think>", "</think>")):
            raise ChatError(f"id {begin + 1}: an assistant's turn does not begin as {self.template.version}'s do")
        if last and self.names[end - 1] == "<|endoftext|>":
            end -= 1
        return self.assistant(begin + 2, end, "reasoning" if opening == "<think>" else "content")

    def _reasoning(self, turn: _Turn) -> str:
        if turn.reasoning == "" and self.template.format.strips_reasoning:
            return EMPTY_THOUGHT
        return turn.reasoning or ""

    def _results(self, begin: int, end: int, as_list: bool) -> list[dict]:
        """The tool messages of one ``<|observation|>``: one a result, or a list if another observation stands before it."""
        results, at = [], begin + 1
        while at < end:
            close = next((i for i in range(at + 1, end) if self.names[i] == "</tool_response>"), None)
            if self.names[at] != "<tool_response>" or close is None:
                raise ChatError(f"id {at}: an observation is not made of <tool_response>...</tool_response>")
            results.append(self.plain(at + 1, close, "a tool's result"))
            at = close + 1
        if not results and end < len(self.ids):
            raise ChatError(f"id {begin} is <|observation|> without a result")
        if as_list and results:
            return [{"role": "tool", "content": results}]
        return [{"role": "tool", "content": result} for result in results]


# ---- values and their types ----


def _schemas(tools: Sequence[Mapping]) -> dict[str, dict]:
    """{tool: {argument: (its schema, the schema it stands in)}}."""
    schemas = {}
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ChatError(f"tools[{i}] has no name")
        parameters = function.get("parameters")
        parameters = parameters if isinstance(parameters, Mapping) else {}
        properties = parameters.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        schemas[function["name"]] = {key: (schema, parameters) for key, schema in properties.items()}
    return schemas


def _value(text: str, schema) -> tuple[object, bool]:
    """An argument's value, and False if its schema wants JSON and it is none."""
    types = _types(*schema) if schema else None
    if types == {"string"}:
        return text, True
    string_is_allowed = types is None or "string" in types
    try:
        value = json.loads(text)
    except ValueError:
        return text, string_is_allowed
    # What may be a string is one, unless it is a value of another type that is allowed, written as the format writes it.
    if string_is_allowed and not (_is_of(value, types) and json.dumps(value, ensure_ascii=False) == text):
        return text, True
    return value, True


_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}


def _is_of(value, types: set[str] | None) -> bool:
    """Whether `value` is of one of the types, a string apart."""
    if isinstance(value, str):
        return False
    kind = _JSON_TYPES[type(value)]
    return types is None or kind in types or "other" in types or (kind == "integer" and "number" in types)


def _types(schema, root: Mapping, depth: int = 0) -> set[str] | None:
    """The JSON types that a schema allows; None: any."""
    if not isinstance(schema, Mapping) or depth > 16:
        return None
    if isinstance(schema.get("$ref"), str):
        return _types(_resolve(schema["$ref"], root), root, depth + 1)
    declared = schema.get("type")
    if isinstance(declared, str):
        return {declared}
    if isinstance(declared, list):
        return {t for t in declared if isinstance(t, str)}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            branches = [_types(branch, root, depth + 1) for branch in schema[key]]
            return None if None in branches else set().union(*branches)
    if isinstance(schema.get("allOf"), list):
        branches = [t for t in (_types(branch, root, depth + 1) for branch in schema["allOf"]) if t is not None]
        return set.intersection(*branches) if branches else None
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return {"string" if isinstance(value, str) else "other" for value in values}
    return None


def _resolve(reference: str, root: Mapping):
    """What ``#/a/b`` names within `root`."""
    node = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
