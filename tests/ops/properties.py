"""The kit's property functions as assertions on our ops, and what only a test of the registered op can ask.

Family tests call them on hypothesis' examples; each would fail on a wrong kernel.
"""

import re

import hypothesis
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from glm5 import _native, ops
from glm5.testing import PROPERTIES, Candidate, OpSpec, RandomDraw, same_bits
from glm5.testing.judges import compiles_both, complaints, determinism, threads
from glm5.testing.spec import as_tuple
from glm5.testing.strategies import HypothesisDraw

__all__ = ["HypothesisDraw", "as_tuple", "complaints", "same_bits", "threads"]


def ours(op: OpSpec) -> Candidate:
    """Our implementation of ``op``."""
    return Candidate(op, getattr(ops, op.name))


def assert_keeps_promise(op: OpSpec, data, dtype) -> None:
    """Forward and gradients lie within the error budget of the float64 reference."""
    arguments = op.draw(HypothesisDraw(data), dtype)
    assert not (found := complaints(op, getattr(ops, op.name), arguments, dtype)), found


def assert_property(op: OpSpec, name: str, data, dtype) -> None:
    """The property of the kit called ``name`` holds on an example that hypothesis draws for it."""
    trials, source = PROPERTIES[name].trials(op), HypothesisDraw(data)
    assert not isinstance(trials, str), f"{name} does not apply to {op.name}: {trials}"
    draw, judge = source.choice(trials)
    hypothesis.assume((arguments := draw(op, source, dtype)) is not None)
    assert not (found := judge(ours(op), arguments, dtype)), found


def run_with_gradients(op: OpSpec, arguments: dict) -> list[torch.Tensor]:
    """Outputs, then the gradient of each differentiable argument for fixed cotangents."""
    outputs, gradients = ours(op).gradients(arguments)
    return [*outputs, *gradients.values()]


def assert_thread_count_does_not_matter(op: OpSpec, data, dtype) -> None:
    """1, 2 and 3 threads give the same bits, forward and backward; so does a second run."""
    arguments = op.draw(HypothesisDraw(data), dtype)
    assert not (found := determinism(ours(op), arguments, dtype)), found


def assert_gradcheck(op: OpSpec, seed: int) -> None:
    """torch.autograd.gradcheck of the public op in float64."""
    arguments = op.draw(RandomDraw(seed), torch.float64)
    names = list(op.leaves(arguments))
    rest = {k: v for k, v in arguments.items() if k not in names}
    leaves = [arguments[k].double().requires_grad_(True) for k in names]
    function = getattr(ops, op.name)
    torch.autograd.gradcheck(
        lambda *a: function(**dict(zip(names, a, strict=True)), **rest), leaves, eps=1e-6, atol=1e-6, rtol=1e-5
    )


def assert_opcheck(op: OpSpec, arguments_in_order: tuple) -> None:
    """torch.library.opcheck: schema, fake kernel, autograd registration, dynamic-shape AOT."""
    torch.library.opcheck(getattr(torch.ops.glm5, op.name).default, arguments_in_order)


def assert_compiles(op: OpSpec, arguments: dict, other: dict) -> None:
    """torch.compile(fullgraph, dynamic) gives eager's bits on two token counts without a new graph."""
    assert not (found := compiles_both(ours(op), arguments, other)), found


def assert_exports(op: OpSpec, arguments: dict, dynamic: dict) -> None:
    """torch.export with dynamic token dimensions: ``dynamic`` maps argument name -> {dim: Dim}."""
    function = getattr(ops, op.name)
    names = [k for k, v in arguments.items() if isinstance(v, torch.Tensor)]
    constants = {k: v for k, v in arguments.items() if k not in names}

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return function(**tensors, **constants)

    tensors = {k: arguments[k] for k in names}
    program = torch.export.export(Module(), (tensors,), dynamic_shapes=({k: dynamic.get(k) for k in names},))
    got, want = as_tuple(program.module()(tensors)), as_tuple(function(**arguments))
    assert all(same_bits(g, w) for g, w in zip(got, want, strict=True))


def assert_every_isa_is_compiled(op_call) -> None:
    """The call runs on every instruction set of this processor."""
    for name in _native.available_isas():
        with _native.using_cpu_isa(name):
            op_call()


# Messages about the values of a tensor; all other faults show in shapes, dtypes and numbers.
ABOUT_VALUES = re.compile(r"\w+: (\w+\[|\w+ holds |(ks|ke) is |query )")


def assert_refused(error: type, words: str, function, *args, **kwargs) -> None:
    """The call raises ``error`` with ``words``; tracing it blames the same thing, where no values are needed to see it."""
    with pytest.raises(error, match=words) as real:
        function(*args, **kwargs)
    if ABOUT_VALUES.match(message := str(real.value)):
        return
    blame = re.match(r"\w+: \w+ (has shape|has dtype|is)", message)[0]
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(error, match=f"^{blame}"):
        function(*args, **kwargs)
