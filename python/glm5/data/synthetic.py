"""Long-range tasks made up from nothing: needles, variable tracking, word counts, co-reference over many rounds.

The tasks are RULER's (2404.06654) and MRCR's in a terse wording, so that short contexts hold them and byte-level models can
learn them. An item is a pure function of its arguments: no list of items is kept anywhere. Values, keys and replies are
random letters. How a model answers and how answers are scored is ``glm5.eval.longctx``'s business.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from zlib import crc32

import numpy as np

from glm5.data.random import STREAM_SYNTHETIC, STREAM_SYNTHETIC_HELD_OUT
from glm5.data.tokenizer import Tokenizer

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Shape:
    """How much an item hides and asks. Raises ValueError for a number out of range."""

    needles: int = 8  # keys in a haystack, but for niah-single
    values: int = 3  # niah-multivalue: values of the key that is asked
    queries: int = 3  # niah-multiquery: keys that are asked at once
    questions: int = 1  # needles: questions at the end of an item, each with its answer
    hops: int = 3  # variable-tracking: variables in a chain
    chains: int = 2  # variable-tracking: chains, of which one is asked
    words: int = 3  # common-words, frequent-words: how many are asked
    requests: int = 4  # coreference: how often the same is requested
    key_length: int = 2  # letters
    value_length: int = 2  # letters: with two, a guess is right once in 676 times

    def __post_init__(self):
        for field in fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise ValueError(f"{field.name} is {value}, want at least 1")
        if self.queries > self.needles:
            raise ValueError(f"queries is {self.queries}, want at most needles, {self.needles}")
        if self.questions > 1 and self.questions > self.needles:
            raise ValueError(f"questions is {self.questions}, want at most needles, {self.needles}")
        for name, wanted in (("key_length", self.needles + self.hops * self.chains), ("value_length", self._num_values())):
            if (letters := getattr(self, name)) < 12 and len(_LETTERS) ** letters < 4 * wanted:
                raise ValueError(f"{name} is {letters}, too few letters for {wanted} different ones")

    def _num_values(self) -> int:
        return self.needles + self.values + self.chains


@dataclass(frozen=True)
class Item:
    """One document of a task.

    Attributes:
        parts: (text, whether it is an answer), in order; the last part is the answer that is scored.
        references: what the answer must hold.
        match: "all" scores the share of the references that are found, "part" whether any is.
    """

    task: str
    parts: tuple[tuple[str, bool], ...]
    references: tuple[str, ...]
    match: str = "all"

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts)

    @property
    def prompt(self) -> str:
        return "".join(text for text, _ in self.parts[:-1])

    @property
    def answer(self) -> str:
        return self.parts[-1][0]


# ---- what an item is written with ----


def _word_list() -> tuple[str, ...]:
    """512 pronounceable words, always the same."""
    rng = np.random.Generator(np.random.Philox(key=[0, STREAM_SYNTHETIC]))
    words: dict[str, None] = {}
    while len(words) < 512:
        syllables = rng.integers(2, 4)
        draws = zip(rng.integers(0, 14, syllables), rng.integers(0, 5, syllables), strict=True)
        words["".join("bdfgklmnprstvz"[c] + "aeiou"[v] for c, v in draws)] = None
    return tuple(words)


WORDS = _word_list()


class _Draws:
    """The random choices of one item."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def codes(self, count: int, length: int, fits: Callable[[str], bool] = lambda _: True) -> list[str]:
        """`count` different strings of `length` letters."""
        found: dict[str, None] = {}
        for _ in range(1000 * count):
            if len(found) == count:
                return list(found)
            code = "".join(_LETTERS[i] for i in self.rng.integers(0, 26, length))
            if fits(code):
                found[code] = None
        raise ValueError(f"no {count} strings of {length} letters are left that the haystack does not hold already")

    def sample(self, choices, count: int) -> list:
        return [choices[i] for i in self.rng.permutation(len(choices))[:count]]


class _Haystack:
    """Filler of any length: words of no meaning, or a piece of `text`."""

    def __init__(self, draws: _Draws, size: int, text: str | None):
        if text is None:
            self.units = [WORDS[i] + " " for i in draws.rng.integers(0, len(WORDS), size)]
        else:
            begin = int(draws.rng.integers(0, max(len(text) - 8 * size, 0) + 1))
            self.units = re.findall(r"\s*\S+\s", text[begin : begin + 8 * size])
            if not self.units:
                raise ValueError("the text of a haystack holds no word")
        self.text = "".join(self.units)

    def with_needles(self, num_units: int, needles: list[str], depths: np.ndarray) -> str:
        """The first units with each needle put in at its depth, 0 to 1; needles of ascending depth keep their order."""
        units = (self.units * (num_units // len(self.units) + 1))[:num_units]
        places = np.floor(depths * (num_units + 1)).astype(int)
        out, done = [], 0
        for place, needle in zip(places, needles, strict=True):
            out += [*units[done:place], needle]
            done = max(done, place)
        return "".join(out + units[done:])


# A task draws what it needs and gives (number of units -> parts of the item, references).
Made = tuple[Callable[[int], tuple[tuple[str, bool], ...]], tuple[str, ...]]


def _niah(keys: int, values: int, queries: int) -> Callable[[_Draws, Shape, int, str | None], Made]:
    """Needles `` key=value;`` in a haystack; -1 stands for the number of the shape."""

    def make(draws: _Draws, shape: Shape, size: int, text: str | None) -> Made:
        hay = _Haystack(draws, size, text)
        num_keys = keys if keys > 0 else shape.needles
        num_values = values if values > 0 else shape.values
        num_queries = queries if queries > 0 else shape.queries
        names = draws.codes(num_keys, shape.key_length, lambda key: f"{key}=" not in hay.text)
        drawn = draws.codes(num_keys + num_values - 1, shape.value_length, lambda value: value not in names)
        # The first key has `num_values`, the others one each: distractors.
        pairs = [(0, v) for v in range(num_values)] + [(k, num_values + k - 1) for k in range(1, num_keys)]
        depths = np.sort(draws.rng.random(len(pairs)))
        pairs = draws.sample(pairs, len(pairs))
        needles = [f" {names[k]}={drawn[v]}; " for k, v in pairs]

        def answers(key: int) -> str:
            return " ".join(drawn[v] for k, v in pairs if k == key)

        if num_queries > 1:
            rounds = [draws.sample(range(num_keys), num_queries) for _ in range(shape.questions)]
            asked = [(" ".join(names[k] for k in r) + ":", "".join(f" {names[k]}={answers(k)};" for k in r)) for r in rounds]
            references = [answers(k) for k in rounds[-1]]
        else:
            others = draws.sample(range(1, num_keys), min(shape.questions, num_keys) - 1)
            rounds = [[k] for k in (*others, 0)]
            asked = [(f"{names[k]}=", answers(k)) for (k,) in rounds]
            references = [drawn[v] for k, v in pairs if k == rounds[-1][0]]
        tail = [part for question, answer in asked for part in ((f"\n? {question}", False), (f"{answer}\n", True))]

        def parts(num_units: int):
            return _merged([(hay.with_needles(num_units, needles, depths), False), *tail])

        return parts, tuple(references)

    return make


def _merged(parts: list[tuple[str, bool]]) -> tuple[tuple[str, bool], ...]:
    """Neighbours that are both no answers become one."""
    out: list[tuple[str, bool]] = []
    for text, is_answer in parts:
        if out and not is_answer and not out[-1][1]:
            out[-1] = (out[-1][0] + text, False)
        else:
            out.append((text, is_answer))
    return tuple(out)


def _variable_tracking(draws: _Draws, shape: Shape, size: int, text: str | None) -> Made:
    """Chains `` set a = xy; `` .. `` set b = a; ``; all variables that hold the asked value, in order."""
    hay = _Haystack(draws, size, text)
    names = draws.codes(shape.chains * shape.hops, shape.key_length, lambda key: f"set {key} " not in hay.text)
    values = draws.codes(shape.chains, shape.value_length, lambda value: value not in names)
    statements, depths = [], []
    for chain, value in enumerate(values):
        mine = names[chain * shape.hops : (chain + 1) * shape.hops]
        held = [value, *mine[:-1]]
        statements += [f" set {name} = {what}; " for name, what in zip(mine, held, strict=True)]
        depths += sorted(draws.rng.random(shape.hops))
    order = np.argsort(depths, kind="stable")
    statements, depths = [statements[i] for i in order], np.array(depths)[order]
    asked = names[: shape.hops]
    tail = ((f"\n? which are {values[0]}: ", False), (" ".join(asked) + "\n", True))
    return lambda n: _merged([(hay.with_needles(n, statements, depths), False), *tail]), tuple(asked)


def _counted_words(counts: Callable[[int, Shape], list[int]], question: str, coded: bool):
    """A text of words in disorder, of which the most frequent are asked, the most frequent first."""

    def make(draws: _Draws, shape: Shape, size: int, text: str | None) -> Made:
        most = int(size**0.5) + shape.words + 2 if coded else len(WORDS)
        words = draws.codes(most, 4) if coded else draws.sample(WORDS, most)
        order = draws.rng.random(size + len(words) + 1)
        asked = words[: shape.words]

        def parts(num_units: int):
            numbers = counts(num_units, shape)[:most]
            listed = [word for word, number in zip(words, numbers, strict=False) for _ in range(number)]
            listed = [listed[i] for i in np.argsort(order[: len(listed)], kind="stable")]
            return (" ".join(listed) + f"\n? {question}: ", False), (" ".join(asked) + "\n", True)

        return parts, tuple(asked)

    return make


def _common_counts(num_units: int, shape: Shape) -> list[int]:
    """The asked words take a tenth of the text each, one occurrence apart; others come as seldom as there are words for."""
    asked = [num_units // 10 + 2 + shape.words - i for i in range(shape.words)]
    left, others = num_units, len(WORDS) - shape.words
    return asked + [left // others + (i < left % others) for i in range(others)]


def _frequent_counts(num_units: int, shape: Shape) -> list[int]:
    """Zipf's law of exponent 2, as in RULER, with no ties among those that are asked."""
    share = [1 / (i + 1) ** 2 for i in range(max(int(num_units**0.5), shape.words + 1))]
    numbers = [int(num_units * s / sum(share)) + 1 for s in share]
    for i in reversed(range(shape.words)):
        numbers[i] = max(numbers[i], numbers[i + 1] + 1)
    return numbers


_KINDS = ("poem", "song", "tale", "joke", "note", "riddle")
_TOPICS = ("tea", "rain", "owls", "trains", "salt", "stars", "moss", "clocks")


def _coreference(draws: _Draws, shape: Shape, size: int, text: str | None) -> Made:
    """A talk of many rounds with the same request several times; one of the replies to it is asked again (MRCR)."""
    pairs = draws.sample([(kind, topic) for kind in _KINDS for topic in _TOPICS], len(_KINDS) * len(_TOPICS))
    asked, others = pairs[0], pairs[1:]
    which = int(draws.rng.integers(0, shape.requests))
    rounds = size // 16 + shape.requests  # more than the budget holds
    replies = draws.codes(rounds, max(2 * shape.value_length, 4))
    drawn = draws.rng.integers(0, len(others), rounds)
    order = draws.rng.random(rounds)

    def parts(num_units: int):
        total = min(shape.requests + num_units, rounds)
        requests = [asked] * shape.requests + [others[i] for i in drawn[: total - shape.requests]]
        turns = [requests[i] for i in np.argsort(order[:total], kind="stable")]
        lines, met, answer = [], 0, ""
        for (kind, topic), reply in zip(turns, replies, strict=False):
            lines.append(f"u: {kind} on {topic}\na: {reply}\n")
            if (kind, topic) == asked:
                answer, met = (reply if met == which else answer), met + 1
        question = f"u: {asked[0]} {which + 1} on {asked[1]} again\na: "
        return ("".join(lines) + question, False), (answer + "\n", True)

    return parts, ()


TASKS: dict[str, Callable[[_Draws, Shape, int, str | None], Made]] = {
    "niah-single": _niah(keys=1, values=1, queries=1),
    "niah-multikey": _niah(keys=-1, values=1, queries=1),
    "niah-multivalue": _niah(keys=-1, values=-1, queries=1),
    "niah-multiquery": _niah(keys=-1, values=1, queries=-1),
    "variable-tracking": _variable_tracking,
    "common-words": _counted_words(_common_counts, "most common", coded=False),
    "frequent-words": _counted_words(_frequent_counts, "most frequent", coded=True),
    "coreference": _coreference,
}


def make_item(
    task: str,
    seed: int,
    index: int,
    length: int,
    tokenizer: Tokenizer,
    *,
    shape: Shape = Shape(),  # noqa: B008  (frozen)
    haystack: str | None = None,
    held_out: bool = False,
) -> Item:
    """Item number `index` of a task, whose whole document is as long as fits into `length` tokens.

    Args:
        length: tokens of ``tokenizer.encode_document(item.text)`` at most, special tokens included.
        haystack: text around needles and variables, of which a piece is used; None: words of no meaning.
        held_out: draws from a stream of its own: no held-out item is a training item.

    Raises:
        ValueError: no such task, or a length in which the item does not fit even without a haystack.
    """
    if task not in TASKS:
        raise ValueError(f"no task {task!r}; there are {', '.join(TASKS)}")
    stream = STREAM_SYNTHETIC_HELD_OUT if held_out else STREAM_SYNTHETIC
    philox = np.random.Philox(key=[seed, stream], counter=[0, crc32(task.encode()), index, length])
    parts, references = TASKS[task](_Draws(np.random.Generator(philox)), shape, length, haystack)

    def size(num_units: int) -> int:
        return sum(len(tokenizer.encode(text)) for text, _ in parts(num_units)) + 3

    if (least := size(0)) > length:
        raise ValueError(f"an item of {task} needs {least} tokens, but the length is {length}")
    low, high = 0, length  # a unit has a token at least
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= length else (low, middle - 1)
    found = parts(low)
    return Item(task, found, references or (found[-1][0].strip(),))


def encode_item(item: Item, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [n], mask uint8 [n]) of the item as a document; the mask is 1 where a token belongs to an answer.

    Parts are encoded one by one, so that a prompt has the same ids with and without its answer.
    """
    return encode_parts(item.parts, tokenizer)


def encode_parts(parts, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """As ``encode_item``, of (text, whether it is an answer) pairs."""
    pieces = [(tokenizer.encode(text), is_answer) for text, is_answer in parts]
    frame = tokenizer.encode_document("")
    ids = np.concatenate([frame[:-1], *(piece for piece, _ in pieces), frame[-1:]])
    mask = np.concatenate([[0] * (len(frame) - 1), *([int(a)] * len(piece) for piece, a in pieces), [0]])
    return ids.astype(np.int32), mask.astype(np.uint8)
