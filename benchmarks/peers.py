"""Which libraries ours is compared with: torch always, the others where they are installed.

A family module asks ``library("kt")`` for a module of it, and yields those cases only if there is one.
"""

import importlib

# Name in --against -> (module, how to get it).
LIBRARIES = {
    "torch": ("torch", "pip install torch"),
    "torchao": ("torchao", "pip install --no-deps torchao"),
    "kt": ("kt_kernel", "pip install --no-deps kt-kernel==0.7.2; pip install safetensors gguf"),
    "transformers": ("transformers", "pip install -c constraints.txt transformers"),
    "datasketch": ("datasketch", "pip install datasketch"),
}
_wanted: set[str] = set(LIBRARIES)
_missing: dict[str, str] = {}


def choose(names: list[str]) -> None:
    """From now on ours is compared with these alone; an empty list means all. Raises ValueError for an unknown name."""
    if unknown := [name for name in names if name not in LIBRARIES]:
        raise ValueError(f"--against does not know {', '.join(unknown)}; it knows {', '.join(LIBRARIES)}")
    _wanted.clear()
    _wanted.update(names or LIBRARIES)
    _missing.clear()


def wanted(name: str) -> bool:
    """Whether ours is to be compared with library ``name``."""
    return name in _wanted


def library(name: str):
    """The module of library ``name``; None where it is not wanted, or not installed (``skipped`` then says so)."""
    if not wanted(name):
        return None
    module, install = LIBRARIES[name]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        _missing[name] = f"{name} is skipped: {error} ({install})"
        return None


def skipped() -> list[str]:
    """A line for every library that was asked for and is not here."""
    return list(_missing.values())
