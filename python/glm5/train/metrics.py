"""What a run tells: ``metrics.jsonl``, one object a line, and a progress line on the terminal."""

import json
import os
import sys
import time
from pathlib import Path


class MetricsLog:
    """Appends to a JSON-lines file. Checkpoints store its length, so that a resumed run drops what it will do again."""

    def __init__(self, path: Path):
        self.path = Path(path)
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
        except OSError as error:
            raise self._failed(error) from error

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

    def close(self) -> None:
        self._file.close()


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
