"""Caches of pages on the compiled kernels: latent rows and indexer keys, in the model's dtype or in FP8.

Which page belongs to which sequence is the caller's business: here a row goes to a slot, page * page_size + place. What
reads pages through a block table is ``lightning_indexer_topk_paged``, ``sparse_mla_paged`` and ``mla_attention_paged``.
"""

import torch

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._checks import want_dtype, want_tensors
from glm5.ops._pages import latent_dims, want_latent_pool
from glm5.ops._register import compiled, fake, not_differentiable, want_that, writes_into

_latent_cache_write = compiled("latent_cache_write")
_latent_cache_read = compiled("latent_cache_read")
_indexer_cache_write = compiled("indexer_cache_write")


def latent_cache_write(rows: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:
    """Writes latent rows into their slots of a pool of pages, in place; everything else in the pool stays as it is.

    FP8 pages are those of FlashMLA's sparse decoding: a row of 512 + 64 dims is 512 e4m3 codes, 4 float32 scales, one for
    each 128 of them (``quantize_fp8``: max(amax, 1e-4) / 448), and 64 bfloat16 numbers, 656 bytes.

    Args:
        rows: [T, D], dtype of the cache; for FP8 bfloat16 or float32.
        slots: int32 [T], page * page_size + place; -1 skips the row. Where two rows have one slot the later stays.
        cache: [pages, page_size, D] bfloat16, float32 or float64, contiguous; or uint8 [pages, page_size, width] for FP8,
            width = 132 b + 2 r bytes for D = 128 b + r, r < 66.

    Returns:
        Nothing; ``cache`` is changed.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong dtype, shape or device; a cache that is not contiguous; a slot below -1 or not in the pool, before
            anything is written.
    """
    want_tensors("latent_cache_write", rows=rows, slots=slots, cache=cache)
    _latent_cache_write(rows, slots, cache)


def latent_cache_read(cache: torch.Tensor, slots: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """The latent rows in some slots of a pool, as ``latent_cache_write`` put them there.

    Args:
        cache: as in ``latent_cache_write``. One that is not contiguous is copied first.
        slots: int32 [T]; -1 gives a row of zeros.
        out_dtype: bfloat16 or float32 (float64 for a float64 cache); None is the cache's own, bfloat16 for FP8. FP8 values
            are code * scale in float32, rounded once.

    Returns:
        [T, D] of out_dtype. No gradient.

    Raises:
        TypeError: cache or slots is not a tensor, out_dtype not a dtype.
        ValueError: wrong dtype, shape or device; a slot below -1 or not in the pool.
    """
    want_tensors("latent_cache_read", cache=cache, slots=slots)
    if out_dtype is not None:
        want_dtype("latent_cache_read", out_dtype=out_dtype)
    return _latent_cache_read(cache, slots, out_dtype)


def indexer_cache_write(k: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:
    """Writes indexer keys into their slots of a pool of pages, in place; everything else in the pool stays as it is.

    FP8 pages have DeepGEMM's layout: page_size rows of e4m3 codes, then page_size float32 scales, one a row
    (max(amax, 1e-4) / 448 of the row).

    Args:
        k: [T, D], dtype of the cache; for FP8 bfloat16 or float32.
        slots: int32 [T], page * page_size + place; -1 skips the row. Where two rows have one slot the later stays.
        cache: [pages, page_size, D] bfloat16, float32 or float64, contiguous; or uint8 [pages, page_size, D + 4] for FP8.

    Returns:
        Nothing; ``cache`` is changed.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong dtype, shape or device; a cache that is not contiguous; a slot below -1 or not in the pool, before
            anything is written.
    """
    want_tensors("indexer_cache_write", k=k, slots=slots, cache=cache)
    _indexer_cache_write(k, slots, cache)


def _want_contiguous(op, cache):
    want_that(cache.is_contiguous(), op, "cache has shape", cache.shape, "a contiguous pool to write into")


def _rows(arguments):
    return "bfloat16/float32" if arguments["cache"].dtype == torch.uint8 else "cache"


@fake(
    "latent_cache_write",
    cache="float/uint8 [P, S+, W]",
    rows=lambda arguments: f"{_rows(arguments)} [T, D]",
    slots="int32 [T]",
)
def _(rows, slots, cache):
    want_latent_pool("latent_cache_write", cache)
    _want_contiguous("latent_cache_write", cache)
    dim = latent_dims(cache.shape[2]) if cache.dtype == torch.uint8 else cache.shape[2]
    want_that(rows.shape[1] == dim, "latent_cache_write", "rows has shape", rows.shape, f"the {dim} dims of cache")


@fake("latent_cache_read", cache="float/uint8 [P, S+, W]", slots="int32 [T]")
def _(cache, slots, out_dtype=None):
    fp8 = cache.dtype == torch.uint8
    dim = latent_dims(cache.shape[2]) if fp8 else cache.shape[2]
    want_latent_pool("latent_cache_read", cache)
    if out_dtype is None:
        out_dtype = torch.bfloat16 if fp8 else cache.dtype
    known = (torch.float64,) if cache.dtype == torch.float64 else (torch.bfloat16, torch.float32)
    want_that(out_dtype in known, "latent_cache_read", "out_dtype is", out_dtype, " or ".join(map(str, known)))
    return cache.new_empty((slots.shape[0], dim), dtype=out_dtype)


@fake(
    "indexer_cache_write",
    cache="float/uint8 [P, S+, W]",
    k=lambda arguments: f"{_rows(arguments)} [T, D]",
    slots="int32 [T]",
)
def _(k, slots, cache):
    extra = 4 if cache.dtype == torch.uint8 else 0
    want_that(cache.shape[2] >= extra, "indexer_cache_write", "cache has shape", cache.shape, "rows of dim + 4 bytes")
    want_that(k.shape[1] + extra == cache.shape[2], "indexer_cache_write", "k has shape", k.shape, "the dims of cache")
    _want_contiguous("indexer_cache_write", cache)


not_differentiable("latent_cache_read")
writes_into("latent_cache_write", "cache")
writes_into("indexer_cache_write", "cache")
