"""What a run tells: ``metrics.jsonl``, one object a line, the same as TensorBoard events, and a progress line.

wandb gets it too where a recipe asks for it. How fast the machine could be is measured here, for the share of it.
"""

import json
import os
import sys
import time
from ctypes import c_char_p, c_double, c_int64
from functools import cache
from pathlib import Path

import torch

from glm5.train.tensorboard import EventFile


class MetricsLog:
    """Appends to a JSON-lines file. Checkpoints store its length, so that a resumed run drops what it will do again.

    Beside it ``tensorboard/`` has every row with a stage and a step as scalars called ``stage/name``: a second form of the
    file, made anew from what ``truncate`` leaves.

    Args:
        path: of the file.
        wandb_project: project of Weights & Biases that gets the rows as well, as they are written; none if empty.

    Raises:
        ValueError: wandb is wanted and not installed.
    """

    def __init__(self, path: Path, wandb_project: str = ""):
        self.path = Path(path)
        self._wandb = _wandb_run(wandb_project, self.path.parent) if wandb_project else None
        self._events: EventFile | None = None
        self._file = open(self.path, "ab", buffering=0)  # a buffer would try a failed line again when the file is closed

    def write(self, **values) -> None:
        """Appends one line.

        Raises:
            ValueError: the disk is full; the half line is cut off when the run resumes.
        """
        line = json.dumps(values).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
            if self._events is None:
                self._events = EventFile(self.path.parent / "tensorboard")
            self._show(values)
        except OSError as error:
            raise self._failed(error) from error
        if self._wandb is not None and (named := _scalars(values)):
            self._wandb.log(named | {f"{values['stage']}/step": values["step"]})

    def _show(self, values: dict) -> None:
        if named := _scalars(values):
            self._events.write(values["step"], named)

    def sync(self) -> int:
        """Flushes to the disk and returns the length in bytes.

        Raises:
            ValueError: the disk is full.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error
        return self._file.tell()

    def _failed(self, error: OSError) -> ValueError:
        return ValueError(
            f"cannot write {self.path}: {error.strerror}; checkpoints are untouched, "
            "make room and run the same command again"
        )

    def truncate(self, length: int) -> None:
        """Forgets everything after the first `length` bytes.

        Raises:
            ValueError: the file is shorter than that, so it is not the one the checkpoint was written with.
        """
        if os.path.getsize(self.path) < length:
            raise ValueError(
                f"{self.path}: shorter than the checkpoint says ({length} bytes); restore it or remove the run's folder"
            )
        self._file.truncate(length)
        self._file.seek(length)
        try:
            self._close_events()
            self._events = EventFile(self.path.parent / "tensorboard")
            for line in self.path.read_bytes().splitlines():
                self._show(json.loads(line))
        except OSError as error:
            raise self._failed(error) from error

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()

    def close(self) -> None:
        self._file.close()
        self._close_events()
        if self._wandb is not None:
            self._wandb.finish()


def _scalars(values: dict) -> dict[str, float]:
    """The numbers of a row by tag; none where it belongs to no step."""
    if "stage" not in values or "step" not in values:
        return {}
    numbers = {n: v for n, v in values.items() if n != "step" and isinstance(v, int | float) and not isinstance(v, bool)}
    return {f"{values['stage']}/{n}": float(v) for n, v in numbers.items()}


def _wandb_run(project: str, folder: Path):
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f'the recipe asks for wandb = {project!r}, but wandb is not installed: pip install wandb, or set wandb=""'
        ) from None
    return wandb.init(project=project, name=folder.name, dir=str(folder))


@cache
def machine_peak(dtype: torch.dtype, threads: int) -> float:
    """Multiplications and additions a second of `dtype` that `threads` threads reach in a loop on registers alone.

    The best of a tenth of a second, once a process: a neighbour on the machine only ever makes it too low. 0 where there is
    no such loop for the dtype.
    """
    from glm5 import _native

    peak = {torch.float32: b"float32", torch.bfloat16: b"bf16"}.get(dtype)
    if peak is None:
        return 0.0
    measure = _native._lib.glm5_peak_flops
    measure.restype, measure.argtypes = c_double, [c_char_p, c_int64]
    best, end = 0.0, time.perf_counter() + 0.1
    while not best or time.perf_counter() < end:
        start = time.perf_counter()
        best = max(best, measure(peak, 8 * threads) / (time.perf_counter() - start))
    return best


class Progress:
    """One line that rewrites itself on a terminal, or about twenty lines a stage elsewhere."""

    def __init__(self, label: str, total: int, stream=None):
        self.label, self.total, self.stream = label, total, stream or sys.stderr
        self._live = self.stream.isatty()
        self._every = 1 if self._live else max(1, total // 20)
        self._marks: list[tuple[int, float]] = []  # (step, when), the last few: speed is measured over these

    def update(self, step: int, tokens_per_step: int, **values: float) -> float:
        """Shows `step` updates done. Returns tokens/s over the last steps."""
        self._marks = [*self._marks[-20:], (step, time.perf_counter())]
        (first, begun), (last, now) = self._marks[0], self._marks[-1]
        speed = (last - first) / (now - begun) if last > first else 0.0
        if step % self._every == 0 or step == self.total:
            filled = 20 * step // self.total
            left = f"{(self.total - step) / speed:4.0f} s left" if speed else ""
            shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
            bar = "━" * filled + "·" * (20 - filled)
            line = f"{self.label:11} {bar} {step:>5}/{self.total}  {shown}  {speed * tokens_per_step:,.0f} tokens/s  {left}"
            self.stream.write(f"\r\033[K{line}" if self._live else f"{line}\n")
            self.stream.flush()
        return speed * tokens_per_step

    def close(self) -> None:
        if self._live:
            self.stream.write("\n")
