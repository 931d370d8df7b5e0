"""Mixture-of-experts routing and token movement, as specified."""

import torch

from glm5.reference._precision import wide
from glm5.reference.topk_indices import topk_indices


def moe_router(
    logits: torch.Tensor,
    bias: torch.Tensor,
    topk: int,
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    scaling: float = 1.0,
    replay: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E], bias [E] -> weights [T, topk] at least float32, ids [T, topk] int32 ascending.

    The topk largest sigmoid(logits) + bias are chosen, ties to the lower expert, NaN never (padded: id -1, weight 0). With
    num_groups > 1 only experts of the topk_groups best groups compete, a group scoring the sum of its two best. weights are
    the unbiased sigmoids of the chosen, over their sum + 1e-20 when renormalize, times scaling. replay [T, topk] int32 is
    used as ids unchanged. Differentiable in logits through weights; bias takes no gradient.
    """
    logits, bias = wide(logits, bias.detach())
    sigmoid = torch.sigmoid(logits)
    if replay is None:
        choice = sigmoid.detach() + bias
        if num_groups > 1:
            grouped = choice.masked_fill(choice.isnan(), float("-inf")).unflatten(-1, (num_groups, -1))
            group_scores = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
            kept = topk_indices(group_scores, topk_groups)
            allowed = torch.zeros(*group_scores.shape[:-1], num_groups + 1, dtype=torch.bool, device=logits.device)
            allowed.scatter_(-1, torch.where(kept < 0, num_groups, kept).long(), True)
            mask = allowed[..., :num_groups].repeat_interleave(grouped.shape[-1], -1)
            choice = choice.masked_fill(~mask, float("-inf"))
        ids = topk_indices(choice, topk)
    else:
        ids = replay.to(torch.int32)
    weights = sigmoid.gather(-1, ids.long().clamp(min=0)).masked_fill(ids < 0, 0)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scaling, ids


def moe_permute(
    x: torch.Tensor, ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, D], ids [T, topk] int32 -> rows of x once per choice, sorted by (expert, token).

    Returns xp [T * topk, D]; row_of_slot [T * topk] int32, the row of x in each slot; slot_of_row [T, topk] int32, the slot
    of each choice; group_ends [E] int32, where each expert's slots end. A choice of -1 takes no slot (slot_of_row -1): the
    slots left over at the end have row_of_slot -1 and xp 0.
    """
    tokens, topk = ids.shape
    flat = ids.reshape(-1).long()
    order = torch.where(flat < 0, num_experts, flat).sort(stable=True).indices
    used = flat[order] >= 0
    rows = torch.div(order, max(topk, 1), rounding_mode="floor")
    row_of_slot = torch.where(used, rows, -1).to(torch.int32)
    slot_of_row = torch.empty_like(flat)
    slot_of_row[order] = torch.arange(flat.numel(), device=x.device)
    slot_of_row = torch.where(flat < 0, -1, slot_of_row).view(tokens, topk).to(torch.int32)
    experts = torch.arange(num_experts, device=x.device)
    group_ends = (flat[:, None] == experts).sum(0).cumsum(0).to(torch.int32)
    xp = x[rows].masked_fill(~used[:, None], 0)
    return xp, row_of_slot, slot_of_row, group_ends


def moe_unpermute(y: torch.Tensor, slot_of_row: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """y [S, D], slot_of_row [T, topk] int32, weights [T, topk] -> [T, D]: a row's weighted sum over its slots.

    In ascending slot (so expert) order, in at least float32, rounded to y's dtype once. Slot -1 adds nothing.
    """
    y_wide, weights = wide(y, weights)
    if y.shape[0] == 0:
        return y.new_zeros(slot_of_row.shape[0], y.shape[1])
    slots = slot_of_row.long().clamp(min=0)
    terms = (weights[..., None] * y_wide[slots]).masked_fill((slot_of_row < 0)[..., None], 0)
    return terms.sum(1).to(y.dtype)


def moe_dispatch_layout(
    ids: torch.Tensor, num_experts: int, num_ranks: int, ranks_per_node: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [T, topk] int32 -> what goes to every rank, node and expert, a token counting once for a rank and once for a node.

    Expert e lies on rank e // (num_experts // num_ranks), rank r on node r // ranks_per_node; a choice of -1 goes nowhere.
    Returns tokens_per_rank [R], tokens_per_node [R // ranks_per_node], tokens_per_expert [E] (choices), all int32, and
    is_token_in_rank [T, R] bool.
    """
    choices = ids[..., None] == torch.arange(num_experts, device=ids.device)
    in_rank = choices.any(1).unflatten(1, (num_ranks, -1)).any(-1)
    in_node = in_rank.unflatten(1, (-1, ranks_per_node)).any(-1)
    counts = (in_rank.sum(0), in_node.sum(0), choices.sum((0, 1)))
    return *(count.to(torch.int32) for count in counts), in_rank
