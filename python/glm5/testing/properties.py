"""What every op promises: ``PROPERTIES`` names each promise, which examples it is judged on and who judges it.

An example is drawn from an op's spec until it is of the kind that the promise is about: ``check`` draws from a seed, the
test suite through hypothesis. How a candidate is judged on it is the business of ``judges.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from glm5.testing import judges
from glm5.testing.spec import Draw, OpSpec, empty_rows, number_of_rows, select_rows


def is_empty(op: OpSpec, arguments: dict) -> bool:
    """Whether there is nothing to compute for a row or more: a size of 0, an empty range, a list without a key."""
    rows = empty_rows(op, arguments)
    return rows is None or bool(rows.any())


TRIES = 400  # of a draw until it is of the wanted kind


def _until(wanted: Callable, field: str = "draw") -> Callable:
    def draw(op, source, dtype):
        for _ in range(TRIES):
            if wanted(op, arguments := getattr(op, field)(source, dtype)):
                return arguments
        return None

    return draw


def _several_rows(op, arguments) -> bool:
    if op.independent is not None and not op.independent(arguments):
        return False
    return not is_empty(op, arguments) and number_of_rows(op, arguments) >= 3


def _own_row_count(op, arguments) -> bool:
    """Several rows, of which no other size is a copy: what torch.compile is to keep apart."""
    if not _several_rows(op, arguments) or (rows := number_of_rows(op, arguments)) < 5:
        return False
    sizes = [s for k, v in arguments.items() if isinstance(v, torch.Tensor) for s in v.shape[k in op.rows :]]
    return rows not in [*sizes, *(v for v in arguments.values() if isinstance(v, int))]


ordinary = _until(lambda op, arguments: not is_empty(op, arguments))
several_rows = _until(_several_rows)
own_row_count = _until(_own_row_count)
_empty = _until(is_empty)


def empty(op: OpSpec, source: Draw, dtype: torch.dtype) -> dict | None:
    """An example with nothing in it, or an ordinary one without rows; None where the op has neither."""
    if (arguments := _empty(op, source, dtype)) is not None or not op.rows:
        return arguments
    return select_rows(op, ordinary(op, source, dtype), torch.zeros(0, dtype=torch.long))[0]


_ties = _until(lambda op, arguments: not is_empty(op, arguments), "ties")
_special = _until(lambda op, arguments: not is_empty(op, arguments), "special")


@dataclass(frozen=True)
class Property:
    """A promise that ops make.

    Attributes:
        name: its name in reports.
        says: what it promises, in a line.
        trials: OpSpec -> (draw, judge) pairs, which examples take in turn; or, as text, why there is nothing to try.
        most: examples that are enough; None for as many as are asked for.
    """

    name: str
    says: str
    trials: Callable
    most: int | None = None


def _row_trials(op):
    if not op.rows or all(kind == "other" for kind in op.outputs):
        return "no output has a row for every row of the input"
    found = [(several_rows, judges.rows_alone)]
    found += [(several_rows, judges.shifted_keys)] if op.keys and op.positions else []
    return found + ([(several_rows, judges.wider_lists)] if op.lists else [])


def _nan_trials(op):
    found = [(_special, judges.special_values)] if op.special else []
    if op.poisons != () and any(kind != "other" for kind in op.outputs):
        found.append((several_rows, judges.poison_stays_visible))
    return found or "its inputs hold no floats by rows"


PROPERTIES = {
    p.name: p
    for p in (
        Property(
            "accuracy", "outputs are the reference's, within the error budget", lambda op: [(ordinary, judges.accuracy)]
        ),
        Property(
            "gradient",
            "gradients are the reference's, within the error budget",
            lambda op: [(ordinary, judges.gradient)] if op.differentiable else "it is not differentiable",
        ),
        Property(
            "determinism",
            "a second run and any number of threads give the same bits",
            lambda op: [(ordinary, judges.determinism)],
        ),
        Property(
            "row_invariance",
            "a row's bits depend on its own inputs and its keys alone: not on the batch, its order, the place in the pack",
            _row_trials,
        ),
        Property(
            "ties",
            "among equals the lower index, or the earlier, is chosen",
            lambda op: [(_ties, judges.chosen_among_ties)] if op.ties else "it chooses nothing",
        ),
        Property("nan", "a NaN shows in the rows that see it and nowhere else", _nan_trials),
        Property(
            "empty", "no rows, no keys, an empty range: shapes and values as specified", lambda op: [(empty, judges.nothing)]
        ),
        Property(
            "strides",
            "inputs of any strides and offset give the bits of contiguous ones",
            lambda op: [(ordinary, judges.strides)] + ([(ordinary, judges.strided_cotangents)] if op.differentiable else []),
        ),
        Property(
            "aliasing", "inputs are left alone, outputs have memory of their own", lambda op: [(ordinary, judges.aliasing)]
        ),
        Property(
            "compile",
            "torch.compile(fullgraph, dynamic) and tracing without values agree with eager",
            lambda op: [(own_row_count, judges.compiles)] if op.rows else "its inputs have no rows to vary",
            most=1,
        ),
    )
}
