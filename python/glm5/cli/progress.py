"""A progress bar of bytes or numbers on standard error, where that is a terminal."""

import sys


class Bar:
    """Call it with (done, total); use it as a context manager, so that the line is left clean."""

    def __init__(self, label: str, stream=None):
        self.label, self.stream = label, stream or sys.stderr
        self._live = self.stream.isatty()

    def __call__(self, done: int, total: int) -> None:
        if self._live:
            filled = 20 * done // max(total, 1)
            share = 100 * done // max(total, 1)
            self.stream.write(f"\r\033[K{self.label} {'━' * filled}{'·' * (20 - filled)} {share:3} %")
            self.stream.flush()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self.stream.write("\r\033[K")
            self.stream.flush()
