"""TensorBoard's event files, written without TensorBoard: scalars alone.

A file is a row of records (TFRecord: length, its checksum, bytes, their checksum; crc32c, masked), each an ``Event`` in the
wire format of protocol buffers (tensorflow/core/util/event.proto).
"""

import struct
import time
from pathlib import Path


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum of `data`."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def record(data: bytes) -> bytes:
    """`data` framed as a TFRecord."""
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _block(field: int, data: bytes) -> bytes:
    """A field of bytes: text, or a message within a message."""
    return bytes([field << 3 | 2]) + _varint(len(data)) + data


def scalars_event(when: float, step: int, values: dict[str, float]) -> bytes:
    """An ``Event`` with a ``Summary`` of scalars: wall_time 1, step 2, summary 5; of a value tag 1, simple_value 2."""
    summary = b"".join(
        _block(1, _block(1, tag.encode()) + b"\x15" + struct.pack("<f", value)) for tag, value in values.items()
    )
    return b"\x09" + struct.pack("<d", when) + b"\x10" + _varint(step) + _block(5, summary)


class EventFile:
    """The event file of `folder`; one that is there is replaced, so that what is written now is all there is.

    OSErrors of a full disk are the caller's.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        now = time.time()
        # the host and the process are part of the name by custom; TensorBoard reads neither
        self._file = open(folder / f"events.out.tfevents.{int(now):010d}.glm5", "wb", buffering=0)  # noqa: SIM115
        self._file.write(record(b"\x09" + struct.pack("<d", now) + _block(3, b"brain.Event:2")))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends scalars by tag."""
        self._file.write(record(scalars_event(time.time(), step, values)))

    def close(self) -> None:
        self._file.close()
