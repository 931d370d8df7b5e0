"""Conversations as token ids, in the chat formats of GLM-5, GLM-5.1 and GLM-5.2.

``ChatTemplate.render`` writes messages, ``parse`` and ``parse_completion`` (glm5.data.chat_parser) read ids back. Only the
template writes special tokens: text of a message that spells one stays text. The grammar, and how the versions differ, is in
docs/chat-template.md; the same as a Jinja template is chat_template.jinja, which ``save`` puts beside a model.
How a conversation becomes a training document is ``glm5.data.conversations``'s.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np

from glm5._files import write_atomically
from glm5.data.tokenizer import ByteTokenizer, Tokenizer


class ChatError(ValueError):
    """A conversation that the format cannot say, or ids that are not of the format; the message names the place."""


@dataclass(frozen=True)
class Format:
    """What differs between versions of the chat format."""

    # An assistant turn without a thought: "</think>" (never), "<think></think>" after the last user message while thinking
    # is on (current), or "<think></think>" everywhere (always).
    empty_thoughts: str
    # A tool's specification is what lies under "function", without "strict" and "defer_loading".
    unwraps_tools: bool
    # A first system turn says "Reasoning Effort: Max" or "High" while thinking is on.
    states_effort: bool
    strips_reasoning: bool


FORMATS = {
    "glm-5": Format(empty_thoughts="never", unwraps_tools=False, states_effort=False, strips_reasoning=True),
    "glm-5.1": Format(empty_thoughts="current", unwraps_tools=True, states_effort=False, strips_reasoning=True),
    "glm-5.2": Format(empty_thoughts="always", unwraps_tools=True, states_effort=True, strips_reasoning=False),
}
EFFORTS = ("max", "high")
ROLES = ("system", "user", "assistant", "tool")

TOOLS_BEGIN = (
    "\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
TOOLS_END = "</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
# What follows TOOLS_END: special tokens, and text between them.
CALL_EXAMPLE = (
    *("<tool_call>", "{function-name}"),
    *("<arg_key>", "{arg-key-1}", "</arg_key>", "<arg_value>", "{arg-value-1}", "</arg_value>"),
    *("<arg_key>", "{arg-key-2}", "</arg_key>", "<arg_value>", "{arg-value-2}", "</arg_value>"),
    *("...", "</tool_call>"),
)


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model sees it. n = number of tokens."""

    text: str
    ids: np.ndarray  # [n] int32
    roles: list[str]  # [n] "system", "user", "assistant", "tool", or "template" for what belongs to no message
    messages: np.ndarray  # [n] int32, the message a token belongs to, -1 for none
    sampled: np.ndarray  # [n] bool, True: a model writes it, False: it is given


@dataclass
class _Writer:
    tokenizer: Tokenizer
    texts: list[str] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    messages: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)

    def special(self, name: str, role: str, message: int, sampled: bool = False) -> None:
        self._add(name, np.array([self.tokenizer.special_ids[name]], np.int32), role, message, sampled)

    def text(self, text: str, role: str, message: int, sampled: bool = False) -> None:
        if text:
            self._add(text, self.tokenizer.encode(text), role, message, sampled)

    def _add(self, text, ids, role, message, sampled) -> None:
        self.texts.append(text)
        self.ids.append(ids)
        self.roles += [role] * len(ids)
        self.messages += [message] * len(ids)
        self.sampled += [sampled] * len(ids)

    def rendered(self) -> Rendered:
        messages, sampled = np.array(self.messages, np.int32), np.array(self.sampled, bool)
        return Rendered("".join(self.texts), np.concatenate(self.ids), self.roles, messages, sampled)


class ChatTemplate:
    """The chat format `version` over the ids of `tokenizer`, bytes by default.

    >>> template = ChatTemplate("glm-5")
    >>> template.render([{"role": "user", "content": "hi"}], add_generation_prompt=True).text
    '[gMASK]<sop><|user|>hi<|assistant|><think>'

    Raises:
        ValueError: an unknown version.
    """

    def __init__(self, version: str = "glm-5", tokenizer: Tokenizer | None = None):
        if version not in FORMATS:
            raise ValueError(f"ChatTemplate: version is {version!r}, want one of {', '.join(FORMATS)}")
        self.version, self.format = version, FORMATS[version]
        self.tokenizer = tokenizer or ByteTokenizer()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end what a model samples: end of text, the user's turn, a tool's result."""
        return tuple(self.tokenizer.special_ids[name] for name in ("<|endoftext|>", "<|user|>", "<|observation|>"))

    def stop_id(self, message: Mapping) -> int:
        """The token that ends the assistant's turn `message`: a tool's result comes next, or the user."""
        return self.tokenizer.special_ids["<|observation|>" if message.get("tool_calls") else "<|user|>"]

    @property
    def jinja(self) -> str:
        """The format as a Jinja template for Transformers' ``apply_chat_template``.

        It gives ``render``'s text for the same arguments, if a tool call's arguments are a mapping. Transformers then takes
        markers within messages for special tokens, which ``render`` does not.
        """
        source = files("glm5.data").joinpath("chat_template.jinja").read_text()
        return f"{{%- set version = '{self.version}' -%}}\n{source}"

    def save(self, folder: Path | str) -> None:
        """Writes ``jinja`` as chat_template.jinja into `folder`, where Transformers looks for a model's chat template."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(folder) / "chat_template.jinja", self.jinja)

    def render(
        self,
        messages: Sequence[Mapping],
        tools: Sequence[Mapping] | None = None,
        *,
        add_generation_prompt: bool = False,
        enable_thinking: bool = True,
        clear_thinking: bool = True,
        reasoning_effort: str | None = None,
    ) -> Rendered:
        """Writes a conversation.

        Args:
            messages: OpenAI's form: role ("system", "user", "assistant" or "tool"), content (text, a list of text parts or
                None, which is ""; of a tool also a list of results), and of an assistant reasoning_content and tool_calls,
                whose arguments are a mapping or a JSON object as text. Other keys are not read.
            tools: specifications, as JSON objects, that a first system turn lists.
            add_generation_prompt: end in what an assistant's turn begins with.
            enable_thinking: that turn begins with a thought. Turn-level thinking: it changes no earlier message.
            clear_thinking: thoughts before the last user message are left out; False preserves them.
            reasoning_effort: "max" (the default) or "high", of glm-5.2.

        Raises:
            ChatError: no messages, an unknown role, content that is no text, a tool call without a name or with arguments
                that are no JSON object, or a generation prompt after a tool call that has no result.
        """
        effort = self._effort(reasoning_effort)
        if not messages:
            raise ChatError("messages is empty, want at least one")
        messages = [_read_message(m, f"messages[{i}]") for i, m in enumerate(messages)]
        if add_generation_prompt and messages[-1].calls:
            raise ChatError(
                f"messages[{len(messages) - 1}] ends in a tool call: want its result before the assistant's next turn"
            )
        last_user = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1)

        writer = _Writer(self.tokenizer)
        writer.special("[gMASK]", "template", -1)
        writer.special("<sop>", "template", -1)
        if self.format.states_effort and enable_thinking:
            writer.special("<|system|>", "template", -1)
            writer.text(f"Reasoning Effort: {effort.capitalize()}", "template", -1)
        self._write_tools(writer, tools)

        for i, message in enumerate(messages):
            before = messages[i - 1].role if i else None
            if message.role == "assistant":
                self._write_assistant(writer, message, i, i > last_user, enable_thinking, clear_thinking)
            elif message.role == "tool":
                self._write_results(writer, message, i, before)
            else:
                self._write_turn(writer, f"<|{message.role}|>", i, message.role, before)
                writer.text(message.content, message.role, i)

        if add_generation_prompt:
            writer.special("<|assistant|>", "template", -1)
            if enable_thinking or self.format.empty_thoughts == "always":
                writer.special("<think>", "template", -1)
            if not enable_thinking:
                writer.special("</think>", "template", -1)
        return writer.rendered()

    def _effort(self, effort: str | None) -> str:
        if effort is None:
            return EFFORTS[0]
        if not self.format.states_effort:
            raise ChatError(f"reasoning_effort is {effort!r}, want none: {self.version} has no such line")
        if effort not in EFFORTS:
            raise ChatError(f"reasoning_effort is {effort!r}, want {' or '.join(EFFORTS)}")
        return effort

    def _write_tools(self, writer: _Writer, tools) -> None:
        if not tools:
            return
        writer.special("<|system|>", "template", -1)
        lines = "".join(self.tool_line(tool, f"tools[{i}]") + "\n" for i, tool in enumerate(tools))
        writer.text(TOOLS_BEGIN + lines + TOOLS_END, "template", -1)
        for item in CALL_EXAMPLE:
            (writer.special if item in self.tokenizer.special_ids else writer.text)(item, "template", -1)

    def tool_line(self, tool: Mapping, where: str = "tool") -> str:
        """A tool's specification as it stands between ``<tools>`` and ``</tools>``."""
        if not isinstance(tool, Mapping):
            raise ChatError(f"{where} is {type(tool).__name__}, want a JSON object")
        if self.format.unwraps_tools:
            tool = tool.get("function", tool)
            if not isinstance(tool, Mapping):
                raise ChatError(f"{where}.function is {type(tool).__name__}, want a JSON object")
            tool = {k: v for k, v in tool.items() if k not in ("strict", "defer_loading")}
        return to_json(dict(tool), where)

    def _write_turn(self, writer: _Writer, name: str, i: int, role: str, before: str | None) -> None:
        """A turn's first token. After an assistant's turn it is what the model stopped with, if it can stop with it."""
        if before == "assistant" and name != "<|system|>":
            writer.special(name, "assistant", i - 1, sampled=True)
        else:
            writer.special(name, role, i)

    def _write_assistant(self, writer, message, i: int, current: bool, enable_thinking: bool, clear_thinking: bool) -> None:
        writer.special("<|assistant|>", "assistant", i)
        empty = self.format.empty_thoughts
        if message.reasoning and (current or not clear_thinking):
            writer.special("<think>", "assistant", i)
            reasoning = message.reasoning.strip() if self.format.strips_reasoning else message.reasoning
            writer.text(reasoning, "assistant", i, sampled=True)
            writer.special("</think>", "assistant", i, sampled=True)
        elif empty == "always" or (empty == "current" and current and enable_thinking):
            writer.special("<think>", "assistant", i)
            writer.special("</think>", "assistant", i, sampled=current and enable_thinking)
        else:
            writer.special("</think>", "assistant", i)
        writer.text(message.content.strip(), "assistant", i, sampled=True)
        for call in message.calls:
            writer.special("<tool_call>", "assistant", i, sampled=True)
            writer.text(call.name, "assistant", i, sampled=True)
            for key, value in call.arguments:
                for begin, text, end in (("<arg_key>", key, "</arg_key>"), ("<arg_value>", value, "</arg_value>")):
                    writer.special(begin, "assistant", i, sampled=True)
                    writer.text(text, "assistant", i, sampled=True)
                    writer.special(end, "assistant", i, sampled=True)
            writer.special("</tool_call>", "assistant", i, sampled=True)

    def _write_results(self, writer: _Writer, message, i: int, before: str | None) -> None:
        if before != "tool" or message.is_list:
            self._write_turn(writer, "<|observation|>", i, "tool", before)
        for result in message.results:
            writer.special("<tool_response>", "tool", i)
            writer.text(result, "tool", i)
            writer.special("</tool_response>", "tool", i)

    def parse(self, ids, tools: Sequence[Mapping] | None = None):
        """Reads a whole conversation back; see ``glm5.data.chat_parser.parse``."""
        from glm5.data.chat_parser import parse

        return parse(self, ids, tools)

    def parse_completion(self, ids, tools: Sequence[Mapping] | None = None, enable_thinking: bool = True):
        """Reads what a model sampled after a generation prompt; see ``glm5.data.chat_parser.parse_completion``."""
        from glm5.data.chat_parser import parse_completion

        return parse_completion(self, ids, tools, enable_thinking)


# ---- messages as they are given ----


@dataclass(frozen=True)
class _Call:
    name: str
    arguments: list[tuple[str, str]]  # key, and value as it is written


@dataclass(frozen=True)
class _Message:
    role: str
    content: str = ""
    reasoning: str = ""
    calls: tuple[_Call, ...] = ()
    results: tuple[str, ...] = ()
    is_list: bool = False  # results were given as a list


def _read_message(message, where: str) -> _Message:
    if not isinstance(message, Mapping):
        raise ChatError(f"{where} is {type(message).__name__}, want a mapping with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise ChatError(f"{where}.role is {role!r}, want one of {', '.join(ROLES)}")
    content, calls = message.get("content"), message.get("tool_calls")
    if calls and role != "assistant":
        raise ChatError(f"{where} has role {role!r} and tool_calls, which only an assistant makes")
    if role == "tool":
        is_list = isinstance(content, list)
        return _Message(role, results=_read_results(content, f"{where}.content"), is_list=is_list)
    content = _read_text(content, f"{where}.content")
    if role != "assistant":
        return _Message(role, content)
    reasoning = message.get("reasoning_content")
    if reasoning is None:
        reasoning, content = split_thought(content)
    elif not isinstance(reasoning, str):
        raise ChatError(f"{where}.reasoning_content is {type(reasoning).__name__}, want text")
    calls = tuple(_read_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls or ()))
    return _Message(role, content, reasoning, calls)


def split_thought(content: str) -> tuple[str, str]:
    """(thought, answer) of content that holds both: what stands before the first ``</think>``, and what follows it."""
    if "</think>" not in content:
        return "", content
    before, after = content.split("</think>", 1)
    return before.rstrip("\n").split("<think>")[-1].lstrip("\n"), after.lstrip("\n")


def _read_text(content, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ChatError(f"{where} is {type(content).__name__}, want text, a list of text parts or None")
    return "".join(_read_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _read_part(part, where: str) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        kind = repr(part.get("type")) if isinstance(part, Mapping) else type(part).__name__
        raise ChatError(f"{where} is of type {kind}, want text: the format has no other parts")
    return text


def _read_results(content, where: str) -> tuple[str, ...]:
    """A tool's results: one for text, one for each item of a list."""
    if not isinstance(content, list):
        return (_read_text(content, where),)
    if not content:
        raise ChatError(f"{where} is an empty list, want at least one result")
    results = []
    for i, item in enumerate(content):
        output = item.get("output") if isinstance(item, Mapping) else None
        results.append(output if isinstance(output, str) else _read_part(item, f"{where}[{i}]"))
    return tuple(results)


def _read_call(call, where: str) -> _Call:
    function = (call.get("function") or call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ChatError(f"{where} is not a mapping with a function's name and arguments")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name or name != name.strip():
        raise ChatError(f"{where}: the name is {name!r}, want text without spaces around it")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise ChatError(f"{where}: the arguments of {name} are not JSON: {error}") from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise ChatError(f"{where}: the arguments of {name} are no JSON object")
    written = [
        (key, value if isinstance(value, str) else to_json(value, f"{where}: {name}'s {key}"))
        for key, value in arguments.items()
    ]
    return _Call(name, written)


def to_json(value, where: str) -> str:
    """JSON as the format writes it: letters of any script as they are, ", " and ": " between items."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ChatError(f"{where} cannot be written as JSON: {error}") from None
