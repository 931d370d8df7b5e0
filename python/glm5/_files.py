"""Files that are there whole or not at all, after a kill or a power cut too. What they hold is not known here."""

import os
from pathlib import Path

TEMPORARY = ".tmp-"  # begins the name of what is not finished


def write_synced(path: Path, raw: bytes) -> None:
    """Writes and flushes to the disk."""
    with open(path, "wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Flushes what another writer put into `path`."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flushes the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """`text` as the whole content of `path`: the old content or the new one is there, never a part.

    Raises:
        OSError: the disk is full or cannot be written; it names `path`, and the old content stays.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        write_synced(temporary, text.encode())
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync_folder(path.parent)
