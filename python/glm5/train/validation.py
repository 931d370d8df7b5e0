"""Held-out measures: nats per byte in any form of attention, the indexer's KL, and its recall of the true top-k."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch

from glm5.data import Batch, MixedDataset
from glm5.model.selection import last_keys, recall, true_topk


def batches(dataset: MixedDataset, packs: int, packs_per_batch: int) -> Iterator[Batch]:
    """The first `packs` packs of a dataset (already in random order), or all when there are fewer."""
    packs = dataset.num_packs(packs)
    for first in range(0, packs, packs_per_batch):
        yield dataset.collate(range(first, min(first + packs_per_batch, packs)))


def long_rows(batch: Batch, topk: int) -> torch.Tensor:
    """[T] bool: rows that may see more than ``4 * topk`` keys, where selecting matters."""
    return (batch.ke - batch.ks) > 4 * topk


@torch.no_grad()
def language_loss(
    model, attention: str, held_out: Iterator[Batch], select: Callable | None = None
) -> dict[str, float | None]:
    """``nats_per_byte`` over all rows and ``long_rows``, nats a target over the rows that may see more than 4 x top-k keys
    (None where there is no such target).

    Args:
        attention: "dense" or "sparse".
        select: for sparse attention, ``select(first_row)`` gives a selection to use instead of the indexer's for the batch
            whose first row is number ``first_row`` of all.
    """
    before, model.attention = model.attention, attention
    total = num_bytes = long_total = num_long = 0.0
    first_row = 0
    try:
        for batch in held_out:
            with model.selecting(select(first_row)) if select else nullcontext():
                nats = -model.target_logprobs(batch).double()
            first_row += len(batch.tokens)
            counted = long_rows(batch, model.config.index_topk) & (batch.targets >= 0)
            total += float(nats.sum())
            num_bytes += batch.num_bytes()
            long_total += float(nats[counted].sum())
            num_long += int(counted.sum())
    finally:
        model.attention = before
    nats_per_byte = total / num_bytes if num_bytes else None
    return {"nats_per_byte": nats_per_byte, "long_rows": long_total / num_long if num_long else None}


@torch.no_grad()
def indexer_kl(model, held_out: Iterator[Batch], stage: str, mtp_depth: int) -> float:
    """Mean KL a row from attention to indexer: over all keys ("warmup": dense attention) or the selected ones ("sparse")."""
    losses = [model.losses(batch, mtp_depth=mtp_depth, indexer=stage) for batch in held_out]
    values = [(float(each["indexer_kl"]), int(each["indexer_rows"])) for each in losses]
    return sum(kl * rows for kl, rows in values) / sum(rows for _, rows in values)


@torch.no_grad()
def selection_recall(model, attention: str, held_out: Iterator[Batch]) -> dict[str, float | None]:
    """Share of the keys with the most attention that the ``indexer`` and a last-k ``window`` select.

    Mean over layers and over the rows that may see more than 4 x top-k keys; None where there is no such row. Attention is
    what dense attention would be in each layer, averaged over heads. Memory: T^2 a batch, so give batches of one pack.
    """
    before, model.attention = model.attention, attention
    found = {"indexer": 0.0, "window": 0.0}
    rows = 0
    try:
        for batch in held_out:
            counted = long_rows(batch, model.config.index_topk)
            if not counted.any():
                continue
            _, selections = model.hidden_states(batch.tokens, batch.positions, batch.ks, batch.ke, collect_indexer=True)
            for selection in selections:
                truth = true_topk(selection)
                found["indexer"] += float(recall(selection.indices, truth)[counted].sum())
                found["window"] += float(recall(last_keys(selection), truth)[counted].sum())
                rows += int(counted.sum())
    finally:
        model.attention = before
    return {name: value / rows if rows else None for name, value in found.items()}
