"""rope against the usual torch expressions. Work is the bytes that must move."""

import torch

from benchmarks.harness import Case
from glm5 import ops

bf16 = torch.bfloat16


def torch_rope(x, cos, sin, positions, interleaved):
    """As Transformers does it: float32 tables, a rotated copy."""
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    else:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return (x * cos + turned * sin).to(x.dtype)


def cases(quick: bool):
    """The rope part of 64 heads of queries (a strided view), and of one shared key."""
    angles = torch.arange(8192)[:, None] * 1e6 ** (-torch.arange(32) / 32)
    cos, sin = angles.cos(), angles.sin()
    for heads in (64, 1):
        for interleaved in (True, False):
            tokens = 1024 if heads > 1 else 8192
            x, positions = torch.randn(tokens, heads, 256).to(bf16)[..., 192:], torch.arange(tokens)
            yield Case(
                f"rope bf16 {tokens} tokens, {heads} heads, {'interleaved' if interleaved else 'half-split'}",
                lambda x=x, p=positions, i=interleaved: ops.rope(x, cos, sin, p, i),
                lambda x=x, p=positions, i=interleaved: torch_rope(x, cos, sin, p, i),
                work=4.0 * x.numel(), peak="read",
            )  # fmt: skip
