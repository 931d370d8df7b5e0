"""rotate_hadamard against a multiplication by the matrix."""

import torch

from benchmarks.harness import Case
from glm5 import ops


def cases(quick: bool):
    x = torch.randn(4096 * 32, 128).bfloat16()
    matrix = ops.rotate_hadamard(torch.eye(128)).bfloat16()
    yield Case(
        "rotate_hadamard bf16 131072 x 128", lambda: ops.rotate_hadamard(x), lambda: x @ matrix,
        work=4.0 * x.numel(), peak="read", peer_name="torch matmul",
    )  # fmt: skip
