"""What a training step gets: one flat batch of integer tensors. Who fills it is ``mixture.py``'s business."""

from dataclasses import dataclass

import torch

IGNORED_TARGET = -100


@dataclass(frozen=True)
class Batch:
    """One step's tokens, all packs in a row. T = number of tokens; document boundaries are in `ks` and `ke`."""

    tokens: torch.Tensor  # [T] int64
    targets: torch.Tensor  # [T] int64, the next token of the same document, or -100
    positions: torch.Tensor  # [T] int32, counted from the start of the document
    ks: torch.Tensor  # [T] int32, first key the token may see: the start of its document
    ke: torch.Tensor  # [T] int32, one past the last: its own place + 1 (causal)

    def num_bytes(self) -> int:
        """Targets that are bytes of text, the denominator of nats per byte."""
        return int(((self.targets >= 0) & (self.targets < 256)).sum())
