"""What an op promises, as data: how to draw its inputs, which are differentiable, how far from float64 it may be.

An ``OpSpec`` per op is registered by the family modules beside this one (``norm.py`` and so on). Inputs are drawn through a
``Draw``, so that ``check`` can use a seeded generator and the test suite hypothesis, on the same description. What the
description says of given arguments (how many rows, which of them are empty) is asked here too.
"""

import importlib
import pkgutil
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch


class Draw:
    """A source of choices. Subclasses give ``integer``; everything else is built on it."""

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        raise NotImplementedError("a Draw subclass defines integer()")

    def choice(self, options):
        """One of ``options``."""
        options = list(options)
        return options[self.integer(0, len(options) - 1)]

    def tensor(self, *shape: int, dtype=torch.float32, scale: float = 1.0) -> torch.Tensor:
        """Gaussian or heavy-tailed values of standard deviation ``scale``, from a drawn seed."""
        generator = torch.Generator().manual_seed(self.integer(0, 2**31 - 1))
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.integer(0, 3) == 0:
            values = values * torch.exp(torch.randn(shape, generator=generator, dtype=torch.float64) - 1)
        return (values * scale).to(dtype)


class RandomDraw(Draw):
    """Choices from a seed."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def integer(self, low, high):
        return self.random.randint(low, high)


@dataclass(frozen=True)
class OpSpec:
    """One op's promise.

    Attributes:
        name: name in ``glm5.ops`` and ``glm5.reference``.
        draw: (Draw, dtype) -> keyword arguments of the op.
        differentiable: names of the arguments that take a gradient.
        budget: key of ``BUDGETS``.
        dtypes: dtypes that ``draw`` accepts.
        compare: (got, want float64, arguments, dtype) -> list of complaints; None compares every output within the budget.
        bitwise: the op is defined in exact arithmetic: outputs equal those of the reference on the same inputs bit for bit.
        mutates: arguments that the op writes into. They are judged as outputs, behind those that it returns.

        rows: arguments whose first dimension is that of the output's rows: a row of the output may depend on its own rows
            of these, and on the other arguments whole.
        keys: arguments whose first dimension is that of the keys which rows attend to.
        positions: arguments that say which keys a row sees: "ks" and "ke", or lists [rows, n] padded with -1.
        lists: those of ``positions`` whose width may grow by trailing -1s without changing anything.
        outputs: what each output is made of, for the properties that compare rows: "rows" (first dimension of the rows),
            "positions" (rows whose values are positions of keys), "columns" ([rows, keys]), "list" ([rows, width of the
            lists]) or "other" (not one row a row). Empty where no such comparison makes sense; optional outputs stand last.
        select_rows: (arguments, int64 rows) -> (arguments of the call for these rows, the rows in the order in which they
            then come out); None takes these rows of every argument in ``rows``.
        in_rows: (outputs, arguments) -> the outputs as rows, where they are something else (a pool of pages, a layout of a
            backend's own); ``outputs`` speaks of these. None: they are rows already.
        independent: arguments -> whether no row of this call depends on another one. None: it is so in every call.
        ties: (Draw, dtype) -> arguments full of ties, for which integer outputs equal the reference's.
        special: (Draw, dtype) -> arguments with NaN, infinities, -0.0, for which the outputs are the reference's.
        poisons: arguments in which a NaN must show in the rows that see it and nowhere else; None: every floating one in
            ``rows`` and ``keys``.
        empty: arguments -> bool [rows], which have nothing to compute from, beyond what ks, ke and lists say.
    """

    name: str
    draw: Callable
    differentiable: tuple[str, ...] = ()
    budget: str = "exact"
    dtypes: tuple = (torch.bfloat16, torch.float32)
    compare: Callable | None = None
    bitwise: bool = False
    mutates: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    select_rows: Callable | None = None
    in_rows: Callable | None = None
    independent: Callable | None = None
    ties: Callable | None = None
    special: Callable | None = None
    poisons: tuple[str, ...] | None = None
    empty: Callable | None = None

    def leaves(self, arguments: dict) -> tuple[str, ...]:
        """Which of these arguments take a gradient: none where one is e4m3, training does not go through FP8 inputs."""
        tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
        if any(t.dtype == torch.float8_e4m3fn for t in tensors.values()):
            return ()
        return tuple(k for k in self.differentiable if k in tensors)

    def call(self, function: Callable, arguments: dict) -> tuple:
        """Everything that ``function`` gives for ``arguments``: what it returns, then the arguments it wrote into."""
        returned = function(**arguments)
        returned = () if returned is None and self.mutates else as_tuple(returned)
        return (*returned, *(arguments[k] for k in self.mutates))


_SPECS: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> OpSpec:
    """Adds an op's spec; family modules call it on import."""
    _SPECS[spec.name] = spec
    return spec


def specs() -> dict[str, OpSpec]:
    """Every spec, by op name."""
    package = importlib.import_module("glm5.testing")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"glm5.testing.{module.name}")
    return dict(_SPECS)


def spec(name: str) -> OpSpec:
    """The spec of op ``name``. Raises ValueError naming the known ops when there is none."""
    known = specs()
    if name not in known:
        raise ValueError(f"glm5.testing has no spec for op {name!r}; it knows {', '.join(sorted(known))}")
    return known[name]


def widened(arguments: dict) -> dict:
    """The same arguments with floating tensors in float64 (e4m3 included)."""
    return {
        k: v.detach().double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()
    }


def number_of_rows(op: OpSpec, arguments: dict) -> int:
    """How many rows the arguments speak of."""
    return next(arguments[k].shape[0] for k in op.rows if arguments.get(k) is not None)


def select_rows(op: OpSpec, arguments: dict, rows: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """The call for some rows (int64, any order), and those rows in the order in which they come out."""
    if op.select_rows is not None:
        return op.select_rows(arguments, rows)
    return {k: v[rows] if k in op.rows and v is not None else v for k, v in arguments.items()}, rows


def by_rows(op: OpSpec, outputs: tuple, arguments: dict) -> tuple:
    """What the op gave for these arguments, as rows."""
    return outputs if op.in_rows is None else op.in_rows(outputs, arguments)


def empty_rows(op: OpSpec, arguments: dict) -> torch.Tensor | None:
    """bool [rows]: which have nothing to compute from, by an empty range or a list without a key. None where a size is 0,
    so that it is all of them."""
    if any(isinstance(v, torch.Tensor) and v.numel() == 0 for v in arguments.values()):
        return None
    empty = torch.zeros(number_of_rows(op, arguments) if op.rows else 0, dtype=torch.bool)
    if op.empty is not None:
        empty = empty | op.empty(arguments)
    if arguments.get("ks") is not None:
        empty = empty | (arguments["ks"] >= arguments["ke"])
    for name in op.positions:
        if arguments.get(name) is not None and arguments[name].dim() == 2:
            empty = empty | (arguments[name] < 0).all(1)
    return empty


def as_tuple(outputs) -> tuple:
    """An op's outputs as a tuple, without those that are None."""
    return tuple(o for o in outputs if o is not None) if isinstance(outputs, tuple) else (outputs,)
