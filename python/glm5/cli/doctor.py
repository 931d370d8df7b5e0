"""Show versions, the instruction set in use, threads, and which kernels every op has here.

For a bug report, and for a first look at what an installation can do. Changes nothing.
"""

import os
import platform
import sys
from importlib import metadata

NAME = "doctor"

# What becomes of the memory of large outputs, as _native.large_output_memory() names it.
MEMORY = {
    "kept": "of outputs of 32 MiB and more is kept for the next ones, 512 MiB at most",
    "unwanted": "of large outputs is given back at once (GLM5_KEEP_MEMORY is 0)",
    "unkept by torch": "of large outputs is given back at once, which is slower: torch before 2.11 has no way to keep it",
}

# Dispatch keys of torch, with the name this table gives them.
KERNELS = {"CPU": "CPU", "CUDA": "CUDA", "Meta": "fake", "Autograd": "autograd", "AutocastCPU": "autocast"}


def add_arguments(parser) -> None:
    """``glm5 doctor`` takes no argument."""


def op_kernels() -> dict[str, dict[str, bool]]:
    """For every op of the ``glm5`` torch library, in order of name: kernel kind -> whether one is registered."""
    import torch

    import glm5.ops  # noqa: F401  (registers the ops and their fake kernels)

    names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("glm5::"))
    return {
        name.removeprefix("glm5::"): {
            kind: torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key, kind in KERNELS.items()
        }
        for name in names
    }


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def run(args) -> int:
    """Prints the report. Returns 1 when ``GLM5_CPU_ISA`` cannot be honoured, so that scripts can tell."""
    import torch

    import glm5
    from glm5 import _native

    print(f"glm5      {glm5.__version__}  ({os.path.dirname(glm5.__file__)})")
    print(f"python    {platform.python_version()}  ({sys.executable})")
    print(f"torch     {torch.__version__}")
    print("          " + ", ".join(f"{name} {_version(name)}" for name in ("numpy", "pydantic", "safetensors")))
    print(f"system    {platform.system()} {platform.machine()}, {_cpu_name()}")
    print(f"CUDA      {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no device'}")
    print(f"threads   {torch.get_num_threads()} of {os.cpu_count()} cores")

    print(f"memory    {MEMORY[_native.large_output_memory()]}")
    print(f"CPU sets  {', '.join(_native.available_isas())}")
    forced = os.environ.get("GLM5_CPU_ISA")
    try:
        print(f"in use    {_native.cpu_isa()}  (GLM5_CPU_ISA {'is ' + forced if forced else 'is not set'})")
        status = 0
    except ValueError as error:
        print(f"in use    none: {error}")
        status = 1

    table = op_kernels()
    width = max(len(name) for name in table)
    print(f"\n{'op':{width}}  " + "  ".join(KERNELS.values()))
    for name, kernels in table.items():
        print(f"{name:{width}}  " + "  ".join(f"{'yes' if there else '-':{len(kind)}}" for kind, there in kernels.items()))
    return status
