"""The precision a specification computes in, and the one softmax that all of them share."""

import torch


def wide(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in float64 if any of them is float64, else in float32 (bf16 and e4m3 values are exact in it)."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return tuple(t.to(dtype) for t in tensors)


def softmax_and_lse(scores: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the valid entries of the last dimension, and its natural-log normaliser.

    A row with no valid score above -inf: probabilities 0, lse +inf. A row that holds a valid NaN: lse NaN.
    """
    scores = scores.masked_fill(~valid, float("-inf"))
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], float("inf"))
    largest = scores.detach().amax(-1, keepdim=True)
    largest = torch.where(largest.isinf(), 0, largest)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    probabilities = (weights / total).masked_fill(~valid, 0)
    lse = (total.log() + largest).masked_fill(empty, float("inf"))
    return probabilities, lse.squeeze(-1)


def within(ks: torch.Tensor, ke: torch.Tensor, num_keys: int) -> torch.Tensor:
    """[Tq], [Tq] -> bool [Tq, num_keys]: key j is in query i's half-open range [ks[i], ke[i])."""
    key = torch.arange(num_keys, device=ks.device)
    return (key >= ks[:, None]) & (key < ke[:, None])
