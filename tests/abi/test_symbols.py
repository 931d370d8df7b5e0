"""One ops binary for torch 2.10 and later and for any Python: what libglm5_ops.so needs from outside."""

from pathlib import Path

import pytest
import torch
from elftools.elf.elffile import ELFFile

from glm5 import _native

STABLE = Path(__file__).with_name("torch_2_10_stable_symbols.txt")
# glibc 2.34 and GCC 11's libstdc++: what the manylinux_2_34 tag promises.
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)}


@pytest.fixture(scope="module")
def elf():
    with open(_native.library_path, "rb") as file:
        yield ELFFile(file)


def stable_symbols() -> set[str]:
    return {line for line in STABLE.read_text().splitlines() if line and not line.startswith("#")}


def version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("."))


def undefined(elf) -> dict[str, str | None]:
    """Symbol -> the version it is bound to (None for torch's, which have none)."""
    versions, needed = elf.get_section_by_name(".gnu.version"), elf.get_section_by_name(".gnu.version_r")
    names = {}
    for i, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
        if symbol.name and symbol["st_shndx"] == "SHN_UNDEF":
            index = versions.get_symbol(i)["ndx"]
            found = needed.get_version(index) if isinstance(index, int) and index > 1 else None
            names[symbol.name] = found[1].name if found else None
    return names


def test_only_stable_symbols_of_torch_2_10(elf):
    weak = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
    foreign = {name for name, bound in undefined(elf).items() if bound is None} - weak
    assert "torch_library_impl" in foreign or "aoti_torch_library_impl" in foreign
    assert not foreign - stable_symbols()


def test_system_libraries_of_manylinux_2_34(elf):
    for name, bound in undefined(elf).items():
        if bound and bound.count("_") == 1:
            library, number = bound.split("_")
            assert version(number) <= NEWEST[library], f"{name} needs {bound}"


def test_needs_torch_and_the_c_library_alone(elf):
    tags = list(elf.get_section_by_name(".dynamic").iter_tags())
    needed = {t.needed for t in tags if t.entry.d_tag == "DT_NEEDED"}
    assert needed <= {"libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"}
    assert not [t for t in tags if t.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]


def test_is_free_of_python(elf):
    assert not [name for name in undefined(elf) if name.startswith(("Py", "_Py"))]


def test_this_torch_keeps_every_stable_symbol_of_2_10():
    """torch's promise, which ours stands on."""
    with open(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so", "rb") as file:
        exported = {
            s.name for s in ELFFile(file).get_section_by_name(".dynsym").iter_symbols() if s["st_shndx"] != "SHN_UNDEF"
        }
    listed = {line for line in STABLE.read_text().split("\n") if line and not line.startswith("#")}
    assert not listed - exported
