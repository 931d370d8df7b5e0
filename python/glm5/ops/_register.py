"""What torch is told about every op: the shapes and dtypes it takes and gives, and where its gradient ends.

A fake kernel refuses what the compiled side refuses, as far as that can be seen without values: then a wrong shape is an
error where a model is traced (torch.compile, torch.export, meta tensors), not where the traced program first runs.
"""

import inspect
import math
import re

import torch

_DTYPES = {
    "float": (torch.bfloat16, torch.float32, torch.float64),
    "bfloat16": (torch.bfloat16,),
    "float32": (torch.float32,),
    "float64": (torch.float64,),
    "e4m3": (torch.float8_e4m3fn,),
    "uint8": (torch.uint8,),
    "int8": (torch.int8,),
    "int32": (torch.int32,),
    "int64": (torch.int64,),
}


def accumulator(t: torch.Tensor) -> torch.dtype:
    """What sums over elements of ``t`` are held in: float64 for float64, else float32."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def fake(op: str, **wanted):
    """Registers a function as the fake kernel of ``glm5::<op>``, called with arguments that are as ``wanted`` says.

    ``wanted`` names each tensor's dtype and sizes, ``q="float [Tq, H+, D+]", k="q [Tk, D]", lse="sum(q) [Tq, H]"``, in the
    order in which they are checked. A dtype is "float" (bfloat16, float32 or float64), torch's name, several with "/", that
    of another argument ("q"), or that argument's accumulator ("sum(q)"). A size is a number, an integer argument, or a name
    that stands for one size throughout; "+" wants at least 1, "2*" an even one, twice what the name stands for; a leading
    "..." any further dimensions. "like x" is dtype and shape of x. A function makes the text from the arguments. A tensor
    that is None is not checked.

    Raises ValueError, naming op and argument. Symbolic sizes stay symbolic: what cannot be known is checked by the program
    that is traced.
    """

    def register(function):
        signature = inspect.signature(function)

        def checked(*args, **kwargs):
            arguments = signature.bind(*args, **kwargs).arguments
            sizes = {k: v for k, v in arguments.items() if isinstance(v, int | torch.SymInt)}
            for name, want in wanted.items():
                if arguments.get(name) is not None:
                    _check_tensor(op, name, arguments, want(arguments) if callable(want) else want, sizes)
            return function(*args, **kwargs)

        torch.library.register_fake(f"glm5::{op}", checked)
        return function

    return register


def _check_tensor(op, name, arguments, want, sizes):
    value = arguments[name]
    dtype, _, layout = want.partition(" ")
    if dtype == "like":
        other = arguments[layout]
        _check_dtype(op, name, value, (other.dtype,))
        want_that(value.dim() == other.dim(), op, f"{name} has shape", value.shape, f"that of {layout}, {[*other.shape]}")
        for got, size in zip(value.shape, other.shape, strict=True):
            want_that(got == size, op, f"{name} has shape", value.shape, f"that of {layout}, {[*other.shape]}")
        return
    _check_dtype(op, name, value, _dtypes(dtype, arguments))
    dims = layout.strip("[]").split(", ")
    shape = value.shape
    if dims[0] == "...":
        dims = dims[1:]
        want_that(len(shape) >= len(dims), op, f"{name} has shape", shape, f"at least {len(dims)} dimensions {layout}")
        shape = shape[len(shape) - len(dims) :]
    want_that(len(shape) == len(dims), op, f"{name} has shape", value.shape, f"{len(dims)} dimensions {layout}")
    for dim, got in zip(dims, shape, strict=True):
        key = dim.rstrip("+")
        if dim.endswith("+"):
            want_that(got >= 1, op, f"{name} has shape", value.shape, f"{layout} with {key} >= 1")
        if key.startswith("2*"):
            want_that(got % 2 == 0, op, f"{name} has shape", value.shape, f"an even last dimension {layout}")
            key, got = key[2:], got // 2
        size = int(key) if key.isdecimal() else sizes.setdefault(key, got)
        want_that(got == size, op, f"{name} has shape", value.shape, f"{layout} with {key} = {size}")


def _dtypes(names, arguments):
    if match := re.fullmatch(r"sum\((\w+)\)", names):
        return (accumulator(arguments[match[1]]),)
    if names in arguments:
        return (arguments[names].dtype,)
    return sum((_DTYPES[name] for name in names.split("/")), ())


def _check_dtype(op, name, value, dtypes):
    want_that(value.dtype in dtypes, op, f"{name} has dtype", value.dtype, " or ".join(map(str, dtypes)))


def want_that(condition: bool | torch.SymBool, op: str, what: str, got, want: str) -> None:
    """Raises ValueError unless ``condition`` holds; where that is not known yet, the traced program will check it."""
    if condition is not True:
        torch._check_value(condition, lambda: f"{op}: {what} {[*got] if isinstance(got, tuple) else got}, want {want}")


def want_finite(op: str, name: str, value: float) -> None:
    """Raises ValueError where ``value`` is a number that is not finite; a symbolic one is left to the compiled side."""
    want_that(not isinstance(value, float) or math.isfinite(value), op, f"{name} is", value, "a finite number")


def not_differentiable(*ops: str) -> None:
    """Says that the outputs of ``ops`` carry no gradient, whatever the inputs do."""
    for op in ops:
        _library.impl(op, torch.library.fallthrough_kernel, "Autograd")


def writes_into(op: str, argument: str) -> None:
    """Says that ``op`` changes ``argument`` in place and that no gradient goes through it: autograd, which may have kept the
    tensor for a backward, is told that it has another version."""
    packet = getattr(torch.ops.glm5, op).default
    place = [a.name for a in packet._schema.arguments].index(argument)

    def new_version(keyset, *args):
        torch.autograd.graph.increment_version(args[place])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return packet.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    not_differentiable(op)
    _library.impl(op, new_version, "ADInplaceOrView", with_keyset=True)


def differentiable_once(*ops: str) -> None:
    """Says that ``ops``, which compute gradients, have none themselves: asking for one raises RuntimeError."""
    for op in ops:

        def backward(ctx, *_, op=op):
            raise RuntimeError(f"glm5::{op} has no gradient: glm5's ops are differentiable once")

        torch.library.register_autograd(f"glm5::{op}", backward)


def compiled(op: str):
    """The op ``glm5::<op>``, as a function. Where no gradient is recorded it goes past torch's Python wrapper that would
    record it, which costs as much as a small op itself."""
    packet = getattr(torch.ops.glm5, op)

    def call(*args):
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return packet(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return packet(*args)

    return call


_library = torch.library.Library("glm5", "FRAGMENT")
