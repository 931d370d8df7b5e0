"""What every public op has, whichever family it is of: a reference, a spec, a fake kernel, tests, a benchmark, errors."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from glm5 import ops, reference
from glm5.testing import RandomDraw, check, spec, specs
from glm5.testing.spec import as_tuple

ROOT = Path(__file__).parents[2]
# Backwards too, as torch's dispatcher knows them.
REGISTERED = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("glm5::"))


def drawn(name):
    op = spec(name)
    return op.draw(RandomDraw(1), torch.float32 if torch.float32 in op.dtypes else op.dtypes[0])


def test_there_is_a_spec_and_a_reference_for_every_op_and_no_other():
    assert set(ops.__all__) == set(reference.__all__) == set(specs())


@pytest.mark.parametrize("name", ops.__all__)
def test_an_op_has_all_its_rooms(name):
    function = getattr(ops, name)
    assert inspect.signature(function) == inspect.signature(getattr(reference, name))
    for heading in ("Args:", "Returns:", "Raises:"):
        assert heading in function.__doc__, f"{name}: no {heading} in its docstring"
    family = function.__module__.rpartition(".")[2]
    for path in (f"csrc/{family}/binding.cpp", f"tests/ops/test_{family}.py"):
        assert name in (ROOT / path).read_text(), f"{path} never names {name}"
    assert re.search(rf"\bops\.{name}\b", (ROOT / f"benchmarks/ops/bench_{family}.py").read_text())
    assert f"| `{name}` |" in (ROOT / "docs/ops.md").read_text()


@pytest.mark.parametrize("name", ops.__all__)
def test_keeps_every_promise_of_the_conformance_kit(name, isa):
    check(name, examples=4).raise_if_failed()


@pytest.mark.parametrize("name", ops.__all__)
def test_the_conformance_kit_refuses_what_is_a_little_wrong(name):
    function, op = getattr(ops, name), spec(name)

    def wrong(**arguments):
        if op.mutates:  # half of what was written is left out
            before = arguments[op.mutates[0]].clone()
            function(**arguments)
            arguments[op.mutates[0]][..., ::2] = before[..., ::2]
            return None
        first, *rest = as_tuple(function(**arguments))
        if first.dtype == torch.float8_e4m3fn:
            first = (first.view(torch.uint8) ^ 1).view(first.dtype)
        else:
            first = first * 1.02 if first.is_floating_point() else torch.where(first > 0, first - 1, first)
        return first, *rest

    assert not check(name, impl=wrong, examples=8, properties=["accuracy"]).ok


@pytest.mark.parametrize("name", ops.__all__)
def test_all_meta_gives_eager_shapes(name):
    arguments = drawn(name)
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    there, here = (spec(name).call(getattr(ops, name), a) for a in (meta, arguments))
    for a, b in zip(there, here, strict=True):
        assert a.device.type == "meta" and (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("name", ops.__all__)
def test_a_device_without_kernels_is_named(name):
    arguments = drawn(name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = {k: v.new_empty(v.shape, device="cuda") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=f"{name}: .* is on cuda:0, want cpu"):
        getattr(ops, name)(**there)


@pytest.mark.parametrize("name", ops.__all__)
def test_an_argument_of_the_wrong_kind_is_named(name):
    arguments, function = drawn(name), getattr(ops, name)
    tensors = [k for k, v in arguments.items() if isinstance(v, torch.Tensor)]
    for key in tensors:
        value = arguments[key]
        with pytest.raises(ValueError, match=rf"{name}: .*\b{key}\b"):  # of another dtype
            function(**{**arguments, key: value.to(torch.complex64)})
        with pytest.raises(ValueError, match=rf"{name}: .*\b{key}\b"):  # without dimensions
            function(**{**arguments, key: value.new_zeros(())})
        with pytest.raises(TypeError, match=f"{name}: {key} is list, want torch.Tensor"):
            function(**{**arguments, key: [1.0]})
        if len(tensors) > 1:
            with pytest.raises(ValueError, match=f"{name}: .* want all on one device"):
                function(**{**arguments, key: value.to("meta")})
    for key, value in arguments.items():
        if isinstance(value, int) and not isinstance(value, bool):
            with pytest.raises(ValueError, match=rf"{name}: .*\b{key}\b"):
                function(**{**arguments, key: -2})  # -1 may mean something
            with pytest.raises(TypeError, match=f"{name}: {key} is str, want int"):
                function(**{**arguments, key: "x"})


@pytest.mark.parametrize("name", REGISTERED)
def test_torch_knows_shapes_and_gradient(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta") or torch._library.utils.has_fake_kernel(
        getattr(torch.ops.glm5, name.removeprefix("glm5::")).default
    )
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ops.__all__)
def test_a_gradient_ends_where_the_op_says(name):
    """Outputs without a gradient do not ask for one; where there is one it has none itself, which is an error to ask for."""
    arguments = drawn(name)
    differentiable = spec(name).leaves(arguments)
    leaves = {
        k: v.clone().requires_grad_() if isinstance(v, torch.Tensor) and v.dtype in (torch.float32, torch.bfloat16) else v
        for k, v in arguments.items()
    }
    returned = getattr(ops, name)(**leaves)
    outputs = [o for o in as_tuple(returned) if o is not None and o.requires_grad]
    assert bool(outputs) == bool(differentiable)
    if outputs:
        wanted = [leaves[k] for k in differentiable]
        gradients = torch.autograd.grad([o.square().sum() for o in outputs], wanted, create_graph=True)
        if name in ("rotate_hadamard", "fake_quantize_int4"):  # its own backward, and the identity
            return
        with pytest.raises(RuntimeError, match="glm5::.* has no gradient"):
            sum(g.sum() for g in gradients).backward()
