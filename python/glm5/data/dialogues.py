"""Made-up conversations that a model of a few million parameters can learn: for SFT where there is no network.

Every conversation is a function of (seed, number): a user asks for small things done to words and numbers; the assistant
thinks, calls a tool for sums, and sometimes takes a wrong step first, which stays in the conversation but is not learnt.
How a conversation becomes tokens, and which thoughts stay in it, is ``conversations.py``'s business.
"""

import json
from collections.abc import Iterator

import numpy as np

from glm5.data.random import STREAM_DIALOGUES, generator

_SYLLABLES = ("ba", "do", "fi", "ga", "ko", "lu", "mi", "no", "pe", "ra", "si", "tu", "ve", "wo", "za")
_GREETINGS = (("Hello!", "Hello! What can I do?"), ("Hi", "Hello! What can I do?"), ("Good morning", "Good morning!"))
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


def dialogues(seed: int, count: int) -> Iterator[dict]:
    """`count` records as ``conversations.chat_documents`` takes them; number i of a seed is always the same."""
    for number in range(count):
        yield dialogue(seed, number)


def dialogue(seed: int, number: int) -> dict:
    """Conversation `number`: one to three requests and their answers, with a thought before each."""
    draw = generator(seed, STREAM_DIALOGUES, number)
    messages: list[dict] = []
    uses_tool = False
    for _ in range(int(draw.integers(1, 4))):
        ask = _REQUESTS[draw.integers(len(_REQUESTS))]
        uses_tool |= ask is _sum
        messages += ask(draw)
    return {"messages": messages} | ({"tools": [ADD]} if uses_tool else {})


def _word(draw: np.random.Generator) -> str:
    return "".join(_SYLLABLES[i] for i in draw.integers(len(_SYLLABLES), size=draw.integers(2, 4)))


def _turn(answer: str, thought: str) -> dict:
    return {"role": "assistant", "content": answer, "reasoning_content": thought}


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _greeting(draw) -> list[dict]:
    text, answer = _GREETINGS[draw.integers(len(_GREETINGS))]
    return [_user(text), _turn(answer, "A greeting.")]


def _repeat(draw) -> list[dict]:
    word = _word(draw)
    return [_user(f"Say {word}"), _turn(word, f"The word is {word}.")]


def _upper(draw) -> list[dict]:
    word = _word(draw)
    return [_user(f"Write {word} in capitals"), _turn(word.upper(), f"The word is {word}.")]


def _letters(draw) -> list[dict]:
    """The first answer is wrong in one conversation out of three: it is context, not an example."""
    word = _word(draw)
    wrong = [_turn(str(len(word) + 1), ""), _user("Count again")] if draw.integers(3) == 0 else []
    for message in wrong[:1]:
        message["loss"] = False
    thought = ", ".join(f"{letter} {i}" for i, letter in enumerate(word, 1))
    return [_user(f"How many letters has {word}?"), *wrong, _turn(str(len(word)), thought)]


def _sum(draw) -> list[dict]:
    """By a tool. In one conversation out of three the first call lacks a number and the tool complains."""
    a, b = map(int, draw.integers(10, 100, size=2))

    def call(arguments: dict, **more) -> dict:
        function = {"name": "add", "arguments": arguments}
        turn = _turn("", f"I add {a} and {b}.") | {"tool_calls": [{"type": "function", "function": function}]}
        return turn | more

    wrong = []
    if draw.integers(3) == 0:
        wrong = [call({"a": a}, loss=False), {"role": "tool", "content": json.dumps({"error": "b is missing"})}]
    result = {"role": "tool", "content": str(a + b)}
    return [_user(f"What is {a} + {b}?"), *wrong, call({"a": a, "b": b}), result, _turn(str(a + b), f"It is {a + b}.")]


_REQUESTS = (_greeting, _repeat, _upper, _letters, _sum)
