"""Writing and reading the caches, against index_copy_ and index_select of torch; FP8 forms against torch's own casts."""

import torch

from benchmarks.harness import Case
from glm5 import ops

bf16 = torch.bfloat16


def cases(quick: bool):
    """Rows of a prefill chunk into, and a query's selection out of, pages of 64."""
    pages, rows = (512, 2048)
    slots = torch.randperm(pages * 64, generator=torch.Generator().manual_seed(0))[:rows]
    slots32 = slots.int()
    for dim, name in ((576, "latent"), (128, "indexer")):
        write = ops.latent_cache_write if name == "latent" else ops.indexer_cache_write
        x = torch.randn(rows, dim).to(bf16)
        cache = torch.zeros(pages, 64, dim, dtype=bf16)
        fp8 = torch.zeros(pages, 64, 656 if name == "latent" else dim + 4, dtype=torch.uint8)
        flat = cache.view(-1, dim)

        def quantise_in_torch(x=x, dim=dim):
            quantised = x[:, : dim // 128 * 128].float().view(rows, -1, 128)
            scale = quantised.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448
            return (quantised / scale).to(torch.float8_e4m3fn), scale

        yield Case(
            f"{name}_cache_write bf16 {rows} x {dim}", lambda x=x, c=cache, w=write: w(x, slots32, c),
            lambda x=x, f=flat: f.index_copy_(0, slots, x), peer_name="index_copy_",
        )  # fmt: skip
        yield Case(
            f"{name}_cache_write fp8 {rows} x {dim}", lambda x=x, c=fp8, w=write: w(x, slots32, c), quantise_in_torch,
            peer_name="torch quantising alone",
        )  # fmt: skip
        if name == "latent":
            yield Case(
                f"latent_cache_read bf16 {rows} x {dim}", lambda c=cache: ops.latent_cache_read(c, slots32),
                lambda f=flat: f.index_select(0, slots), peer_name="index_select",
            )  # fmt: skip
            yield Case(
                f"latent_cache_read fp8 {rows} x {dim}", lambda c=fp8: ops.latent_cache_read(c, slots32),
                lambda f=flat: f.index_select(0, slots), peer_name="index_select of bf16",
            )  # fmt: skip
