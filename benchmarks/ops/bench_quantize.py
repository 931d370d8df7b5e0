"""Quantisation against the same in torch's own operations, and against torchao's. Work is the bytes that must move."""

import torch

from benchmarks import peers
from benchmarks.harness import Case
from glm5 import ops

bf16 = torch.bfloat16


def torch_quantize_fp8(x):
    """1 x 128 blocks."""
    blocks = x.float().unflatten(-1, (-1, 128))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448
    return (blocks / scale).flatten(-2).to(torch.float8_e4m3fn), scale.squeeze(-1)


def torch_quantize_fp8_tiles(w):
    """128 x 128 blocks."""
    blocks = w.float().unflatten(-1, (-1, 128)).unflatten(0, (-1, 128))
    scale = blocks.abs().amax((1, 3), keepdim=True).clamp_min(1e-4) / 448
    return (blocks / scale).flatten(0, 1).flatten(-2).to(torch.float8_e4m3fn), scale.squeeze()


def torch_dequantize_fp8(q, scale):
    return (q.float().unflatten(-1, (-1, 128)) * scale[..., None]).flatten(-2).to(bf16)


def torch_quantize_int8(x):
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 127
    return (x / scale).round().to(torch.int8), scale.squeeze(-1)


def torch_quantize_int4(w, group_size):
    """Symmetric."""
    groups = w.float().unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    codes = (groups / scale).round().flatten(-2).to(torch.int8) & 15
    return codes[..., 0::2] | codes[..., 1::2] << 4, scale.squeeze(-1)


def torch_dequantize_int4(packed, scale, group_size):
    codes = torch.stack([packed << 4, packed], -1).view(torch.int8).flatten(-2) >> 4
    return (codes.float().unflatten(-1, (-1, group_size)) * scale[..., None]).flatten(-2).to(bf16)


def torch_fake_quantize_int4(w, group_size):
    groups = w.float().unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    return ((groups / scale).round() * scale).flatten(-2).to(bf16)


def torchao_cases(x: torch.Tensor, size: str):
    """FP8 in blocks, and int8 rows without a zero point, as torchao's tensors are made of a bf16 one."""
    if not peers.library("torchao"):
        return
    from torchao.quantization import Float8Tensor, Int8Tensor
    from torchao.quantization.granularity import PerBlock, PerRow

    both = (
        ("quantize_fp8 1x128", lambda: ops.quantize_fp8(x), lambda: Float8Tensor.from_hp(x, granularity=PerBlock([1, 128]))),
        (
            "quantize_fp8 128x128", lambda: ops.quantize_fp8(x, (128, 128)),
            lambda: Float8Tensor.from_hp(x, granularity=PerBlock([128, 128])),
        ),
        ("quantize_int8", lambda: ops.quantize_int8(x), lambda: Int8Tensor.from_hp(x, PerRow())),
    )  # fmt: skip
    for name, ours, theirs in both:
        yield Case(
            f"{name} {size} beside torchao", ours, theirs, work=3.0 * x.numel(), peak="read", peer_name="torchao",
            library="torchao",
        )  # fmt: skip


def cases(quick: bool):
    """Activations and weights larger than the caches."""
    rows, columns = (2048, 6144) if quick else (8192, 6144)
    count = float(rows * columns)
    x = torch.randn(rows, columns).to(bf16)
    size = f"bf16 {rows}x{columns}"
    yield Case(
        f"quantize_fp8 1x128 {size}", lambda: ops.quantize_fp8(x), lambda: torch_quantize_fp8(x), work=3 * count, peak="read"
    )
    yield Case(
        f"quantize_fp8 128x128 {size}", lambda: ops.quantize_fp8(x, (128, 128)), lambda: torch_quantize_fp8_tiles(x),
        work=3 * count, peak="read",
    )  # fmt: skip
    q, scale = ops.quantize_fp8(x)
    yield Case(
        f"dequantize_fp8 1x128 {size}", lambda: ops.dequantize_fp8(q, scale), lambda: torch_dequantize_fp8(q, scale),
        work=3 * count, peak="read",
    )  # fmt: skip
    yield Case(
        f"quantize_int8 {size}", lambda: ops.quantize_int8(x), lambda: torch_quantize_int8(x), work=3 * count, peak="read"
    )
    for group in (128, 32):
        yield Case(
            f"quantize_int4 g{group} {size}", lambda group=group: ops.quantize_int4(x, group),
            lambda group=group: torch_quantize_int4(x, group), work=2.5 * count, peak="read",
        )  # fmt: skip
        packed, scales, _ = ops.quantize_int4(x, group)
        yield Case(
            f"dequantize_int4 g{group} {size}", lambda p=packed, s=scales: ops.dequantize_int4(p, s),
            lambda p=packed, s=scales, group=group: torch_dequantize_int4(p, s, group), work=2.5 * count, peak="read",
        )  # fmt: skip
        yield Case(
            f"fake_quantize_int4 g{group} {size}", lambda group=group: ops.fake_quantize_int4(x, group),
            lambda group=group: torch_fake_quantize_int4(x, group), work=4 * count, peak="read",
        )  # fmt: skip
    yield from torchao_cases(x, size)
