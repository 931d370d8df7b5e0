"""What an op promises, as data: how to draw its inputs, which are differentiable, how far from float64 it may be.

An ``OpSpec`` per op is registered by the family modules beside this one (``norm.py`` and so on). Inputs are drawn through a
``Draw``, so that ``check`` can use a seeded generator and the test suite hypothesis, on the same description.
"""

import importlib
import pkgutil
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# ||out - ref|| / ||ref|| against float64 on the same (already rounded) inputs: (forward, backward).
BUDGETS = {
    "exact": {torch.bfloat16: (3e-3, 5e-3), torch.float32: (1e-6, 1e-6), torch.float64: (1e-13, 1e-12)},
    # Scores are float32 whatever their inputs are; gradients have their input's dtype.
    "scores": {
        torch.bfloat16: (1e-6, 5e-3),
        torch.float32: (1e-6, 1e-6),
        torch.float64: (1e-13, 1e-12),
        torch.float8_e4m3fn: (1e-6, 0.0),
        torch.int8: (1e-6, 0.0),
    },
    "softmax": {torch.bfloat16: (3e-3, 5e-3), torch.float32: (5e-6, 5e-6), torch.float64: (1e-13, 1e-12)},
}


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
        """Gaussian or heavy-tailed values of standard deviation near ``scale``, from a drawn seed."""
        generator = torch.Generator().manual_seed(self.integer(0, 2**31 - 1))
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.integer(0, 3) == 0:
            values = values * torch.exp(torch.randn(shape, generator=generator, dtype=torch.float64))
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
            lists]) or "other" (not one row a row). Empty where no such comparison makes sense.
        select_rows: (arguments, int64 rows) -> (arguments of the call for these rows, the rows in the order in which they
            then come out); None takes these rows of every argument in ``rows``.
        ties: (Draw, dtype) -> arguments full of ties, for which integer outputs equal the reference's.
        special: (Draw, dtype) -> arguments with NaN, infinities, -0.0, for which the outputs are the reference's.
        poisons: arguments in which a NaN must show in the rows that see it and nowhere else; None: every floating one in
            ``rows`` and ``keys``.
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
    ties: Callable | None = None
    special: Callable | None = None
    poisons: tuple[str, ...] | None = None

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


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and bytes (so -0.0 differs from 0.0, and NaN equals itself)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(
        a.detach().contiguous().flatten().view(torch.uint8), b.detach().contiguous().flatten().view(torch.uint8)
    )


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want|| in float64; infinities must agree in place and sign; 0 for two empty or all-zero tensors."""
    got, want = got.detach().double().flatten(), want.detach().double().flatten()
    if got.shape != want.shape:
        return float("inf")
    finite = torch.isfinite(want)
    if not torch.equal(finite, torch.isfinite(got)) or not torch.equal(
        got[~finite].nan_to_num(), want[~finite].nan_to_num()
    ):
        return float("inf")
    difference, size = (got - want)[finite].norm().item(), want[finite].norm().item()
    return difference / size if size > 0 else difference


def allowed_error(budget: float, output: torch.Tensor) -> float:
    """``budget`` speaks of many numbers, whose roundings differ; each of a few in bf16 may be off by two halves of its last
    place, where a result was rounded twice."""
    few = output.dtype == torch.bfloat16 and output.numel() < 16
    return max(budget, 2.0**-7) if few else budget


def widened(arguments: dict) -> dict:
    """The same arguments with floating tensors in float64 (e4m3 included)."""
    return {
        k: v.detach().double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()
    }


def as_tuple(outputs) -> tuple:
    """An op's outputs as a tuple, without those that are None."""
    return tuple(o for o in outputs if o is not None) if isinstance(outputs, tuple) else (outputs,)


def complaints(op: OpSpec, impl: Callable, arguments: dict, dtype: torch.dtype) -> list[str]:
    """What is wrong with ``impl`` on ``arguments``; empty when it keeps the op's promise (forward, then gradients)."""
    reference = getattr(importlib.import_module("glm5.reference"), op.name)
    forward_budget, backward_budget = BUDGETS[op.budget][dtype]
    found = []

    inputs = op.leaves(arguments)
    ours = {
        k: v.detach().clone().requires_grad_(k in inputs) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
    }
    theirs = {
        k: v.detach().clone() if isinstance(v, torch.Tensor) else v
        for k, v in (arguments if op.bitwise else widened(arguments)).items()
    }
    for name in inputs:
        theirs[name].requires_grad_(True)
    got, want = op.call(impl, ours), op.call(reference, theirs)
    if op.compare is not None:
        found += op.compare(got, want, arguments, dtype)
    elif op.bitwise:
        found += [f"output {i}: other bits" for i, (g, w) in enumerate(zip(got, want, strict=True)) if not same_bits(g, w)]
    else:
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            if not w.is_floating_point():
                found += [] if torch.equal(g, w) else [f"output {i}: differs from the reference's"]
                continue
            error = relative_error(g, w)
            if not error <= (budget := allowed_error(forward_budget, g)):
                found.append(f"output {i}: relative error {error:.3g}, budget {budget:g}")

    outputs = [(g, w) for g, w in zip(got, want, strict=True) if w.requires_grad and g.requires_grad]
    if inputs and outputs:
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(w.shape, generator=generator, dtype=torch.float64).to(g.dtype) for g, w in outputs]
        ours_grad = torch.autograd.grad([g for g, _ in outputs], [ours[k] for k in inputs], cotangents, allow_unused=True)
        theirs_grad = torch.autograd.grad(
            [w for _, w in outputs], [theirs[k] for k in inputs], [c.double() for c in cotangents], allow_unused=True
        )
        for name, g, w in zip(inputs, ours_grad, theirs_grad, strict=True):
            w = torch.zeros_like(theirs[name]) if w is None else w
            error = float("inf") if g is None else relative_error(g, w)
            if not error <= (budget := allowed_error(backward_budget, w if g is None else g)):
                found.append(f"gradient of {name}: relative error {error:.3g}, budget {budget:g}")
    return found


@dataclass
class Report:
    """The verdict of ``check``: ``ok``, how many cases ran, and each failure with the seed that draws its inputs again."""

    name: str
    cases: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.cases > 0 and not self.failures

    def __str__(self):
        head = f"{self.name}: {self.cases} cases, {len(self.failures)} failed"
        return "\n".join([head, *("  " + f for f in self.failures)])


def check(name: str, impl: Callable | None = None, device: str = "cpu", cases: int = 24, seed: int = 0) -> Report:
    """Judges an implementation of op ``name`` against the float64 reference.

    Args:
        name: an op of ``glm5.reference``.
        impl: a callable with the op's signature; None judges ``glm5.ops``.
        device: where ``impl`` runs; the reference runs on the CPU.
        cases: how many inputs to draw for each dtype.
        seed: first seed; case i uses seed + i.

    Returns:
        a Report whose ``.ok`` is the verdict.

    Raises:
        ValueError: there is no op ``name``.
    """
    op = spec(name)
    impl = impl or getattr(importlib.import_module("glm5.ops"), name)

    def on_device(**arguments):
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        outputs = impl(**moved)
        for k in op.mutates:
            arguments[k].copy_(moved[k])
        return None if outputs is None else tuple(o.cpu() for o in as_tuple(outputs))

    report = Report(name)
    for dtype in op.dtypes:
        for case in range(seed, seed + cases):
            for complaint in complaints(op, on_device, op.draw(RandomDraw(case), dtype), dtype):
                report.failures.append(f"{str(dtype).removeprefix('torch.')}, seed {case}: {complaint}")
            report.cases += 1
    return report
