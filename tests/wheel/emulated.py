"""Runs one case of every op from the installed wheel on older processors: `python emulated.py PYTHON_WITH_THE_WHEEL`.

`make emulate` calls it. Debian's qemu-user stands in for the processors: a Haswell has AVX2 and no AVX-512, a Nehalem has
SSE4.2 and nothing newer. An instruction that the processor lacks ends the run with SIGILL.
"""

import os
import shutil
import subprocess
import sys

PROCESSORS = {"Haswell": "avx2", "Nehalem": "portable"}

CASE = """
import sys, time
import torch, glm5.ops
from glm5 import _native, testing

torch.set_num_threads(1)
want, cpu = sys.argv[1:]
assert _native.available_isas()[-1] == _native.cpu_isa() == want, (_native.available_isas(), _native.cpu_isa())
for name in sorted(glm5.ops.__all__):
    start = time.monotonic()
    report = testing.check(name, examples=1, properties=["accuracy", "gradient"])
    assert report.ok, report
    print(f"{cpu}: {name} agrees with its reference on {want} ({time.monotonic() - start:.1f} s)", flush=True)
"""

if __name__ == "__main__":
    python = os.path.abspath(sys.argv[1])
    qemu = shutil.which("qemu-x86_64")
    if not qemu:
        sys.exit("emulated.py: qemu-x86_64 is not installed (Debian: apt-get install qemu-user)")
    for cpu, isa in PROCESSORS.items():
        environment = {k: v for k, v in os.environ.items() if k != "GLM5_CPU_ISA"}
        command = [qemu, "-cpu", cpu, python, "-I", "-c", CASE, isa, cpu]
        # qemu warns of features that no op needs (TSX, PCID); what fails speaks on stderr too, so it is shown then.
        result = subprocess.run(command, env=environment, cwd="/", stderr=subprocess.PIPE, text=True)
        if result.returncode:
            sys.exit(f"{result.stderr}\n{cpu}: failed with status {result.returncode}")
