"""Every instruction set stays in its own namespace: no AVX-512 register in AVX2 code, no AVX register in portable code.

The libraries of other people's machines depend on it: one merged inline function, and an old processor stops with SIGILL.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from glm5 import _native

pytestmark = pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")

WIDE = re.compile(r"%zmm|%k[1-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b")  # only AVX-512 has these
AVX = re.compile(r"%[yz]mm|\tv[a-z]")  # three-operand (VEX and EVEX) mnemonics start with v
TILES = re.compile(r"\ttdp|\ttile|\tldtilecfg|%tmm")
SYMBOL = re.compile(r"^[0-9a-f]+ <(.*)>:$")


def objdump(*arguments) -> str:
    return subprocess.run(["objdump", "--demangle", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def functions():
    """(demangled name, its instructions) for every function of libglm5_ops.so."""
    found, name, lines = [], None, []
    for line in objdump("--disassemble", "--no-show-raw-insn", _native.library_path).splitlines():
        if start := SYMBOL.match(line):
            found.append((name, lines))
            name, lines = start.group(1), []
        elif name:
            lines.append(line)
    found.append((name, lines))
    return [(name, "\n".join(lines)) for name, lines in found if name]


def namespace(function: str) -> str:
    """The instruction set whose code this is, from the function's own name (its arguments may be of any)."""
    match = re.search(r"glm5::cpu::(portable|avx2|avx512|amx)::", function)
    return match.group(1) if match else "common"


def test_every_set_has_its_code(functions):
    assert {namespace(name) for name, _ in functions} >= {"portable", "avx2", "avx512", "common"}


def test_no_avx_outside_the_sets_that_have_it(functions):
    guilty = [name for name, code in functions if namespace(name) in ("portable", "common") and AVX.search(code)]
    assert not guilty


def test_no_avx512_in_avx2(functions):
    guilty = [name for name, code in functions if namespace(name) == "avx2" and WIDE.search(code)]
    assert not guilty


def test_tiles_in_amx_alone(functions):
    guilty = [
        name for name, code in functions if namespace(name) != "amx" and re.search(r"\ttdp|\ttile|\tldtilecfg|%tmm", code)
    ]
    assert not guilty


def test_kernel_objects_define_nothing_that_the_linker_could_merge():
    """The linker keeps one copy of a weak function (std::sort<float*>, say), and it may be the one compiled for AVX-512.
    A kernel object may define weak functions in its own set's namespace only."""
    checkout = Path(__file__).parents[2]
    builds = [b for b in checkout.glob("build/*/.ninja_log") if b.parent.name != "sanitized"]
    if not builds:
        pytest.skip("no object files here: the library was built elsewhere")
    objects = list(max(builds, key=lambda b: b.stat().st_mtime).parent.glob("CMakeFiles/glm5_*_*.dir/**/*.o"))
    assert len(objects) >= 3
    guilty = []
    for path in objects:
        isa = re.search(r"CMakeFiles/glm5_\w+_(portable|avx2|avx512|amx)\.dir", str(path)).group(1)
        symbols = subprocess.run(
            ["objdump", "--syms", "--demangle", path], check=True, capture_output=True, text=True
        ).stdout
        weak = re.findall(r"^[0-9a-f]+ +w +F \.\S+\t[0-9a-f]+ +(?:\.hidden )?(.*)$", symbols, re.M)
        guilty += [f"{path.name} ({isa}): {name}" for name in weak if f"glm5::cpu::{isa}::" not in name]
    assert not guilty
