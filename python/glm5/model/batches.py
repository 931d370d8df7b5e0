"""A rectangular batch, with padding or packed documents, as the flat rows and key ranges that the layers work on."""

import torch


def flat_rows(
    batch: int,
    time: int,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    device: torch.device,
    name: str = "Glm5ForCausalLM",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """positions, ks, ke, each int64 [batch * time]: where each row stands and which rows it may see.

    Args:
        attention_mask: [batch, time], nonzero where there is a token and 0 where there is padding, on the left or on the
            right. A padded row sees nothing and nobody sees it.
        position_ids: [batch, time] or [1, time]; None counts each sequence's columns from 0. Without an attention_mask, a
            step other than +1 begins another document, which sees itself alone.
        name: of who asks, for the error.

    Raises:
        ValueError: wrong shape, padding between tokens, or a sequence that is all padding.
    """
    column = torch.arange(time, device=device).expand(batch, time)
    row = torch.arange(batch * time, device=device).view(batch, time)
    start = row - column
    ks, ke = start.clone(), row + 1
    positions = column
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[1] != time or position_ids.shape[0] not in (1, batch):
            raise ValueError(f"{name}: position_ids has shape {list(position_ids.shape)}, want [{batch} or 1, {time}]")
        positions = position_ids.to(device).long().expand(batch, time)
    if attention_mask is not None:
        left, length = padding(attention_mask, batch, time, name)
        left, length = left.to(device)[:, None], length.to(device)[:, None]
        there = (column >= left) & (column < left + length)
        ks = start + left.expand(batch, time)
        ke = torch.where(there, ke, ks)
    elif position_ids is not None and time > 0:
        begins = torch.ones_like(positions, dtype=torch.bool)
        begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        ks = torch.where(begins, row, 0).cummax(1).values
    return positions.reshape(-1), ks.reshape(-1), ke.reshape(-1)


def padding(attention_mask: torch.Tensor, batch: int, time: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(padding on the left, tokens) of each sequence, int64 [batch] each. Raises ValueError as ``flat_rows`` does."""
    if tuple(attention_mask.shape) != (batch, time):
        raise ValueError(f"{name}: attention_mask has shape {list(attention_mask.shape)}, want [{batch}, {time}]")
    there = attention_mask != 0
    length = there.sum(1)
    if time and not bool((length > 0).all()):
        raise ValueError(f"{name}: attention_mask row {int((length == 0).nonzero()[0])} is all padding")
    left = there.int().argmax(1) if time else length
    column = torch.arange(time, device=there.device)
    whole = (column >= left[:, None]) & (column < (left + length)[:, None])
    if not torch.equal(whole, there):
        sequence = int((whole != there).any(1).nonzero()[0])
        raise ValueError(f"{name}: attention_mask row {sequence} has padding between tokens, want it at the ends alone")
    return left, length
