"""Checks shared by the public functions. Shapes, dtypes and values are checked by the compiled side (ValueError).

Checked here is what never gets there: what is no tensor or integer (TypeError), tensors on a device without kernels, and
tensors on different devices (ValueError). torch gives a call to the kernels of one of those devices; with a meta tensor
among them that is the fake kernel, which would answer with a tensor without values.
"""

import torch


def want_tensors(op: str, **arguments) -> None:
    """Raises TypeError naming the first argument that is no torch.Tensor, ValueError naming one on a wrong device."""
    for value in arguments.values():
        if not (isinstance(value, torch.Tensor) and value.is_cpu):
            break
    else:
        return  # as nearly always, and in half the time
    first = None
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{op}: {name} is {type(value).__name__}, want torch.Tensor")
        if first is None:
            if value.device.type not in ("cpu", "meta"):
                raise ValueError(f"{op}: {name} is on {value.device}, want cpu")
            first = name
        elif value.device != arguments[first].device:
            raise ValueError(
                f"{op}: {name} is on {value.device} and {first} on {arguments[first].device}, want all on one device"
            )


def want_integers(op: str, **arguments) -> None:
    """Raises TypeError naming the first argument that is not an integer."""
    for name, value in arguments.items():
        if not isinstance(value, int | torch.SymInt):
            raise TypeError(f"{op}: {name} is {type(value).__name__}, want int")


def want_booleans(op: str, **arguments) -> None:
    """Raises TypeError naming the first argument that is not True or False."""
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} is {type(value).__name__}, want bool")


def want_dtype(op: str, **arguments) -> None:
    """Raises TypeError naming the first argument that is not a torch.dtype."""
    for name, value in arguments.items():
        if not isinstance(value, torch.dtype):
            raise TypeError(f"{op}: {name} is {type(value).__name__}, want torch.dtype")
