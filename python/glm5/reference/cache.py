"""Caches of pages, as specified: latent rows and indexer keys, in the model's dtype or in FP8.

A pool is [pages, page_size, width]; slot = page * page_size + place. Position s of a sequence lies in slot
``block_table[sequence, s // page_size] * page_size + s % page_size``.
"""

import torch

from glm5.reference.quantize import dequantize_fp8, quantize_fp8

BLOCK = 128  # latent dims that share an FP8 scale


def latent_cache_write(rows: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:
    """rows [T, D] into their slots [T] int32 of cache [pages, page_size, width]; slot -1 is skipped, of two the later stays.

    A uint8 cache holds, row by row, e4m3 codes of the first 128 b dims, b float32 scales (``quantize_fp8``) and the other
    D - 128 b < 66 dims in bfloat16; width = 132 b + 2 (D - 128 b), 656 for 512 + 64.
    """
    if cache.dtype == torch.uint8:
        quantised, rest = rows.split(latent_dims(cache.shape[2]), 1)
        codes, scale = quantize_fp8(quantised)
        rows = torch.cat([_view(t, torch.uint8) for t in (codes, scale, rest.to(torch.bfloat16))], 1)
    pool = cache.view(-1, cache.shape[2]) if cache.numel() else cache.flatten(0, 1)
    for row, slot in zip(rows, slots.tolist(), strict=True):
        if slot != -1:
            pool[slot] = row


def latent_cache_read(cache: torch.Tensor, slots: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """The rows [T, D] in slots [T] of a cache of ``latent_cache_write``; zeros for -1. FP8 is code * scale in float32,
    rounded once to out_dtype, by default the cache's dtype, bfloat16 for FP8."""
    fp8 = cache.dtype == torch.uint8
    if out_dtype is None:
        out_dtype = torch.bfloat16 if fp8 else cache.dtype
    rows = _in_slots(cache.flatten(0, 1), slots)
    if fp8:
        dims, rest = latent_dims(cache.shape[2])
        codes, scale, rest = rows.split([dims, dims // BLOCK * 4, rest * 2], 1)
        quantised = dequantize_fp8(_view(codes, torch.float8_e4m3fn), _view(scale, torch.float32), out_dtype=out_dtype)
        rows = torch.cat([quantised, _view(rest, torch.bfloat16).to(out_dtype)], 1)
    return rows.to(out_dtype).masked_fill((slots == -1)[:, None], 0)


def indexer_cache_write(k: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:
    """k [T, D] into their slots [T] int32 of cache [pages, page_size, width]; slot -1 is skipped, of two the later stays.

    A uint8 cache has width D + 4; a page holds page_size * D e4m3 codes, then page_size float32 scales, one a row
    (DeepGEMM's layout).
    """
    if cache.dtype != torch.uint8:
        return latent_cache_write(k, slots, cache)
    codes, scale = quantize_fp8(k, (1, k.shape[1]))
    pages, size = cache.flatten(1), cache.shape[1]
    code_places = pages[:, : size * k.shape[1]].unflatten(1, (size, k.shape[1]))
    scale_places = pages[:, size * k.shape[1] :].unflatten(1, (size, 4))
    for code, s, slot in zip(_view(codes, torch.uint8), _view(scale, torch.uint8), slots.tolist(), strict=True):
        if slot != -1:
            code_places[slot // size, slot % size] = code
            scale_places[slot // size, slot % size] = s


def indexer_rows(cache: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The keys [T, D] in slots [T] of a cache of ``indexer_cache_write`` and their scales [T], None where there are none."""
    if cache.dtype != torch.uint8:
        return _in_slots(cache.flatten(0, 1), slots), None
    size, dim = cache.shape[1], cache.shape[2] - 4
    codes, scales = cache.flatten(1).split([size * dim, size * 4], 1)
    codes = _in_slots(codes.unflatten(1, (size, dim)).flatten(0, 1), slots)
    scales = _in_slots(scales.unflatten(1, (size, 4)).flatten(0, 1), slots)
    return codes.view(torch.float8_e4m3fn), _view(scales, torch.float32)[:, 0]


def slots_of(block_table: torch.Tensor, sequence: int, positions: torch.Tensor, page_size: int) -> torch.Tensor:
    """Slots of positions of a sequence; -1 for -1."""
    positions = positions.long()
    slots = block_table[sequence, positions.clamp(min=0) // page_size] * page_size + positions % page_size
    return torch.where(positions == -1, -1, slots)


def latent_dims(width: int) -> list[int]:
    """[dims in FP8, dims in bfloat16] of a latent row of so many bytes."""
    return [width // (BLOCK + 4) * BLOCK, width % (BLOCK + 4) // 2]


def _in_slots(pool, slots):
    return pool[slots.long().clamp(min=0)] if pool.shape[0] else pool.new_zeros(slots.shape[0], pool.shape[1])


def _view(t, dtype):
    """The bytes of t [T, n] as numbers of another dtype."""
    width = t.shape[1] * t.element_size() // dtype.itemsize
    return t.flatten().view(dtype).view(t.shape[0], width)
