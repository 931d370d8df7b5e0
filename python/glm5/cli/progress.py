"""A progress bar of bytes or numbers on standard error, where that is a terminal."""

import sys


class Bar:
    """Call it with (done, total); use it as a context manager, so that the line is left clean."""

    def __init__(self, label: str, stream=None):
        self.label, self.stream = label, stream or sys.stderr
        self._live, self._share = self.stream.isatty(), None

    def __call__(self, done: int, total: int) -> None:
        share = 100 * done // max(total, 1)
        if self._live and share != self._share:
            self._share, filled = share, share // 5
            self.stream.write(f"\r\033[K{self.label} {'━' * filled}{'·' * (20 - filled)} {share:3} %")
            self.stream.flush()

    def __enter__(self) -> "Bar":
        self(0, 1)
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self.stream.write("\r\033[K")
            self.stream.flush()
