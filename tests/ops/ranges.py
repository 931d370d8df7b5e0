"""Key ranges that tests of several families ask with."""

import torch


def int32(values):
    return torch.as_tensor(values, dtype=torch.int32)


def everything(queries, keys):
    """All keys for every query."""
    return int32([0] * queries), int32([keys] * queries)


def causal(queries, keys):
    """Ranges of a packed batch of two documents, the second of which starts at key 29."""
    query = torch.arange(queries)
    return int32(torch.where(query < 29, 0, 29).clamp(max=keys)), int32((query + 1).clamp(max=keys))
