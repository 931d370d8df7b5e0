"""Appending to a Transformers cache without copying what is in it.

``DynamicCache`` grows by concatenation: every step copies the whole cache. Here the layer's tensors become views of one
buffer with room at its end, latent rows and rotated keys side by side as ``sparse_mla`` wants them. They stay what
Transformers expects them to be: crop, reset, copies, beam search and Transformers' own forward work on them as before.

New rows go behind the old ones only where nobody else could see them: no gradient is recorded, the layer's tensors are the
views made here, and no other tensor or object holds them. In all other cases a new buffer is made, or Transformers' own
``update`` is left to do it.
"""

import sys

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicIndexedLayer, DynamicLayer

_SPARE = 8  # room for an eighth more rows,
_LEAST = 256  # and for so many at least


def append_latent(cache: Cache, layer_idx: int, compressed: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor | None:
    """compressed [1, T, kv_lora], k_rope [1, T, rope] -> the layer's rows with them [keys, kv_lora + rope], or None where
    ``cache.update`` has to be called."""
    layer = _layer(cache, layer_idx, compressed, DynamicLayer, DynamicIndexedLayer)
    if layer is None:
        return None
    split = compressed.shape[-1]
    if not layer.is_initialized:
        layer.lazy_initialization(compressed, k_rope)
    have = layer.keys.shape[-2] if layer.keys.numel() else 0
    if have and (layer.keys.shape[0] != 1 or layer.keys.dtype != compressed.dtype):
        return None
    used = have + compressed.shape[1]
    rows = vars(layer).get("_glm5_latent")
    if rows is None or not (
        used <= rows.shape[0]
        and _is_view(layer.keys, rows, 0, have, split)
        and _is_view(layer.values, rows, split, have, k_rope.shape[-1])
        and _alone(rows, layer.keys, layer.values)
    ):
        rows = layer._glm5_latent = _room(compressed, used, split + k_rope.shape[-1])
        if have:
            rows[:have, :split], rows[:have, split:] = layer.keys[0, 0], layer.values[0, 0]
    rows[have:used, :split], rows[have:used, split:] = compressed[0], k_rope[0]
    layer.keys, layer.values = rows[None, None, :used, :split], rows[None, None, :used, split:]
    return rows[:used]


def append_indexer_keys(cache: Cache, layer_idx: int, k: torch.Tensor) -> torch.Tensor | None:
    """k [1, T, dim] -> the layer's indexer keys with them [1, keys, dim], or None where ``cache.update_indexer`` has to be
    called."""
    layer = _layer(cache, layer_idx, k, DynamicIndexedLayer)
    if layer is None:
        return None
    if not layer.is_indexer_initialized:
        layer.lazy_initialization_indexer(k)
    have = layer.indexer_keys.shape[1] if layer.indexer_keys.numel() else 0
    if have and (layer.indexer_keys.shape[0] != 1 or layer.indexer_keys.dtype != k.dtype):
        return None
    used = have + k.shape[1]
    rows = vars(layer).get("_glm5_indexer_keys")
    if rows is None or not (
        used <= rows.shape[0]
        and _is_view(layer.indexer_keys, rows, 0, have, k.shape[-1])
        and _alone(rows, layer.indexer_keys)
    ):
        rows = layer._glm5_indexer_keys = _room(k, used, k.shape[-1])
        if have:
            rows[:have] = layer.indexer_keys[0]
    rows[have:used] = k[0]
    layer.indexer_keys = rows[None, :used]
    return layer.indexer_keys


def _layer(cache, layer_idx, new, *kinds):
    """The layer, where this module knows what its update does."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or new.shape[0] != 1 or new.device.type != "cpu":
        return None
    if type(cache) not in (Cache, DynamicCache) or cache.offloading:
        return None
    if layer_idx >= len(cache.layers) or type(cache.layers[layer_idx]) not in kinds:
        return None
    return cache.layers[layer_idx]


def _room(like, used, width):
    return like.new_empty(used + max(used // _SPARE, _LEAST), width)


def _is_view(t, rows, column, have, width):
    """Whether t [..., have, width] is rows[:have, column : column + width]."""
    return (
        have > 0
        and (torch.is_inference_mode_enabled() or not rows.is_inference())
        and t.dtype == rows.dtype
        and t.data_ptr() == rows.data_ptr() + column * rows.element_size()
        and t.numel() == have * width
        and t.shape[-2:] == (have, width)
        and t.stride()[-2:] == rows.stride()
    )


def _alone(rows, *views):
    """Whether the layer alone holds ``rows`` and ``views``, and no other tensor shares their memory."""
    # ``rows``, the views, and the storage's own Python object.
    if torch._C._storage_Use_Count(rows.untyped_storage()._cdata) != len(views) + 2:
        return False
    return all(sys.getrefcount(view) <= _HELD for view in views)


def _held():
    """What getrefcount says in ``_alone`` of a tensor that one object holds."""

    class Layer:
        pass

    def count(*views):
        return [sys.getrefcount(view) for view in views]

    layer = Layer()
    layer.keys = torch.empty(1)
    return count(layer.keys)[0]


_HELD = _held()
