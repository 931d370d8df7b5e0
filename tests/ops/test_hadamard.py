"""The Hadamard rotation: against float64, an orthonormal involution, row by row, on every instruction set."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5 import ops
from glm5.testing import RandomDraw, spec
from tests.ops import properties

SPEC = spec("rotate_hadamard")
DTYPES = pytest.mark.parametrize("dtype", SPEC.dtypes, ids=["bf16", "float32"])


@DTYPES
def test_keeps_its_promise(isa, dtype):
    given(st.data())(lambda data: properties.assert_keeps_promise(SPEC, data, dtype))()


@DTYPES
def test_thread_count_does_not_matter(isa, dtype):
    given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(SPEC, data, dtype))()


@DTYPES
@pytest.mark.parametrize("dim", [1, 2, 8, 128, 512])
def test_a_row_depends_on_itself_alone(isa, dtype, dim):
    x = RandomDraw(4).tensor(700, dim, dtype=dtype)
    whole = ops.rotate_hadamard(x)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    assert properties.same_bits(whole[order], ops.rotate_hadamard(x[order]))
    for row in (0, 255, 256, 699):
        assert properties.same_bits(whole[row : row + 1], ops.rotate_hadamard(x[row : row + 1]))


def test_is_its_own_inverse_and_keeps_dot_products(isa):
    x, y = torch.randn(2, 5, 7, 128)
    assert torch.allclose(ops.rotate_hadamard(ops.rotate_hadamard(x)), x, atol=1e-5)
    rotated = (ops.rotate_hadamard(x) * ops.rotate_hadamard(y)).sum(-1)
    assert torch.allclose(rotated, (x * y).sum(-1), atol=1e-4)


def test_a_strided_input_gives_the_same_bits(isa):
    x = torch.randn(64, 9).T
    assert properties.same_bits(ops.rotate_hadamard(x), ops.rotate_hadamard(x.contiguous()))


def test_gradcheck():
    properties.assert_gradcheck(SPEC, 5)


def test_opcheck_compile_export():
    x = torch.randn(6, 32)
    properties.assert_opcheck(SPEC, (x.clone().requires_grad_(),))
    properties.assert_compiles(SPEC, {"x": x}, {"x": torch.randn(11, 32)})
    properties.assert_exports(SPEC, {"x": x}, {"x": {0: torch.export.Dim("tokens")}})


@pytest.mark.parametrize(
    "x, error, words",
    [
        (torch.ones(2, 3), ValueError, "power of two"),
        (torch.ones(2, 0), ValueError, "power of two"),
        (torch.ones(()), ValueError, "power of two"),
        (torch.ones(2, 4, dtype=torch.int32), ValueError, "x has dtype"),
        (torch.ones(2, 4, device="meta"), ValueError, None),
        ([1.0], TypeError, "x is list"),
    ],
)
def test_bad_input(x, error, words):
    if words is None:
        assert ops.rotate_hadamard(x).device.type == "meta"  # shapes alone, for tracing
        return
    properties.assert_refused(error, words, ops.rotate_hadamard, x)
