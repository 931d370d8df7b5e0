"""The latent cache of simple generation: one row a token and layer, in memory, a fixed region a sequence.

Serving has paged caches of its own; this one only has to be right.
"""

import torch

from glm5.model.config import Glm5Config


class LatentCache:
    """Latent rows [sequences * length, kv_lora + rope] and indexer keys [sequences * length, idim] of every layer."""

    def __init__(self, config: Glm5Config, sequences: int, length: int, dtype: torch.dtype, device: torch.device):
        self.config, self.length = config, length
        rows = sequences * length
        self._latent = [
            torch.zeros(rows, config.latent_dim, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)
        ]
        self._keys = {
            i: torch.zeros(rows, config.index_head_dim, dtype=dtype, device=device)
            for i, kind in enumerate(config.layer_indexers)
            if kind == "full"
        }
        self._slots, self._used = None, rows

    def place(self, slots: torch.Tensor, used: int) -> None:
        """The next tokens go to rows ``slots`` int64 [T]; rows from ``used`` on are unwritten and not returned."""
        self._slots, self._used = slots, used

    def append_latent(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Writes latent rows [T, latent_dim]; returns the used rows of the layer."""
        return self._latent[layer].index_copy_(0, self._slots, rows)[: self._used]

    def append_indexer_key(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Writes indexer keys [T, idim]; returns the used rows of the layer."""
        return self._keys[layer].index_copy_(0, self._slots, rows)[: self._used]
