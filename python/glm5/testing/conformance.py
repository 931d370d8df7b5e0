"""``check``: runs an implementation of an op through every property and reports a verdict each."""

import importlib
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from glm5.testing.judges import Candidate
from glm5.testing.properties import PROPERTIES
from glm5.testing.spec import OpSpec, RandomDraw, spec

SHOWN = 3  # failures of a property that a report prints


class ConformanceError(AssertionError):
    """Raised by ``Report.raise_if_failed``; its text is the report."""


@dataclass
class Verdict:
    """What became of one property: how many examples ran, and each failure with what draws its inputs again.

    ``absent`` says why the property does not apply to the op; empty where it does. ``note`` is what was measured.
    """

    property: str
    examples: int = 0
    failures: list[str] = field(default_factory=list)
    absent: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        return not self.failures

    def __str__(self):
        if self.absent:
            return f"{self.property:15} -       does not apply: {self.absent}"
        counted = f"{self.examples} example{'s' * (self.examples != 1)}"
        if self.ok:
            return f"{self.property:15} ok      {counted}{self.note}"
        lines = [f"{self.property:15} FAILED  {len(self.failures)} of {counted}{self.note}", *self.failures[:SHOWN]]
        if more := len(self.failures) - SHOWN:
            lines += [f"    and {more} more"] if more > 0 else []
        return "\n".join(lines)


@dataclass
class Report:
    """The verdicts of ``check``, by property. ``ok``: no property failed. ``str(report)`` is what ``glm5 check`` prints."""

    name: str
    subject: str
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return all(v.ok for v in self.verdicts.values())

    @property
    def failed(self) -> list[str]:
        """The properties that failed."""
        return [k for k, v in self.verdicts.items() if not v.ok]

    def raise_if_failed(self) -> None:
        """Raises ConformanceError with the report unless every property held: for use in a test."""
        if not self.ok:
            raise ConformanceError(f"\n{self}")

    def __str__(self):
        verdict = f"fails {', '.join(self.failed)}" if self.failed else "keeps its promises"
        return "\n".join([self.subject, *(f"  {v}" for v in self.verdicts.values()), f"{self.name}: {verdict}"])


def example(name: str, property: str, dtype: torch.dtype, seed: int) -> dict:
    """The keyword arguments that ``check`` judged property ``property`` of op ``name`` on, for a seed that it printed."""
    return _drawn(spec(name), property, dtype, seed)[0]


def _drawn(op: OpSpec, property: str, dtype: torch.dtype, seed: int):
    """(arguments, judge) of a seed; arguments None where no draw is of the kind that the property needs."""
    trials = PROPERTIES[property].trials(op)
    draw, judge = trials[seed % len(trials)]
    return draw(op, RandomDraw(seed), dtype), judge


def check(
    name: str,
    impl: Callable | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    examples: int = 16,
    properties: Iterable[str] | None = None,
    seed: int = 0,
) -> Report:
    """Judges an implementation of op ``name``: every property of ``PROPERTIES``, on random examples.

    Args:
        name: an op of ``glm5.reference``.
        impl: a callable with the op's signature; None judges ``glm5.ops``.
        device: where ``impl`` runs: its tensors are moved there, its results back. The reference runs on the CPU.
        dtype: the one dtype to judge, of the op's; None judges every one that the op promises.
        examples: how many inputs to draw for each property and dtype.
        properties: names of ``PROPERTIES`` to judge; None judges all.
        seed: first seed; example i uses seed + i.

    Returns:
        a Report: ``.ok`` is the verdict, ``.raise_if_failed()`` is for tests, ``print`` shows it.

    Raises:
        ValueError: no such op, property, dtype of the op or device; examples < 1.
        TypeError: impl is not callable.
    """
    op = spec(name)
    dtypes = (dtype,) if dtype is not None else op.dtypes
    chosen = list(PROPERTIES if properties is None else properties)
    _refuse_nonsense(op, impl, device, dtype, examples, chosen)
    function = impl or getattr(importlib.import_module("glm5.ops"), name)
    shown = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
    report = Report(name, f"{name}: {_called(function)} on {device}, {shown}")
    for key in chosen:
        report.verdicts[key] = verdict = Verdict(key)
        trials = PROPERTIES[key].trials(op)
        if isinstance(trials, str):
            verdict.absent = trials
            continue
        most = PROPERTIES[key].most
        candidate = Candidate(op, function, device)
        for each in dtypes[:1] if most else dtypes:
            if key == "gradient" and not _trains(op, each):
                continue
            for case in range(seed, seed + min(examples, most or examples)):
                _judge(candidate, key, each, case, verdict)
        if not verdict.examples:
            verdict.absent = "it has no such inputs" if key != "gradient" else "it has no gradient in this dtype"
        verdict.note = _measured(candidate) if key in ("accuracy", "gradient") else ""
    return report


def _judge(candidate: Candidate, key: str, dtype: torch.dtype, seed: int, verdict: Verdict) -> None:
    arguments, judge = _drawn(candidate.op, key, dtype, seed)
    if arguments is None:
        return
    verdict.examples += 1
    try:
        found = judge(candidate, arguments, dtype)
    except Exception as error:  # whatever an implementation raises is its failure, and the next example may tell more
        lines, frame = str(error).strip().splitlines(), traceback.extract_tb(error.__traceback__)[-1]
        found = [f"raised {type(error).__name__}: {lines[0] if lines else ''} ({Path(frame.filename).name}:{frame.lineno})"]
    if found:
        text = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
        again = f"glm5.testing.example({candidate.op.name!r}, {key!r}, {dtype}, seed={seed})"
        verdict.failures.append(f"    seed {seed}, {str(dtype).removeprefix('torch.')}: {text}\n      inputs: {again}")


def _trains(op: OpSpec, dtype: torch.dtype) -> bool:
    return bool(op.leaves(PROPERTIES["gradient"].trials(op)[0][0](op, RandomDraw(0), dtype) or {}))


def _measured(candidate: Candidate) -> str:
    worst = [
        f"{error:.2g} of {budget:g} ({str(dtype).removeprefix('torch.')})"
        for dtype, (error, budget) in candidate.worst.items()
    ]
    return f", worst error {', '.join(worst)}" if worst else ""


def _called(function) -> str:
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{getattr(function, '__module__', None) or type(function).__module__}:{name}"


def _refuse_nonsense(op, impl, device, dtype, examples, properties) -> None:
    if impl is not None and not callable(impl):
        raise TypeError(f"check: impl is {type(impl).__name__}, want a callable with the signature of glm5.ops.{op.name}")
    if dtype is not None and dtype not in op.dtypes:
        raise ValueError(
            f"check: dtype is {dtype}, want one that {op.name} is specified in: {', '.join(map(str, op.dtypes))}"
        )
    if examples < 1:
        raise ValueError(f"check: examples is {examples}, want at least 1")
    for unknown in (p for p in properties if p not in PROPERTIES):
        raise ValueError(f"check: there is no property {unknown!r}; there are {', '.join(PROPERTIES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise ValueError(f"check: device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
