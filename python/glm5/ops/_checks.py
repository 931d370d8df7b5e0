"""Type checks shared by the public functions. Shapes, dtypes and devices are checked by the compiled side, which raises
ValueError; what is not even a tensor or a number raises TypeError here."""

import torch


def want_tensors(op: str, **arguments) -> None:
    """Raises TypeError naming the first argument that is not a torch.Tensor."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{op}: {name} is {type(value).__name__}, want torch.Tensor")
