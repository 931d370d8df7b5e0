"""Hypothesis strategies: the inputs of every op, which hypothesis shrinks when a test fails.

``arguments("sparse_mla", torch.bfloat16)`` is a strategy of keyword arguments, and so is
``strategies.sparse_mla(torch.bfloat16)``, for any op's name. ``property`` narrows them to what one property is judged on:
"ties", "nan", "empty" and so on. This is the one module of the kit that needs hypothesis, and only when a strategy is made.
"""

import functools

import torch

from glm5.testing.properties import PROPERTIES
from glm5.testing.spec import Draw, spec, specs


class HypothesisDraw(Draw):
    """Choices from hypothesis: of the ``draw`` of a composite strategy, or of an ``st.data()``."""

    def __init__(self, draw):
        from hypothesis import strategies

        self._draw = getattr(draw, "draw", draw)
        self._integers = strategies.integers

    def integer(self, low, high):
        return self._draw(self._integers(low, high))


def arguments(name: str, dtype: torch.dtype, property: str | None = None):
    """Keyword arguments of op ``name`` with inputs in ``dtype``: any that its spec draws, or those of one property.

    Raises ValueError: no such op, property, or the property does not apply to the op.
    """
    import hypothesis
    from hypothesis import strategies

    op = spec(name)
    draws = [op.draw] if property is None else None
    if draws is None:
        if property not in PROPERTIES:
            raise ValueError(f"strategies: there is no property {property!r}; there are {', '.join(PROPERTIES)}")
        trials = PROPERTIES[property].trials(op)
        if isinstance(trials, str):
            raise ValueError(f"strategies: {property} does not apply to {name}: {trials}")
        draws = [functools.partial(draw, op) for draw, _ in trials]

    @strategies.composite
    def of_the_op(draw):
        source = HypothesisDraw(draw)
        drawn = source.choice(draws)(source, dtype)
        hypothesis.assume(drawn is not None)
        return drawn

    return of_the_op()


def __getattr__(name):
    if not name.startswith("_") and name in specs():
        return functools.partial(arguments, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
