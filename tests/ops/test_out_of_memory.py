"""An op that cannot get its memory: the caller sees a MemoryError that names the op, whichever thread wanted it."""

import re
import subprocess
import sys

import pytest
import torch

from glm5 import ops

PROGRAM = """
import resource, sys
import torch
from glm5 import ops

torch.set_num_threads(int(sys.argv[1]))
KEYS = 40_000  # the backward keeps some hundred numbers per key
leaves = [torch.randn(n, 2, 1, requires_grad=True) for n in (1, KEYS, KEYS)]
ends = torch.tensor([0], dtype=torch.int32), torch.tensor([KEYS], dtype=torch.int32)
small = [x[:4].detach().clone().requires_grad_() for x in leaves]
ops.mla_attention(*small, ends[0], ends[0] + 4, 1.0)[0].sum().backward()  # starts the threads
out = ops.mla_attention(*leaves, *ends, 1.0)[0].sum()
used = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1])
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + 2**23, limits[1]))
try:
    out.backward(retain_graph=True)
except MemoryError as error:
    print("MemoryError:", error)
resource.setrlimit(resource.RLIMIT_AS, limits)
out.backward()  # and the next call works
print(bool(leaves[1].grad.isfinite().all()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits the address space")
@pytest.mark.unsanitized  # AddressSanitizer ends the program instead
@pytest.mark.parametrize("threads", [1, 2])
def test_a_task_without_memory_is_a_memory_error(threads):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(threads)], capture_output=True, text=True, timeout=120)
    error, works = done.stdout.splitlines()
    words = r"MemoryError: mla_attention_backward: no memory for (\d+) bytes"
    found = re.fullmatch(words, error)
    assert found and int(found[1]) > 2**23 and works == "True", done.stdout + done.stderr


@pytest.mark.unsanitized
@pytest.mark.parametrize("k", [2**45, 2**62])
def test_an_output_without_memory_is_a_memory_error(k):
    with pytest.raises(MemoryError, match=r"topk_indices: no memory for \d+ bytes"):
        ops.topk_indices(torch.zeros(1, 1), k)
