"""How well a model answers from a long context: synthetic tasks at several lengths, greedy, scored as RULER does.

The tasks are ``glm5.data.synthetic``'s. An item counts by the share of its references that the answer holds, letter for
letter, in either case (RULER's string_match_all), or by whether it holds any (string_match_part). Reading runs and models
is ``glm5.cli.eval``'s business.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import sqrt

import torch

from glm5.data import ByteTokenizer
from glm5.data.synthetic import TASKS, Item, Shape, make_item

# Tokens of prompts that are prefilled in one batch.
_TOKENS_AT_ONCE = 1 << 14
_Z = 1.959964  # of a 95 % interval
AVERAGE = "average"


def string_match(prediction: str, references: Sequence[str], match: str = "all") -> float:
    """The share of `references` in `prediction` ("all"), or 1 if there is any of them ("part"); case does not count."""
    found = [reference.lower() in prediction.lower() for reference in references]
    return sum(found) / len(found) if match == "all" else float(any(found))


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share that was measured on `count` items (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    spread = _Z * _Z / count
    centre = (share + spread / 2) / (1 + spread)
    half = _Z * sqrt(share * (1 - share) / count + spread / count / 4) / (1 + spread)
    return max(centre - half, 0.0), min(centre + half, 1.0)


@dataclass(frozen=True)
class Score:
    """Mean share of references that were found; [low, high] is its 95 % interval."""

    share: float
    low: float
    high: float
    items: int

    @classmethod
    def of(cls, shares: Sequence[float]) -> "Score":
        share = sum(shares) / len(shares)
        return cls(share, *wilson(share, len(shares)), len(shares))


@torch.no_grad()
def answers(model, tokenizer, items: Sequence[Item]) -> list[str]:
    """What the model writes after each item's prompt: greedily, as many tokens as the item's own answer has, or fewer where
    the document ends. Items of one length are prefilled together; batching changes no answer."""
    frame = tokenizer.encode_document("")
    prompts = [
        [*frame[:-1].tolist(), *(i for t, _ in item.parts[:-1] for i in tokenizer.encode(t).tolist())] for item in items
    ]
    wanted = [len(tokenizer.encode(item.answer)) for item in items]
    order = sorted(range(len(items)), key=lambda i: (len(prompts[i]), wanted[i]))
    found = [""] * len(items)
    while order:
        longest = len(prompts[order[-1]])
        size = max(1, _TOKENS_AT_ONCE // longest)
        order, batch = order[:-size], order[-size:]
        ids = torch.full((len(batch), longest), tokenizer.eos_id, dtype=torch.int64)
        there = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, i in enumerate(batch):
            ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
            there[row, longest - len(prompts[i]) :] = 1
        device = model.head_weight.device
        options = dict(attention_mask=there.to(device), stop_tokens=(tokenizer.eos_id,), chunk=longest)
        out = model.generate(ids.to(device), max(wanted[i] for i in batch), **options)[:, longest:].tolist()
        for row, i in zip(out, batch, strict=True):
            found[i] = tokenizer.decode(row[: wanted[i]])
    return found


def evaluate(
    model,
    tokenizer,
    lengths: Sequence[int],
    tasks: Sequence[str] = tuple(TASKS),
    items: int = 100,
    *,
    seed: int = 0,
    attention: str | None = None,
    shape: Shape = Shape(),  # noqa: B008  (frozen)
    haystack: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[int, dict[str, Score]]:
    """{length: {task: score, "average": mean of the tasks}} of a model on held-out items.

    Args:
        lengths: tokens of whole documents, answers and special tokens included.
        items: how many of each task at each length.
        attention: the form to use, "dense" or "sparse"; None: the model's present one.
        haystack: text to hide needles in; None: words of no meaning.

    Raises:
        ValueError: no such task, a length that does not hold an item or is beyond the model's, no items.
    """
    if items < 1:
        raise ValueError(f"items is {items}, want at least 1")
    want_lengths(lengths, model.config.max_position_embeddings)
    before, model.attention = model.attention, attention or model.attention
    found: dict[int, dict[str, Score]] = {}
    try:
        for length in lengths:
            scores = found[length] = {}
            for task in tasks:
                progress(f"{task} at {length} tokens")
                options = dict(shape=shape, haystack=haystack, held_out=True)
                asked = [make_item(task, seed, i, length, tokenizer, **options) for i in range(items)]
                said = answers(model, tokenizer, asked)
                pairs = zip(said, asked, strict=True)
                scores[task] = Score.of([string_match(text, item.references, item.match) for text, item in pairs])
            share = sum(score.share for score in scores.values()) / len(scores)
            total = items * len(scores)
            scores[AVERAGE] = Score(share, *wilson(share, total), total)
    finally:
        model.attention = before
    return found


def want_lengths(lengths: Sequence[int], limit: int) -> None:
    """Raises ValueError for a length beyond a model's `limit`, or if there is none."""
    if not lengths:
        raise ValueError("no length was asked for")
    for length in lengths:
        if length > limit:
            raise ValueError(f"a length of {length} tokens, want at most max_position_embeddings, {limit}")


def to_json(scores: dict[int, dict[str, Score]]) -> dict:
    """Scores as JSON can hold them: {"256": {"niah-single": {"share": ..}}}."""
    return {str(length): {task: asdict(score) for task, score in each.items()} for length, each in scores.items()}


def evaluate_as_recipe(model, recipe, attention: str) -> dict:
    """Scores, as ``to_json`` gives them, of a model in a form of attention, on what ``recipe.evaluation.longctx`` asks."""
    wanted = recipe.evaluation.longctx
    options = dict(seed=recipe.seed, attention=attention, shape=Shape(**wanted.shape))
    return to_json(evaluate(model, ByteTokenizer(), wanted.lengths, wanted.tasks, wanted.items, **options))
