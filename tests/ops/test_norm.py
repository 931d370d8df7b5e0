"""RMSNorm and LayerNorm: against float64, row by row, on every instruction set."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5 import ops
from glm5.testing import RandomDraw, spec
from tests.ops import properties

RMS_NORM, LAYER_NORM = spec("rms_norm"), spec("layer_norm")
DTYPES = pytest.mark.parametrize("dtype", RMS_NORM.dtypes, ids=["bf16", "float32"])


@DTYPES
@pytest.mark.parametrize("op", [RMS_NORM, LAYER_NORM], ids=lambda op: op.name)
class TestEveryNorm:
    def test_keeps_its_promise(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_keeps_promise(op, data, dtype))()

    def test_thread_count_does_not_matter(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(op, data, dtype))()

    def test_a_row_depends_on_itself_alone(self, isa, op, dtype):
        arguments = op.draw(RandomDraw(3), dtype)
        arguments["x"] = RandomDraw(4).tensor(75, arguments["weight"].numel(), dtype=dtype)
        whole = getattr(ops, op.name)(**arguments)
        order = torch.randperm(75, generator=torch.Generator().manual_seed(0))
        shuffled = getattr(ops, op.name)(**{**arguments, "x": arguments["x"][order]})
        assert properties.same_bits(whole[order], shuffled)
        for row in (0, 63, 64, 74):
            alone = getattr(ops, op.name)(**{**arguments, "x": arguments["x"][row : row + 1]})
            assert properties.same_bits(whole[row : row + 1], alone)


def test_gradcheck():
    for seed in range(3):
        x = RandomDraw(seed).tensor(3, 5, dtype=torch.float64)
        weight = RandomDraw(seed + 9).tensor(5, dtype=torch.float64)
        torch.autograd.gradcheck(ops.rms_norm, (x.requires_grad_(), weight.requires_grad_(), 1e-5))
        bias = RandomDraw(seed + 20).tensor(5, dtype=torch.float64)
        torch.autograd.gradcheck(ops.layer_norm, (x, weight, bias.requires_grad_(), 1e-5))


def test_opcheck_compile_export():
    x, weight = torch.randn(6, 32), torch.randn(32)
    properties.assert_opcheck(RMS_NORM, (x.requires_grad_(), weight.requires_grad_(), 1e-5))
    x, weight = x.detach(), weight.detach()
    properties.assert_compiles(RMS_NORM, {"x": x, "weight": weight}, {"x": torch.randn(11, 32), "weight": weight})
    properties.assert_exports(RMS_NORM, {"x": x, "weight": weight, "eps": 1e-5}, {"x": {0: torch.export.Dim("tokens")}})


def test_layer_norm_opcheck_compile_export():
    x, weight, bias = torch.randn(6, 32), torch.randn(32), torch.randn(32)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    properties.assert_opcheck(LAYER_NORM, (*leaves, 1e-6))
    rest = {"weight": weight, "bias": bias}
    properties.assert_compiles(LAYER_NORM, {"x": x, **rest}, {"x": torch.randn(11, 32), **rest})
    properties.assert_exports(LAYER_NORM, {"x": x, **rest, "eps": 1e-6}, {"x": {0: torch.export.Dim("tokens")}})


def test_layer_norm_edges(isa):
    # One dimension: nothing is left but the bias. A constant row: the same. A NaN poisons its own row alone.
    assert torch.equal(ops.layer_norm(torch.randn(4, 1), torch.ones(1), torch.full((1,), 2.5)), torch.full((4, 1), 2.5))
    assert torch.equal(ops.layer_norm(torch.full((2, 40), 3.0), torch.ones(40), torch.zeros(40)), torch.zeros(2, 40))
    x = torch.randn(3, 40)
    x[1, 7] = float("nan")
    y = ops.layer_norm(x, torch.ones(40), torch.zeros(40))
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((torch.ones(2, 3), torch.ones(4)), ValueError, "weight has shape"),
        ((torch.ones(2, 3), torch.ones(3, dtype=torch.bfloat16)), ValueError, "weight has dtype"),
        ((torch.ones(2, 3, dtype=torch.int32), torch.ones(3)), ValueError, "x has dtype"),
        ((torch.ones(2, 3), torch.ones(3), -1.0), ValueError, "eps is -1"),
        ((torch.ones(2, 0), torch.ones(0)), ValueError, "non-empty last dimension"),
        (([1.0], torch.ones(1)), TypeError, "x is list"),
    ],
)
def test_bad_input(arguments, error, words):
    properties.assert_refused(error, words, ops.rms_norm, *arguments)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((torch.ones(2, 3), torch.ones(4), torch.ones(3)), ValueError, "weight has shape"),
        ((torch.ones(2, 3), torch.ones(3), torch.ones(2)), ValueError, "bias has shape"),
        ((torch.ones(2, 3), torch.ones(3), torch.ones(3).double()), ValueError, "bias has dtype"),
        ((torch.ones(2, 3), torch.ones(3), torch.ones(3), -1.0), ValueError, "eps is -1"),
        ((torch.ones(2, 3), torch.ones(3), None), TypeError, "bias is NoneType"),
    ],
)
def test_layer_norm_bad_input(arguments, error, words):
    properties.assert_refused(error, words, ops.layer_norm, *arguments)


def test_backward_wants_dy_in_the_shape_of_x():
    x, weight = torch.ones(2, 6), torch.ones(6)
    for op in (torch.ops.glm5.rms_norm_backward, torch.ops.glm5.layer_norm_backward):
        for dy in (torch.ones(6, 2), torch.ones(12), torch.ones(2, 5)):
            properties.assert_refused(ValueError, "dy has shape", op, dy, x, weight, 1e-5)
