"""Other ways to select keys than the indexer's, and how good a selection is: the contrast rows of a report.

Each function takes a ``Selection`` and returns int32 [T, topk], ascending, -1 padded: what
``Glm5ForCausalLM.selecting`` wants.
"""

from collections.abc import Callable

import numpy as np
import torch

from glm5 import ops
from glm5.model.attention import Selection

# Random subsets are held for this many rows at a time.
_ROWS = 1024
# Of the Philox key, beside the seed; 1 and 2 are those of glm5.data.random.
_STREAM_RANDOM_KEYS = 3


def last_keys(selection: Selection) -> torch.Tensor:
    """The topk keys nearest before the query: a sliding window."""
    span = torch.arange(selection.topk, device=selection.ke.device)
    first = torch.maximum(selection.ke - selection.topk, selection.ks)[:, None]
    indices = first + span
    return torch.where(indices < selection.ke[:, None], indices, -1).to(torch.int32)


def random_keys(seed: int, first_row: int = 0) -> Callable[[Selection], torch.Tensor]:
    """topk keys drawn evenly from each row's range, other ones in each layer.

    A row's draws are a function of (seed, layer, its number), the selection's first row having number ``first_row``: no two
    batches of a text share any, and where a batch is cut does not matter.
    """

    def select(selection: Selection) -> torch.Tensor:
        blocks = -(-selection.topk // 4)  # a step of Philox's counter gives four numbers
        counter = [first_row * blocks, selection.layer + 1, 0, 0]
        philox = np.random.Philox(key=[seed, _STREAM_RANDOM_KEYS], counter=counter)
        parts = []
        for ks, ke in zip(selection.ks.split(_ROWS), selection.ke.split(_ROWS), strict=True):
            draws = (philox.random_raw(len(ks) * blocks * 4) >> np.uint64(1)).astype(np.int64)
            width = (ke - ks).clamp(min=0)
            drawn = _subsets(torch.from_numpy(draws).view(len(ks), blocks * 4), width.cpu(), selection.topk).to(ks.device)
            offsets = ops.topk_indices(drawn, selection.topk, torch.zeros_like(ks), width)
            parts.append(torch.where(offsets < 0, -1, offsets + ks[:, None]))
        return torch.cat(parts)

    return select


def _subsets(draws: torch.Tensor, width: torch.Tensor, topk: int) -> torch.Tensor:
    """float32 [T, widest]: 1 at ``topk`` of each row's first ``width`` [T] columns, every such subset being equally likely
    (Floyd's algorithm, Bentley 1987), for random ``draws`` [T, at least topk] >= 0. Rows that are no wider are left 0."""
    chosen = torch.zeros(len(width), int(width.max()) if len(width) else 0)
    wide = (width > topk).nonzero().squeeze(1)
    subset, last = chosen[wide], width[wide].long() - topk
    for i, draw in enumerate(draws[wide, :topk].unbind(1)):
        column = (draw % (last + i + 1))[:, None]
        taken = subset.gather(1, column) > 0
        subset.scatter_(1, torch.where(taken, (last + i)[:, None], column), 1.0)
    return chosen.index_copy(0, wide, subset)


def true_topk(selection: Selection) -> torch.Tensor:
    """The topk keys that dense attention weighs most, averaged over heads: what a perfect indexer would select."""
    return ops.topk_indices(selection.attention_target(), selection.topk, selection.ks, selection.ke)


def recall(indices: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Share [T] of each row's ``truth`` [T, k] that is in ``indices`` [T, n]; 1 for a row without any. -1 is no key."""
    size = int(max(indices.max(), truth.max())) + 1 if indices.numel() and truth.numel() else 0
    chosen = torch.zeros(indices.shape[0], size + 1, dtype=torch.bool, device=indices.device)
    chosen.scatter_(1, torch.where(indices < 0, size, indices).long(), True)
    wanted = truth >= 0
    found = chosen.gather(1, torch.where(wanted, truth, 0).long()) & wanted if size else wanted & False
    count = wanted.sum(1)
    return torch.where(count == 0, 1.0, found.sum(1) / count.clamp(min=1))


def attention_mass(selection: Selection, indices: torch.Tensor) -> torch.Tensor:
    """Share [T] of dense attention's probability that ``indices`` [T, n] catch."""
    target = selection.attention_target()
    return target.gather(1, indices.long().clamp(min=0)).masked_fill(indices < 0, 0).sum(1)
