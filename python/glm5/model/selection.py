"""Other ways to select keys than the indexer's, and how good a selection is: the contrast rows of a report.

Each function takes a ``Selection`` and returns int32 [T, topk], ascending, -1 padded: what
``Glm5ForCausalLM.selecting`` wants.
"""

from collections.abc import Callable

import torch

from glm5 import ops
from glm5.model.attention import Selection

# Random scores are held for this many rows at a time.
_ROWS = 1024


def last_keys(selection: Selection) -> torch.Tensor:
    """The topk keys nearest before the query: a sliding window."""
    span = torch.arange(selection.topk, device=selection.ke.device)
    first = torch.maximum(selection.ke - selection.topk, selection.ks)[:, None]
    indices = first + span
    return torch.where(indices < selection.ke[:, None], indices, -1).to(torch.int32)


def random_keys(seed: int) -> Callable[[Selection], torch.Tensor]:
    """topk keys drawn evenly from each row's range, other ones in each layer."""

    def select(selection: Selection) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1000003 + selection.layer)
        parts = []
        for ks, ke in zip(selection.ks.split(_ROWS), selection.ke.split(_ROWS), strict=True):
            width = (ke - ks).clamp(min=0)
            scores = torch.rand(len(ks), int(width.max()) if len(ks) else 0, generator=generator).to(ks.device)
            offsets = ops.topk_indices(scores, selection.topk, torch.zeros_like(ks), width)
            parts.append(torch.where(offsets < 0, -1, offsets + ks[:, None]))
        return torch.cat(parts)

    return select


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
