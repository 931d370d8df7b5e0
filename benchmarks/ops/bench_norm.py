"""rms_norm and layer_norm against torch's own, forward and backward. Work is the bytes that must move."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Case
from glm5 import ops

bf16 = torch.bfloat16


def cases(quick: bool):
    """GLM-5's hidden size, the indexer's keys, the tiny model."""
    for op, peer, rows, dim in (
        (ops.rms_norm, F.rms_norm, 4096, 6144),
        (ops.rms_norm, F.rms_norm, 4096, 128),
        (ops.layer_norm, F.layer_norm, 32768, 128),
    )[: 2 if quick else 3]:
        x, parameters = torch.randn(rows, dim).to(bf16), [torch.randn(dim).to(bf16) for _ in range(2)]
        parameters = parameters[: 1 if op is ops.rms_norm else 2]
        yield Case(
            f"{op.__name__} bf16 {rows}x{dim}", lambda x=x, p=parameters, op=op: op(x, *p, 1e-6),
            lambda x=x, p=parameters, peer=peer: peer(x, x.shape[-1:], *p, eps=1e-6), work=4.0 * rows * dim, peak="read",
        )  # fmt: skip
        leaves, dy = [t.clone().requires_grad_() for t in (x, *parameters)], torch.randn(rows, dim).to(bf16)
        yield Case(
            f"{op.__name__} + backward bf16 {rows}x{dim}",
            lambda a=leaves, op=op, dy=dy: torch.autograd.grad(op(*a, 1e-6), a, dy),
            lambda a=leaves, peer=peer, dy=dy: torch.autograd.grad(peer(a[0], a[1].shape, *a[1:], eps=1e-6), a, dy),
            work=10.0 * rows * dim, peak="read",
        )  # fmt: skip
