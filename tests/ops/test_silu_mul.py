"""silu(gate) * up: against float64, elementwise, on every instruction set."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5 import ops
from glm5.testing import RandomDraw, spec
from tests.ops import properties

SILU_MUL, SILU_MUL_QUANTIZE = spec("silu_mul"), spec("silu_mul_quantize")
DTYPES = pytest.mark.parametrize("dtype", SILU_MUL.dtypes, ids=["bf16", "float32"])


OPS = pytest.mark.parametrize("op", [SILU_MUL, SILU_MUL_QUANTIZE], ids=lambda op: op.name)


@OPS
@DTYPES
def test_keeps_its_promise(isa, op, dtype):
    given(st.data())(lambda data: properties.assert_keeps_promise(op, data, dtype))()


@OPS
@DTYPES
def test_thread_count_does_not_matter(isa, op, dtype):
    given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(op, data, dtype))()


def quantised(y, to, power_of_two):
    return ops.quantize_int8(y) if to == torch.int8 else ops.quantize_fp8(y, (1, 128), power_of_two)


@DTYPES
def test_quantised_at_once_is_quantised_afterwards(isa, dtype):
    @given(st.data())
    def check(data):
        x, to, power_of_two = SILU_MUL_QUANTIZE.draw(properties.HypothesisDraw(data), dtype).values()
        if x.numel() and data.draw(st.booleans()):
            special = data.draw(st.sampled_from([0.0, -0.0, 1e-44, 3e38, float("nan"), float("inf"), float("-inf")]))
            x.view(-1)[data.draw(st.integers(0, x.numel() - 1))] = special
        got, want = ops.silu_mul_quantize(x, to, power_of_two), quantised(ops.silu_mul(x), to, power_of_two)
        assert all(properties.same_bits(g, w) for g, w in zip(got, want, strict=True))

    check()
    wide = RandomDraw(1).tensor(3, 80002, dtype=dtype)
    for x in (wide, wide[:, 1:-1], wide.t().contiguous().t(), wide[:, 2::2]):
        for to in (torch.float8_e4m3fn, torch.int8):
            got, want = ops.silu_mul_quantize(x, to), quantised(ops.silu_mul(x), to, False)
            assert all(properties.same_bits(g, w) for g, w in zip(got, want, strict=True))


@DTYPES
def test_an_element_depends_on_its_gate_and_up_alone(isa, dtype):
    # Wide rows are cut into pieces, narrow ones are gathered into blocks: neither shows.
    for width in (5, 48, 40000):
        x = RandomDraw(width).tensor(4, 2 * width, dtype=dtype)
        whole = ops.silu_mul(x)
        assert properties.same_bits(whole.flip(0), ops.silu_mul(x.flip(0)))
        assert properties.same_bits(whole[2:3], ops.silu_mul(x[2:3]))
        columns = torch.arange(1, width, 3)
        assert properties.same_bits(whole[:, columns], ops.silu_mul(x[:, torch.cat([columns, columns + width])]))


def test_extreme_gates(isa):
    gate = torch.tensor([0.0, -0.0, 80, -80, -87, -88.7, -89, -100, -1e4, -3e38, 3e38, float("inf"), float("nan")])
    x = torch.stack([gate, torch.ones_like(gate)], 1).requires_grad_()
    y = ops.silu_mul(x)
    y.sum().backward()
    wide = x.detach().double()
    want = torch.nn.functional.silu(wide[:, :1]) * wide[:, 1:]
    torch.testing.assert_close(y.double()[:-1], want[:-1], rtol=1e-6, atol=1e-36)
    assert y[-1].isnan().all() and x.grad[-1].isnan().all()
    torch.testing.assert_close(x.grad[3:10], torch.zeros(7, 2), rtol=0, atol=1e-30)
    torch.testing.assert_close(x.grad[2], torch.tensor([1.0, 80.0]))


def test_gradcheck():
    for seed in range(3):
        x = RandomDraw(seed).tensor(3, 10, dtype=torch.float64, scale=3.0)
        torch.autograd.gradcheck(ops.silu_mul, (x.requires_grad_(),))


def test_opcheck_compile_export():
    x = torch.randn(6, 32)
    properties.assert_opcheck(SILU_MUL, (x.clone().requires_grad_(),))
    properties.assert_compiles(SILU_MUL, {"x": x}, {"x": torch.randn(11, 32)})
    properties.assert_exports(SILU_MUL, {"x": x}, {"x": {0: torch.export.Dim("tokens")}})
    for to in (torch.float8_e4m3fn, torch.int8):
        properties.assert_opcheck(SILU_MUL_QUANTIZE, (x.clone().requires_grad_(), to, False))
        properties.assert_compiles(SILU_MUL_QUANTIZE, {"x": x, "dtype": to}, {"x": torch.randn(11, 32), "dtype": to})
        properties.assert_exports(SILU_MUL_QUANTIZE, {"x": x, "dtype": to}, {"x": {0: torch.export.Dim("tokens")}})


@pytest.mark.parametrize(
    "x, error, words",
    [
        (torch.ones(2, 3), ValueError, "even last dimension"),
        (torch.ones(4), ValueError, "2 dimensions"),
        (torch.ones(2, 4, dtype=torch.float16), ValueError, "x has dtype"),
        ([1.0, 2.0], TypeError, "x is list"),
    ],
)
def test_bad_input(x, error, words):
    properties.assert_refused(error, words, ops.silu_mul, x)


@pytest.mark.parametrize(
    "args, error, words",
    [
        ((torch.ones(2, 3),), ValueError, "x has shape .* even last dimension"),
        ((torch.ones(2, 4, dtype=torch.float64),), ValueError, "x has dtype"),
        ((torch.ones(4),), ValueError, "x has shape .*2 dimensions"),
        ((torch.ones(2, 4), torch.bfloat16), ValueError, "dtype is"),
        ((torch.ones(2, 4), torch.int8, True), ValueError, "power_of_two is True, want False with int8"),
        ((torch.ones(2, 4), "int8"), TypeError, "dtype is str, want torch.dtype"),
        ((torch.ones(2, 4), torch.int8, 0), TypeError, "power_of_two is int, want bool"),
    ],
)
def test_bad_input_of_silu_mul_quantize(args, error, words):
    properties.assert_refused(error, f"silu_mul_quantize: {words}", ops.silu_mul_quantize, *args)
