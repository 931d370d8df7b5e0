"""How a benchmark is run here: ours and the peer interleaved in one process, medians, and the machine's own ceiling.

A family module yields ``Case``s (built lazily, one at a time, so that their inputs never live together) and may yield
``MemoryCase``s. ``glm5 bench`` (or ``python -m benchmarks``) runs them. Knows nothing about any op.
"""

import ctypes
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from benchmarks import peers, picture
from glm5 import _native, ops

_native._lib.glm5_peak_flops.restype = ctypes.c_double
_native._lib.glm5_peak_flops.argtypes = [ctypes.c_char_p, ctypes.c_int64]
_native._lib.glm5_peak_read.restype = ctypes.c_double
_native._lib.glm5_peak_read.argtypes = [ctypes.c_void_p, ctypes.c_int64]


@dataclass
class Case:
    """One measurement.

    Attributes:
        name: what is measured, with its sizes: "linear bf16 M=64 N=K=4096".
        ours: runs our op once; packing and quantising done inside a call are inside its time.
        peer: runs the peer once, on the same inputs; None when there is none.
        work: floating-point operations (or bytes, for peak "read") of one call of ours, times ``scale``.
        peak: which ceiling ``work`` is held against: "float32", "bf16", "int8" (of the instruction set in force) or "read".
        peer_name: what the peer is.
        library: what the peer is part of, as in ``peers.LIBRARIES``.
        peer_key: cases with the same key have the same peer, which is slow: the first one times it for all of a run.
        scale, peer_scale: multiply our time, the peer's, where it is taken on a part of the work; say so in ``note``.
        peer_work: operations of one call of the peer, times ``peer_scale``, where they differ from ours.
        isa: instruction set to run ours on; None is the process's.
        goal_ratio, goal_share: what we want: peer time / our time at least this, share of the peak at least this.
        unit: what ``work`` is told in where there is no peak: "GF/s" or "MB/s".
        goal_rate: what we want: so much ``work`` a second.
        note: one line for the reader.
    """

    name: str
    ours: Callable[[], object]
    peer: Callable[[], object] | None = None
    work: float = 0.0
    peak: str | None = None
    peer_name: str = "torch"
    library: str = "torch"
    peer_key: str | None = None
    scale: float = 1.0
    peer_scale: float = 1.0
    peer_work: float | None = None
    isa: str | None = None
    goal_ratio: float | None = None
    goal_share: float | None = None
    note: str = ""
    unit: str = "GF/s"
    goal_rate: float | None = None


@dataclass
class MemoryCase:
    """The working memory of one call: how far the resident set rises above what its inputs took.

    Attributes:
        name: what is measured.
        target: "package.module:function"; the function builds the inputs and returns the callable to be measured.
        arguments: keyword arguments of the function, plain values.
        limit: bytes that the design promises not to pass.
        peer: keyword arguments with which the function builds the peer's call, where there is one.
        library: what the peer is part of, as in ``peers.LIBRARIES``.
        share: what we want: at most this share of the peer's memory.
    """

    name: str
    target: str
    arguments: dict = field(default_factory=dict)
    limit: float | None = None
    peer: dict | None = None
    library: str = "torch"
    share: float | None = None


@dataclass
class Result:
    """What a case gave; times in seconds."""

    name: str
    ours: float
    peer: float | None
    ratio: float | None
    rate: float | None  # operations (or bytes) a second
    peak: str | None
    peak_rate: float | None
    share: float | None
    peer_name: str
    isa: str
    load: float
    goal_ratio: float | None
    goal_share: float | None
    note: str
    peer_rate: float | None = None
    peer_share: float | None = None
    unit: str = "GF/s"
    goal_rate: float | None = None

    @property
    def complaint(self) -> str | None:
        if self.share is not None and self.share > 1.0 and self.peak != "read":
            return f"{self.name}: {100 * self.share:.1f} % of a peak that was measured too low"
        return None


# ---- ceilings ----


def _l3_bytes() -> int:
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]
    except (OSError, KeyError, ValueError):
        return 32 << 20


# More than the last-level cache holds, but no more than a small machine can spare.
COLD_BYTES = min(max(4 * _l3_bytes(), 128 << 20), 1 << 30)


class Peaks:
    """The ceilings seen so far: of a plain read, and of register-only loops and anything else that computed faster."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.rates: dict[tuple[str, str], float] = {}
        self._buffer = None

    def measure(self, peak: str, isa: str) -> None:
        """Runs the loop for ``peak`` on instruction set ``isa`` and keeps the fastest."""
        best, end = 0.0, time.perf_counter() + self.seconds
        tasks = 8 * torch.get_num_threads()
        if peak == "read" and self._buffer is None:
            self._buffer = torch.ones(COLD_BYTES // 4)
        with _native.using_cpu_isa(isa):
            while best == 0.0 or time.perf_counter() < end:
                start = time.perf_counter()
                if peak == "read":
                    done = _native._lib.glm5_peak_read(self._buffer.data_ptr(), COLD_BYTES)
                else:
                    done = _native._lib.glm5_peak_flops(peak.encode(), tasks)
                best = max(best, done / (time.perf_counter() - start))
        self.saw(peak, isa, best)

    def saw(self, peak: str, isa: str, rate: float) -> None:
        """Something reached ``rate``: the ceiling is at least that."""
        self.rates[peak, isa] = max(self.rates.get((peak, isa), 0.0), rate)


# ---- timing ----


class Rotating:
    """Cold copies: each call of ``next`` gives the next of enough copies to fall out of every cache.

    They are read for a second first: while the system still puts the pages of a new GiB together, memory has been seen to
    give a sixth of its rate.
    """

    def __init__(self, tensor: torch.Tensor, total: int = COLD_BYTES, settle: float = 1.0):
        size = max(1, tensor.numel() * tensor.element_size())
        self.copies = [tensor.clone() for _ in range(max(2, -(-total // size)))]
        self.index = 0
        end = time.perf_counter() + settle
        while time.perf_counter() < end:
            _native._lib.glm5_peak_read(self.next().data_ptr(), size)

    def next(self) -> torch.Tensor:
        self.index = (self.index + 1) % len(self.copies)
        return self.copies[self.index]


def _time(call: Callable, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


PATIENCE = 10.0  # seconds after which one sample of a slow call is enough


def time_interleaved(calls: list[Callable], seconds: float, sample: float = 0.01) -> list[list[float]]:
    """Times of each call, taken in turn until ``seconds`` are over: at least three, or as many as ``PATIENCE`` allows.

    A sample repeats a short call for about ``sample`` s. A first call of each, which may have something to build, does not
    count.
    """
    repeats = []
    for call in calls:
        once = _time(call, 1)
        if once < 1.0:
            once = _time(call, 1)
        repeats.append(max(1, min(1000, int(sample / max(once, 1e-7)))))
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()

    def wants_more(taken: int) -> bool:
        spent = time.perf_counter() - start
        return spent < PATIENCE if taken < 3 else spent < seconds and taken < 200

    while not times[0] or wants_more(len(times[0])):
        for call, count, kept in zip(calls, repeats, times, strict=True):
            kept.append(_time(call, count))
    return times


def run_case(case: Case, peaks: Peaks, seconds: float, peer_times: dict[str, list[float]]) -> Result:
    """Times one case; ``peer_times`` has the times of slow peers that were timed before.

    The share of the peak is filled in by ``finish`` once every ceiling is known.
    """
    isa, alone = case.isa or _native.cpu_isa(), case.peer is None
    if case.peer and not peers.wanted(case.library):
        case = replace(case, peer=None)
    with _native.using_cpu_isa(isa) if case.isa else nullcontext(), torch.no_grad() if alone else nullcontext():
        if case.peak:
            peaks.measure(case.peak, isa)
        known = peer_times.get(case.peer_key) if case.peer and case.peer_key else None
        samples = time_interleaved([case.ours] + ([case.peer] if case.peer and known is None else []), seconds)
        samples += [] if known is None else [known]
        if case.peer and case.peer_key:
            peer_times[case.peer_key] = samples[1]
        if case.peak:
            peaks.measure(case.peak, isa)
    ours = statistics.median(samples[0]) * case.scale
    peer = statistics.median(samples[1]) * case.peer_scale if case.peer else None
    rate = case.work / ours if case.work else None
    if case.peak and case.peak != "read":  # what is read faster than memory gives it came from a cache
        peaks.saw(case.peak, isa, case.work / (min(samples[0]) * case.scale))
        # A peer runs on whatever torch chooses: it tells something about the process's own set only.
        if peer and isa == _native.available_isas()[-1]:
            peaks.saw(case.peak, isa, (case.peer_work or case.work) / (min(samples[1]) * case.peer_scale))
    return Result(
        name=case.name, ours=ours, peer=peer, ratio=peer / ours if peer else None, rate=rate, peak=case.peak,
        peak_rate=None, share=None, peer_name=case.peer_name, isa=isa, load=os.getloadavg()[0],
        goal_ratio=case.goal_ratio, goal_share=case.goal_share, note=case.note, unit=case.unit, goal_rate=case.goal_rate,
        peer_rate=(case.peer_work or case.work) / peer if peer and case.work else None,
    )  # fmt: skip


def finish(results: list[Result], peaks: Peaks) -> None:
    """Fills in the shares of the peak: of products the larger of the register-only loop and the fastest seen in the run."""
    for result in results:
        if result.peak:
            result.peak_rate = peaks.rates[result.peak, result.isa]
            result.share = result.rate / result.peak_rate
            result.peer_share = result.peer_rate / result.peak_rate if result.peer_rate else None


# ---- memory ----

_CHILD = """
import gc, importlib, json, sys
module, function = sys.argv[1].split(":")
import torch
torch.set_num_threads(int(sys.argv[3]))
work = getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS:")
kept = work()
print(status("VmHWM:") - before)
"""


def peak_memory(target: str, threads: int | None = None, **arguments) -> int:
    """Bytes by which one call raises the resident set's high-water mark, in a process of its own.

    ``target`` is "package.module:function"; the function builds the inputs and returns the callable that is measured. Its
    outputs count as working memory.
    """
    run = subprocess.run(
        [sys.executable, "-c", _CHILD, target, json.dumps(arguments), str(threads or torch.get_num_threads())],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    if run.returncode != 0:
        raise RuntimeError(f"{target}: the measured process failed:\n{run.stderr[-2000:]}")
    return int(run.stdout.split()[-1])


# ---- reports ----


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


_UNITS = {"read": "GB/s", "int8": "GOP/s"}
_SCALES = {"MB/s": 1e6}


def roofline(peaks: Peaks, isa: str) -> str:
    """The limits of instruction set ``isa``, measured unless they were, in a line."""
    for peak in ("float32", "bf16", "int8", "read"):
        if (peak, isa) not in peaks.rates:
            peaks.measure(peak, isa)
    names = {"float32": "float32 FMA", "bf16": "bf16 products", "int8": "int8 products", "read": "reading memory"}
    return ", ".join(f"{name} {peaks.rates[k, isa] / 1e9:.0f} {_UNITS.get(k, 'GF/s')}" for k, name in names.items())


def _mark(value: float | None, goal: float | None) -> str:
    return "" if value is None or goal is None else (" ✓" if value >= goal else f" ✗ (want {goal:g})")


def table(results: list[Result]) -> str:
    """The results as a markdown table."""
    lines = [
        "| case | set | ours | peer | ratio | rate | share of peak | load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        unit = _UNITS.get(r.peak, r.unit)
        scale = _SCALES.get(unit, 1e9)
        want_rate = None if r.goal_rate is None else r.goal_rate / scale
        share = f"{100 * r.share:.1f} % of {r.peak_rate / 1e9:.0f}" if r.share is not None else ""
        share += ", partly from caches" if r.share is not None and r.share > 1.0 else ""
        want_share = None if r.goal_share is None else 100 * r.goal_share
        lines.append(
            f"| {r.name}{' (' + r.note + ')' if r.note else ''} | {r.isa} | {_seconds(r.ours)} "
            f"| {r.peer_name + ' ' + _seconds(r.peer) if r.peer else ''} "
            f"| {f'{r.ratio:.2f}x' if r.ratio else ''}{_mark(r.ratio, r.goal_ratio)} "
            f"| {f'{r.rate / scale:.1f} {unit}' if r.rate else ''}{_mark(r.rate and r.rate / scale, want_rate)} "
            f"| {share}{_mark(None if r.share is None else 100 * r.share, want_share)} | {r.load:.1f} |"
        )
    return "\n".join(lines)


@dataclass
class MemoryResult:
    """What a memory case gave; bytes."""

    name: str
    used: int
    peer: int | None
    limit: float | None

    @property
    def complaint(self) -> str | None:
        if self.limit is not None and self.used > self.limit:
            return f"{self.name}: {self.used} bytes, promised {self.limit:.0f}"
        return None


def run_memory_case(case: MemoryCase, peer_memory: dict[str, int]) -> MemoryResult:
    """Measures one case; ``peer_memory`` has what was measured of peers before."""
    peer, limit = None, case.limit
    if case.peer is not None and peers.wanted(case.library):
        key = json.dumps([case.target, case.peer])
        if key not in peer_memory:
            peer_memory[key] = peak_memory(case.target, **case.peer)
        peer = peer_memory[key]
        limit = peer * case.share if case.share else limit
    return MemoryResult(case.name, peak_memory(case.target, **case.arguments), peer, limit)


def memory_table(results: list[MemoryResult]) -> str:
    """The memory results as a markdown table."""
    lines = ["| working memory of | peak | peer | promised |", "|---|---|---|---|"]
    for r in results:
        promised = f"{r.limit / 2**20:.0f} MiB{' ✗' if r.complaint else ' ✓'}" if r.limit else ""
        peer = f"{r.peer / 2**20:.0f} MiB" if r.peer else ""
        lines.append(f"| {r.name} | {r.used / 2**20:.0f} MiB | {peer} | {promised} |")
    return "\n".join(lines)


def families(wanted: list[str]) -> Iterator[tuple[object, str]]:
    """(module, text that the cases' names must hold) for what is wanted: families, ops, or all when none is named.

    A family is a module ``benchmarks.<room>.bench_<family>``. Raises ValueError for what is neither.
    """
    files = sorted(Path(__file__).parent.glob("*/bench_*.py"))
    known = {p.stem.removeprefix("bench_"): f"benchmarks.{p.parent.name}.{p.stem}" for p in files}
    of_op = {name: getattr(ops, name).__module__.rpartition(".")[2] for name in ops.__all__}
    if unknown := [name for name in wanted if name not in known and name not in of_op]:
        raise ValueError(f"no benchmark for {', '.join(unknown)}; there are {', '.join(sorted({*known, *of_op}))}")
    for name in wanted or known:
        yield importlib.import_module(known[name if name in known else of_op[name]]), "" if name in known else name


def run(wanted: list[str], quick: bool, only: str = "", out: Path | None = None, shares: Path | None = None) -> list[str]:
    """Measures the limits, runs the families, prints the tables, writes figures (``out``) and a picture (``shares``).

    Returns complaints: a share over 100 %, a broken promise. Raises ValueError where nothing of that name can be run.
    """
    seconds = 0.3 if quick else 1.5
    chosen = list(families(wanted))
    peaks, results, memory = Peaks(0.1 if quick else 0.3), [], []
    peer_times, peer_memory = {}, {}
    isa = _native.cpu_isa()
    machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}, instruction set {isa}"
    limits = roofline(peaks, isa)
    print(f"{machine}, load {os.getloadavg()[0]:.1f}\nlimits: {limits}\n", flush=True)
    measured = dict(peaks.rates)
    for module, named in chosen:
        for case in module.cases(quick):
            if only in case.name and named in case.name:
                results.append(run_case(case, peaks, seconds, peer_times))
                print(f"{case.name}: {_seconds(results[-1].ours)}", file=sys.stderr, flush=True)
            del case
            gc.collect()
        for case in getattr(module, "memory_cases", lambda quick: ())(quick):
            if only in case.name and named in case.name:
                memory.append(run_memory_case(case, peer_memory))
                print(f"{case.name}: {memory[-1].used >> 20} MiB", file=sys.stderr, flush=True)
    finish(results, peaks)
    if results:
        print(table(results))
    if memory:
        print("\n" + memory_table(memory))
    for line in peers.skipped():
        print("\n" + line)
    if not results and not memory and not peers.skipped():
        raise ValueError(f"no case of {', '.join(wanted) or 'any family'} has {only!r} in its name")
    if shares:
        picture.write(shares, picture.draw(results, f"{machine}; {limits}"))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        rows = {
            "machine": machine,
            "limits": {f"{peak} {isa}": rate for (peak, isa), rate in measured.items()},
            "results": [asdict(r) for r in results],
            "memory": [asdict(r) for r in memory],
            "skipped": peers.skipped(),
        }
        part = out.with_name(out.name + ".part")
        part.write_text(json.dumps(rows, indent=1))
        part.replace(out)
    return [c for r in [*results, *memory] if (c := r.complaint)]
