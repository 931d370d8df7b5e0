"""Where activations wait for the backward: beside the model in host memory, or in a file. A policy that can be watched.

Autograd hands over every tensor that a backward will need (``torch.autograd.graph.saved_tensors_hooks``); those that are
worth it are moved away and come back in the opposite order, the next ones being fetched while one is in use. On a machine
whose device is the host, "host" is a copy that saves nothing: it is there to be tested, and for devices. What is computed
again instead of being kept is the model's business (``model.checkpointing``); what is kept then are the layers' inputs.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from weakref import WeakValueDictionary

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


class _Kept:
    """One tensor that waits. Dies with the graph that needs it."""

    def __init__(self, number: int, tensor: torch.Tensor, offset: int, owner: "Offload"):
        self.number, self.offset, self.owner = number, offset, owner
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.bytes = tensor.numel() * tensor.element_size()
        self.copy: torch.Tensor | None = None  # in host memory
        self.coming: Future | None = None
        self.counted = False

    def __del__(self):
        if self.counted:
            self.owner._forget(self)


class Offload:
    """Moves saved tensors away within ``with offload.saving():``, which forward and backward must both lie in.

    Args:
        where: "host" or "file" (one without a name, in the folder for temporary files: set TMPDIR to a disk).
        stays: tensors that are there anyhow, and all that shares their memory: parameters, buffers, tables.
        least_bytes: smaller tensors stay where they are.
        prefetch: how many tensors are on their way back while one is in use.

    Attributes:
        events: (what, number, bytes) in order since ``clear``: "out" when tensor `number` leaves, "fetch" when it is sent
            for ahead of its use, "in" when it is used.
        bytes: by the same names, the sums since ``clear``.
        held, peak: bytes that wait now, and the most that ever did.

    Raises:
        ValueError: where is neither; the disk is full.
    """

    def __init__(self, where: str, stays: Iterable[torch.Tensor] = (), *, least_bytes: int = 1 << 16, prefetch: int = 2):
        if where not in ("host", "file"):
            raise ValueError(f"Offload: where is {where!r}, want 'host' or 'file'")
        self.where, self.least_bytes, self.prefetch = where, least_bytes, prefetch
        self._stays = {t.untyped_storage().data_ptr() for t in stays}
        self._file = tempfile.TemporaryFile(buffering=0) if where == "file" else None  # noqa: SIM115
        self._end = 0
        self._live: WeakValueDictionary[int, _Kept] = WeakValueDictionary()
        self._seen: dict[tuple, tuple[StorageWeakRef, int]] = {}
        self._number = 0
        self._thread = ThreadPoolExecutor(1)
        self.held = self.peak = 0
        self.clear()

    def clear(self) -> None:
        """Forgets events and sums; a step's are those since."""
        self.events: list[tuple[str, int, int]] = []
        self.bytes: Counter[str] = Counter()

    def saving(self) -> saved_tensors_hooks:
        """The context in which tensors are moved."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def close(self) -> None:
        """Ends the thread and removes the file."""
        self._thread.shutdown()
        if self._file is not None:
            self._file.close()

    def _pack(self, tensor: torch.Tensor):
        size, storage = tensor.numel() * tensor.element_size(), tensor.untyped_storage()
        small = size < self.least_bytes or storage.nbytes() < size  # the second: expanded, smaller than it looks
        if small or storage.data_ptr() in self._stays:
            return tensor
        # Several ops save the same activation: it waits once.
        alive = StorageWeakRef(storage)
        key = (alive.cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        before, number = self._seen.get(key, (None, -1))
        kept = self._live.get(number) if before is not None and not before.expired() else None
        if kept is None:
            kept = self._put(tensor.detach().contiguous())
            self._seen[key] = alive, kept.number
        return kept

    def _put(self, tensor: torch.Tensor) -> _Kept:
        kept = _Kept(self._number, tensor, self._end, self)
        if self._file is None:
            kept.copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor)
        else:
            raw = memoryview(tensor.cpu().view(-1).view(torch.uint8).numpy())
            try:
                while raw:
                    written = os.pwrite(self._file.fileno(), raw, self._end)
                    raw, self._end = raw[written:], self._end + written
            except OSError as error:
                raise ValueError(
                    f"offload to a file in {tempfile.gettempdir()}: {error.strerror}; make room, or set TMPDIR to "
                    "another disk"
                ) from error
        kept.counted = True
        self._number += 1
        self._live[kept.number] = kept
        self.held += kept.bytes
        self.peak = max(self.peak, self.held)
        self._note("out", kept)
        return kept

    def _unpack(self, packed) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        if packed.coming is None:
            packed.coming = self._thread.submit(self._get, packed)
        tensor = packed.coming.result()
        self._note("in", packed)
        ahead = (self._live.get(number) for number in range(packed.number - 1, max(packed.number - 64, -1), -1))
        for earlier in islice((kept for kept in ahead if kept is not None), self.prefetch):
            if earlier.coming is None:
                self._note("fetch", earlier)
                earlier.coming = self._thread.submit(self._get, earlier)
        return tensor

    def _get(self, kept: _Kept) -> torch.Tensor:
        if kept.copy is not None:
            return kept.copy.to(kept.device, non_blocking=True)
        raw = bytearray(kept.bytes)
        got, view = 0, memoryview(raw)
        while got < kept.bytes:
            got += os.preadv(self._file.fileno(), [view[got:]], kept.offset + got)
        return torch.frombuffer(raw, dtype=kept.dtype).view(kept.shape).to(kept.device)

    def _forget(self, kept: _Kept) -> None:
        self.held -= kept.bytes
        if self.held == 0:  # nothing waits: the file is written from its beginning again
            self._end = 0
            self._seen.clear()

    def _note(self, what: str, kept: _Kept) -> None:
        self.events.append((what, kept.number, kept.bytes))
        self.bytes[what] += kept.bytes
