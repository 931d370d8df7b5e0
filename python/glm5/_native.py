"""Loads the compiled ops and speaks to their plain C side: which instruction set they run on, which code paths ran, what
becomes of the memory of large outputs.

Knows nothing about any single op. Importing it registers every op in the ``glm5`` torch library.
"""

import ctypes
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

import glm5

library_path = next((p for d in glm5.__path__ if (p := Path(d, "libglm5_ops.so")).exists()), None)
if library_path is None:
    raise ImportError(
        f"glm5: the compiled ops are missing (libglm5_ops.so in {' or '.join(glm5.__path__)}). "
        "In a checkout, build them with `make build`; otherwise reinstall the wheel."
    )
torch.ops.load_library(str(library_path))
_lib = ctypes.CDLL(str(library_path))
for _name in ("glm5_cpu_isa", "glm5_cpu_best_isa", "glm5_path_counts", "glm5_last_error", "glm5_large_output_memory"):
    getattr(_lib, _name).restype = ctypes.c_char_p
_lib.glm5_set_cpu_isa.argtypes = [ctypes.c_char_p]

ISAS = ("portable", "avx2", "avx512", "amx")


def cpu_isa() -> str:
    """The instruction set that CPU kernels run on: ``portable``, ``avx2``, ``avx512`` or ``amx``.

    Raises ValueError when ``GLM5_CPU_ISA`` names an unknown set or one that this processor lacks.
    """
    name = _lib.glm5_cpu_isa()
    if name is None:
        raise ValueError(_lib.glm5_last_error().decode())
    return name.decode()


def available_isas() -> tuple[str, ...]:
    """Every instruction set that this processor can run, the plainest first."""
    return ISAS[: ISAS.index(_lib.glm5_cpu_best_isa().decode()) + 1]


def set_cpu_isa(name: str) -> None:
    """Switches the whole process to instruction set ``name``; call it between ops, not during one.

    Raises ValueError when ``name`` is unknown or this processor lacks it.
    """
    if _lib.glm5_set_cpu_isa(name.encode()) != 0:
        raise ValueError(_lib.glm5_last_error().decode())


@contextmanager
def using_cpu_isa(name: str):
    """Runs a block on instruction set ``name``, then goes back."""
    before = cpu_isa()
    set_cpu_isa(name)
    try:
        yield
    finally:
        set_cpu_isa(before)


@contextmanager
def counted_paths():
    """Counts which kernel code paths a block runs. Yields a dict, name -> count, filled when the block ends."""
    counts: dict[str, int] = {}
    _lib.glm5_count_paths(1)
    try:
        yield counts
    finally:
        lines = _lib.glm5_path_counts().decode().splitlines()
        _lib.glm5_count_paths(0)
        counts.update((line.rsplit(" ", 1)[0], int(line.rsplit(" ", 1)[1])) for line in lines)


def large_output_memory() -> str:
    """What becomes of the memory of an output of 32 MiB and more: ``kept`` for the next one, or given back to the system
    because that is ``unwanted`` (``GLM5_KEEP_MEMORY=0``) or ``unkept by torch`` (before 2.11), which takes longer."""
    return _lib.glm5_large_output_memory().decode()


@ctypes.CFUNCTYPE(None)
def _tell_of_unkept_memory() -> None:
    warnings.warn(
        "outputs of 32 MiB and more take new memory from the system every time, and up to three times as long: torch "
        f"{torch.__version__} has no way to keep it for the next one, torch 2.11 has (GLM5_KEEP_MEMORY=0 silences this)",
        stacklevel=2,
    )


_lib.glm5_tell_of_unkept_memory(_tell_of_unkept_memory)
