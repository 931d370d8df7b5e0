"""Builds libglm5_ops.so and _runtime with CMake + Ninja; everything else about the package is in pyproject.toml.

Serves ``pip wheel .``, ``pip install .``, ``pip install -e .`` and the Makefile, all through one build folder per Python
(build/cpython-311). Libraries are copied from there to their final place under a temporary name and renamed, so that a
killed build never leaves half a library behind.

Environment: GLM5_TORCH_DIR (another torch package to build against), GLM5_JOBS (parallel compilations), CXX.
"""

import filecmp
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / sys.implementation.cache_tag


def torch_dir() -> Path:
    """Where torch is, or (before pip has unpacked it) where it is going to be."""
    if given := os.environ.get("GLM5_TORCH_DIR"):
        return Path(given).resolve()
    found = importlib.util.find_spec("torch")  # does not import it
    return Path(found.origin).parent if found and found.origin else Path(sysconfig.get_path("platlib")) / "torch"


def program(name: str) -> str:
    """A program of this environment, else one on PATH."""
    here = Path(sys.executable).parent / name
    found = str(here) if here.exists() else shutil.which(name)
    if not found:
        raise SystemExit(f"glm5: {name} is not installed; `pip install {name} -c constraints.txt` or use `make`")
    return found


def cmake_build(build: Path, target: str, *options: str, source: Path = ROOT) -> None:
    """Configures ``build`` unless it already is, in this very way, then builds ``target`` of the sources in ``source``."""
    if target == "all" and not (torch_dir() / "include/torch/csrc/stable/tensor.h").exists():
        raise SystemExit(f"glm5: no torch >= 2.10 in {torch_dir()}; install it (-c constraints.txt) or set GLM5_TORCH_DIR")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise SystemExit("glm5: Python's headers are missing (Debian: apt-get install python3-dev)")
    cmake, ninja = program("cmake"), program("ninja")
    configure = [
        cmake,
        "--fresh",
        "--log-level=WARNING",
        "-S",
        str(source),
        "-B",
        str(build),
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
    ]
    configure += [f"-DGLM5_TORCH_DIR={torch_dir()}", f"-DPython3_EXECUTABLE={sys.executable}"]
    configure += [f"-DGLM5_OUTPUT_DIR={build / 'lib'}", *options]
    stamp = build / "configured.txt"
    if not stamp.exists() or stamp.read_text() != "\n".join(configure):
        stamp.unlink(missing_ok=True)
        subprocess.run(configure, check=True)
        stamp.write_text("\n".join(configure))
    jobs = os.environ.get("GLM5_JOBS") or str(len(os.sched_getaffinity(0)))
    subprocess.run([cmake, "--build", str(build), "--parallel", jobs, "--target", target], check=True)


def install(library: Path, folder: Path) -> None:
    """Copies ``library`` into ``folder``; the old one is in place until the new one is complete."""
    target = folder / library.name
    if target.exists() and filecmp.cmp(library, target, shallow=False):
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{library.name}.new"
    shutil.copy2(library, temporary)
    temporary.replace(target)


class BuildLibraries(build_ext):
    """``build_ext``: both libraries, into the checkout (editable, --inplace) or the wheel's folder."""

    def run(self):
        cmake_build(BUILD, "all")
        into = ROOT / "python" if self.editable_mode or self.inplace else Path(self.build_lib)
        for library in (BUILD / "lib").glob("*.so"):
            install(library, into / "glm5")

    def get_outputs(self):
        return [] if self.editable_mode or self.inplace else [str(p) for p in Path(self.build_lib).glob("glm5/*.so")]

    def get_output_mapping(self):
        return {}


class BuildPython(build_py):
    """``build_py``: a wheel brings the benchmarks, for ``glm5 bench``; an editable install has them in its checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for source in (ROOT / "benchmarks").rglob("*.py"):
                target = Path(self.build_lib, "glm5/_bundled", source.relative_to(ROOT))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)


class BuildKernels(Command):
    """``build_kernels``: only what needs no torch; make runs it while pip unpacks torch."""

    user_options = []

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        cmake_build(BUILD, "glm5_kernels")


class BuildSanitized(BuildKernels):
    """``build_sanitized``: both libraries with ASan and UBSan, left in build/sanitized/lib (see GLM5_LIBRARY_DIR)."""

    def run(self):
        cmake_build(ROOT / "build" / "sanitized", "all", "-DGLM5_SANITIZE=ON")


class BuildFaulty(BuildKernels):
    """``build_faulty``: the portable ops with the faults of tests/mutation planted, left in build/faulty/lib."""

    def run(self):
        source = ROOT / "build" / "faulty" / "source"
        subprocess.run([sys.executable, ROOT / "tests" / "mutation" / "compiled.py", source], check=True)
        cmake_build(ROOT / "build" / "faulty", "glm5_ops", source=source)


setup(
    ext_modules=[Extension("glm5._runtime", sources=[])],
    cmdclass={
        "build_py": BuildPython,
        "build_ext": BuildLibraries,
        "build_kernels": BuildKernels,
        "build_sanitized": BuildSanitized,
        "build_faulty": BuildFaulty,
    },
)
