"""The routed experts of a GLM-5 layer (6144 -> 2048 -> 6144, top-8), put together from the ops, against kt-kernel and torch.

64 of the 256 experts, for memory: each gets the rows of a batch four times as large. Weights come from memory, as no cache
holds a layer's. kt-kernel multiplies FP8 weights with bf16 activations, ours quantises those in blocks of 128 as in
DeepSeek-V3; for int4 weights both quantise them to int8, kt-kernel by groups of 32, ours by rows. The note says how far each
is from float32 on the same dequantised weights.
"""

import os
import sys
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import Case
from glm5 import ops

bf16 = torch.bfloat16
DIM, INNER, TOPK, EXPERTS = 6144, 2048, 8, 64
DIFFERENT = 4  # experts with weights of their own; the others are copies of them, elsewhere in memory


def spread(different: torch.Tensor, experts: int) -> torch.Tensor:
    return different.repeat(experts // DIFFERENT, *[1] * (different.dim() - 1))


class Bf16Experts:
    """Weights as they are."""

    peak_bytes = 2.0

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor, experts: int):
        self.dense = w13, w2
        self.w13, self.w2 = spread(w13, experts), spread(w2, experts)

    def __call__(self, x, ids, weights):
        xp, _, slots, ends = ops.moe_permute(x, ids, len(self.w13))
        y = ops.grouped_linear(ops.silu_mul(ops.grouped_linear(xp, self.w13, ends)), self.w2, ends)
        return ops.moe_unpermute(y, slots, weights)


class Fp8Experts:
    """e4m3 weights in blocks of 128 x 128, activations in blocks of 1 x 128."""

    peak_bytes = 1.0

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor, experts: int):
        quantised = [ops.quantize_fp8(w, block=(128, 128)) for w in (w13, w2)]
        self.dense = [ops.dequantize_fp8(*q, block=(128, 128)) for q in quantised]
        (self.w13, self.s13), (self.w2, self.s2) = (
            (spread(q.view(torch.uint8), experts).view(q.dtype), spread(s, experts)) for q, s in quantised
        )

    def __call__(self, x, ids, weights):
        xp, _, slots, ends = ops.moe_permute(x, ids, len(self.w13))
        h = ops.fp8_grouped_gemm(*ops.quantize_fp8(xp), self.w13, self.s13, ends)
        y = ops.fp8_grouped_gemm(*ops.silu_mul_quantize(h), self.w2, self.s2, ends)
        return ops.moe_unpermute(y, slots, weights)


class W4a8Experts:
    """int4 weights in groups of 32 (kt-kernel has no other on AMX), scales that bf16 can hold; int8 activations."""

    peak_bytes = 0.5 + 4 / 32

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor, experts: int):
        self.canonical = []
        for w in (w13, w2):
            packed, scale, _ = ops.quantize_int4(w, group_size=32)
            self.canonical.append((packed, scale.to(bf16).float()))
        self.dense = [ops.dequantize_int4(*q) for q in self.canonical]
        self.w13, self.w2 = (spread(ops.w4a8_prepack(*q), experts) for q in self.canonical)

    def __call__(self, x, ids, weights):
        xp, _, slots, ends = ops.moe_permute(x, ids, len(self.w13))
        h = ops.w4a8_grouped_gemm(*ops.quantize_int8(xp), self.w13, ends)
        y = ops.w4a8_grouped_gemm(*ops.silu_mul_quantize(h, torch.int8), self.w2, ends)
        return ops.moe_unpermute(y, slots, weights)


@contextmanager
def quiet_stdout():
    """kt-kernel talks on standard output, where the tables go."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


class KtExperts:
    """kt-kernel's layer on the weights of ours, in its own layout."""

    _pools: dict = {}

    def __init__(self, kt, ours: Fp8Experts | W4a8Experts, experts: int):
        from kt_kernel.utils import amx

        moe, threads = kt.kt_kernel_ext.moe, torch.get_num_threads()
        if threads not in self._pools:
            pool = kt.kt_kernel_ext.WorkerPoolConfig()
            pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
            self._pools[threads] = kt.kt_kernel_ext.CPUInfer(pool)
        self.pool = self._pools[threads]
        fp8 = isinstance(ours, Fp8Experts)
        if fp8:
            w13, s13, w2, s2 = (t[:DIFFERENT] for t in (ours.w13, ours.s13, ours.w2, ours.s2))
        else:  # code + 8 in place of two's complement
            (w13, s13), (w2, s2) = ((packed ^ 0x88, scale.to(bf16)) for packed, scale in ours.canonical)
        half, half_scales = w13.shape[1] // 2, s13.shape[1] // 2
        self.elsewhere = torch.zeros(experts, dtype=torch.bool)  # read at every call
        config = moe.MOEConfig(experts, TOPK, DIM, INNER, self.elsewhere.data_ptr())
        config.layer_idx, config.pool, config.max_len = 0, self.pool.backend_, 1024
        for name, w, s in (
            ("gate", w13[:, :half], s13[:, :half_scales]),
            ("up", w13[:, half:], s13[:, half_scales:]),
            ("down", w2, s2),
        ):
            setattr(config, f"{name}_projs", [[w[e % DIFFERENT].data_ptr() for e in range(experts)]])
            setattr(config, f"{name}_scales", [[s[e % DIFFERENT].data_ptr() for e in range(experts)]])
        config.quant_config.bits, config.quant_config.group_size = (8, 128) if fp8 else (4, 32)
        config.quant_config.zero_point = False
        self.moe = (amx.AMXFP8_MOE if fp8 else amx._select_rawint4_backend(32))(config)
        order = torch.arange(experts)
        self.pool.submit(self.moe.load_weights_task(order.data_ptr()))  # copies them into a layout of its own
        self.pool.sync()

    def prepared(self, x, ids, weights):
        """A call without arguments, which gives the layer's output."""
        tokens, ids, out = torch.tensor([len(x)], dtype=torch.int32), ids.long(), torch.empty_like(x)

        def call():
            pointers = (t.data_ptr() for t in (ids, weights, x, out))
            self.pool.submit(self.moe.forward_task(tokens.data_ptr(), TOPK, *pointers, False))
            self.pool.sync()
            return out

        return call


def torch_loop(ours: Bf16Experts, x, ids, weights):
    """Expert by expert, as Transformers does it."""
    out = torch.zeros(x.shape)
    for e in range(len(ours.w13)):
        rows, column = (ids == e).nonzero(as_tuple=True)
        gate, up = F.linear(x[rows], ours.w13[e]).chunk(2, -1)
        out.index_add_(0, rows, F.linear(F.silu(gate) * up, ours.w2[e]).float() * weights[rows, column, None])
    return out.to(bf16)


def float32_rows(dense, x, ids, weights) -> torch.Tensor:
    """The layer in float32 on weights that are what the quantised ones stand for."""
    w13, w2 = dense
    out = torch.zeros(x.shape)
    for e in range(DIFFERENT):
        rows, column = (ids % DIFFERENT == e).nonzero(as_tuple=True)
        gate, up = F.linear(x[rows].float(), w13[e].float()).chunk(2, -1)
        out.index_add_(0, rows, F.linear(F.silu(gate) * up, w2[e].float()) * weights[rows, column, None])
    return out


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got[: len(want)].float() - want).norm() / want.norm()).item()


def cases(quick: bool):
    experts = 8 if quick else EXPERTS
    kt = peers.library("kt")
    dense = [
        torch.empty(DIFFERENT, *shape, dtype=bf16).normal_(std=shape[1] ** -0.5)
        for shape in ((2 * INNER, DIM), (DIM, INNER))
    ]
    goals = {Bf16Experts: None, Fp8Experts: 1.5, W4a8Experts: 2.0}
    for kind, goal in goals.items():
        name = kind.__name__.removesuffix("Experts").lower()
        ours = kind(*dense, experts)
        theirs = None
        if kt and kind is not Bf16Experts:
            with quiet_stdout():
                theirs = KtExperts(kt, ours, experts)
        for batch in (64,) if quick else (64, 256):
            x = torch.randn(batch, DIM).to(bf16)
            weights, ids = ops.moe_router(torch.randn(batch, experts), torch.zeros(experts), TOPK, scaling=2.5)
            call = lambda a=(x, ids, weights), f=ours: f(*a)  # noqa: E731
            if kind is Bf16Experts:
                peer, options = lambda a=(ours, x, ids, weights): torch_loop(*a), {"peer_name": "torch loop"}
            elif theirs:
                peer, options = theirs.prepared(x, ids, weights), {"peer_name": "kt-kernel", "library": "kt"}
            else:
                peer, options = None, {}
            want = float32_rows(ours.dense, x[:16], ids[:16], weights[:16])
            off = f"error {error(call(), want):.1e}" + (f", the peer's {error(peer(), want):.1e}" if peer else "")
            yield Case(
                f"expert ffn {name} batch {batch}, top-{TOPK} of {experts}", call, peer, peak="read",
                work=ours.peak_bytes * experts * 3 * DIM * INNER, goal_ratio=None if quick else goal, note=off, **options,
            )  # fmt: skip
