"""Properties that every op has, as functions of its spec. Family tests call them; each would fail on a wrong kernel."""

import re
from contextlib import contextmanager

import pytest
import torch
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from glm5 import _native, ops
from glm5.testing import Draw, OpSpec, RandomDraw, same_bits
from glm5.testing.spec import as_tuple, complaints


class HypothesisDraw(Draw):
    """Choices from hypothesis, which shrinks them when a test fails."""

    def __init__(self, data):
        self.data = data

    def integer(self, low, high):
        return self.data.draw(st.integers(low, high))


@contextmanager
def threads(count: int):
    """Runs a block with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_keeps_promise(op: OpSpec, data, dtype) -> None:
    """Forward and gradients lie within the error budget of the float64 reference."""
    arguments = op.draw(HypothesisDraw(data), dtype)
    assert not (found := complaints(op, getattr(ops, op.name), arguments, dtype)), found


def run_with_gradients(op: OpSpec, arguments: dict) -> list[torch.Tensor]:
    """Outputs, then the gradient of each differentiable argument for fixed cotangents."""
    inputs = op.leaves(arguments)
    leaves = {
        k: v.detach().clone().requires_grad_(k in inputs) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
    }
    outputs = op.call(getattr(ops, op.name), leaves)
    wanted = [o for o in outputs if o.requires_grad]
    if not inputs or not wanted:
        return list(outputs)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in wanted]
    return [*outputs, *torch.autograd.grad(wanted, [leaves[k] for k in inputs], cotangents)]


def assert_thread_count_does_not_matter(op: OpSpec, data, dtype) -> None:
    """1, 2 and 3 threads give the same bits, forward and backward; so does a second run."""
    arguments = op.draw(HypothesisDraw(data), dtype)
    one = run_with_gradients(op, arguments)
    for count in (1, 2, 3):
        with threads(count):
            again = run_with_gradients(op, arguments)
        assert all(same_bits(a, b) for a, b in zip(one, again, strict=True)), f"{count} threads"


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
    function = getattr(ops, op.name)
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda **kw: function(**kw), fullgraph=True, dynamic=True, backend=backend)
    for kw in (arguments, other):
        got, want = as_tuple(compiled(**kw)), as_tuple(function(**kw))
        assert all(same_bits(g, w) for g, w in zip(got, want, strict=True))
    assert len(graphs) == 1, f"{len(graphs)} graphs for two token counts"


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
