"""Training documents from conversations: token ids, and which of them the loss counts.

A record is a JSON object: ``messages`` and, if there are any, ``tools``, as ``ChatTemplate.render`` takes them;
``thinking``, one of ``MODES``; ``reasoning_effort``. A message with ``"loss": false`` stays in the context, and no token of
it is learnt: a wrong step that a later one corrects. Other keys are not read. How documents are stored, cut and packed is
not known here.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm5.data.chat import ChatError, ChatTemplate, Rendered, split_thought

# How a conversation thinks, as keywords of ChatTemplate.render.
MODES = {
    "interleaved": {"enable_thinking": True, "clear_thinking": True},  # thoughts live until the user's next message
    "preserved": {"enable_thinking": True, "clear_thinking": False},  # all thoughts stay
    "off": {"enable_thinking": False, "clear_thinking": True},  # no thoughts; those in the record are left out
}


@dataclass(frozen=True)
class ChatDocument:
    """What a model sees of a conversation. n = number of tokens."""

    ids: np.ndarray  # [n] int32
    mask: np.ndarray  # [n] uint8, 1 where the token is a target that the loss counts


def chat_documents(record: Mapping, template: ChatTemplate, thinking: str = "interleaved") -> list[ChatDocument]:
    """The documents of one conversation: one, unless a user's message makes the template rewrite what stands before it.

    Where thoughts are left out, turns before the last user message do not look as they did when they were sampled. Then each
    user message ends a document, in which only the turns after the user message before it are learnt: every sampled token
    is learnt once, after the very tokens that a server would have shown. A last turn gets the token that ends it.

    Args:
        record: the conversation.
        template: writes it.
        thinking: the mode, if the record says none.

    Raises:
        ChatError: the record is not of the form above, cannot be rendered, or has no token to learn.
    """
    messages, mode = _read_record(record, thinking)
    options = MODES[mode]
    if record.get("reasoning_effort") is not None and options["enable_thinking"]:
        options = options | {"reasoning_effort": record["reasoning_effort"]}
    if mode == "off":
        messages = [_without_thought(message) for message in messages]
    learnt = np.array([message.get("loss", True) for message in messages])

    documents: list[ChatDocument] = []
    begin = 0
    ends = _ends(messages) if _may_be_rewritten(messages, mode, template) else [len(messages)]
    for end in ends:
        rendered = template.render(messages[:end], record.get("tools"), **options)
        document = _document(rendered, learnt, begin, messages, end, template)
        if documents and _is_prefix(documents[-1].ids, document.ids):
            before = documents.pop()
            document.mask[: len(before.mask)] |= before.mask
        documents.append(document)
        begin = end
    documents = [document for document in documents if document.mask.any()]
    if not documents:
        raise ChatError("the conversation has no token to learn: no assistant's turn, or none without loss = false")
    return documents


def read_conversations(path: Path | str, template: ChatTemplate, thinking: str = "interleaved") -> Iterator[ChatDocument]:
    """The documents of a file with one record a line, in its order; empty lines are passed over.

    Raises:
        ChatError: a line is not JSON or not a conversation, or there is none; the message says which.
        OSError: the file cannot be read.
    """
    path, empty = Path(path), True
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                empty = False
                try:
                    yield from chat_documents(parse_record(line), template, thinking)
                except ValueError as error:
                    raise ChatError(f"{path}, line {number}: {error}") from None
    if empty:
        raise ChatError(f"{path} has no conversation, want one JSON object a line")


def parse_record(line: str | bytes) -> Mapping:
    """One line of a file of conversations.

    Raises:
        ChatError: it is not a JSON object in UTF-8.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ChatError(f"not JSON: {error}") from None
    if not isinstance(record, Mapping):
        raise ChatError(f"it is a JSON {type(record).__name__}, want an object with messages")
    return record


def mode_of(name: str, weights: Mapping[str, float]) -> str:
    """The thinking mode of the conversation called `name`, where `weights` says what share has which: a hash of its name.

    Raises:
        ValueError: an unknown mode, a negative weight, or none above zero.
    """
    if unknown := [mode for mode in weights if mode not in MODES]:
        raise ValueError(f"thinking mode {unknown[0]!r}, want one of {', '.join(MODES)}")
    total = sum(weights.values())
    if not total > 0 or min(weights.values()) < 0:
        raise ValueError(f"the weights of thinking modes are {dict(weights)}, want none below zero and one above")
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") / 2**64 * total
    chosen = None
    for mode in MODES:
        if weights.get(mode, 0) > 0:
            chosen = mode
            place -= weights[mode]
            if place < 0:
                break
    return chosen


def _read_record(record: Mapping, thinking: str) -> tuple[list[Mapping], str]:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ChatError("messages is missing or no list, want the conversation's messages")
    for i, message in enumerate(messages):
        if isinstance(message, Mapping) and not isinstance(message.get("loss", True), bool):
            raise ChatError(f"messages[{i}].loss is {message['loss']!r}, want true or false")
        if not isinstance(message, Mapping):
            raise ChatError(f"messages[{i}] is {type(message).__name__}, want a mapping with role and content")
    mode = record.get("thinking", thinking)
    if not isinstance(mode, str) or mode not in MODES:
        raise ChatError(f"thinking is {mode!r}, want one of {', '.join(MODES)}")
    return messages, mode


def _without_thought(message: Mapping) -> Mapping:
    if message.get("role") != "assistant":
        return message
    content = message.get("content")
    if message.get("reasoning_content") is None and isinstance(content, str):
        content = split_thought(content)[1]
    return {**message, "content": content, "reasoning_content": ""}


def _may_be_rewritten(messages: list[Mapping], mode: str, template: ChatTemplate) -> bool:
    """Whether a later user message may change how the template writes a turn. Rendering each time would find out too."""
    if mode == "interleaved":
        return True
    turns = (message for message in messages if message.get("role") == "assistant")
    empty = mode == "preserved" and not all(turn.get("reasoning_content") for turn in turns)
    return empty and template.format.empty_thoughts != "never"


def _ends(messages: list[Mapping]) -> Iterable[int]:
    """Before which messages a document may end: a user's that comes after an assistant's turn, and the end."""
    has_turn = False
    for i, message in enumerate(messages):
        if message.get("role") == "user" and has_turn:
            yield i
            has_turn = False
        has_turn = has_turn or message.get("role") == "assistant"
    yield len(messages)


def _document(rendered: Rendered, learnt, begin: int, messages, end: int, template: ChatTemplate) -> ChatDocument:
    """The first `end` messages, of which those from `begin` on are learnt."""
    ids, mask = rendered.ids, rendered.sampled & (rendered.messages >= begin) & learnt[rendered.messages]
    last = messages[end - 1]
    if last.get("role") == "assistant":
        stop = template.tokenizer.special_ids["<|user|>"] if end < len(messages) else template.stop_id(last)
        ids = np.append(ids, np.int32(stop))
        mask = np.append(mask, learnt[end - 1])
    return ChatDocument(ids, mask.astype(np.uint8))


def _is_prefix(short: np.ndarray, long: np.ndarray) -> bool:
    return len(short) <= len(long) and bool((long[: len(short)] == short).all())
