"""Rotary embedding: against float64, token by token, through strided views, on every instruction set."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5 import ops
from glm5.testing import RandomDraw, spec
from tests.ops import properties

ROPE = spec("rope")
DTYPES = pytest.mark.parametrize("dtype", ROPE.dtypes, ids=["bf16", "float32"])
LAYOUTS = pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half_split"])


def tables(positions=100, half=32, dtype=torch.float32):
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * 1e4 ** (-torch.arange(half, dtype=torch.float64) / half)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@DTYPES
def test_keeps_its_promise(isa, dtype):
    given(st.data())(lambda data: properties.assert_keeps_promise(ROPE, data, dtype))()


@DTYPES
def test_thread_count_does_not_matter(isa, dtype):
    given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(ROPE, data, dtype))()


@DTYPES
@LAYOUTS
def test_a_token_depends_on_itself_alone(isa, dtype, interleaved):
    x, positions = RandomDraw(1).tensor(35, 3, 22, dtype=dtype), torch.randint(100, (35,))
    cos, sin = tables(half=11)
    whole = ops.rope(x, cos, sin, positions, interleaved)
    order = torch.randperm(35)
    assert properties.same_bits(whole[order], ops.rope(x[order], cos, sin, positions[order], interleaved))
    for t in (0, 15, 16, 34):
        alone = ops.rope(x[t : t + 1], cos, sin, positions[t : t + 1], interleaved)
        assert properties.same_bits(whole[t : t + 1], alone)
        assert properties.same_bits(alone[:, 1], ops.rope(x[t : t + 1, 1], cos, sin, positions[t : t + 1], interleaved))
    assert properties.same_bits(whole, ops.rope(x, cos, sin, positions.int(), interleaved))


@DTYPES
@LAYOUTS
def test_views_give_the_bits_of_copies(isa, dtype, interleaved):
    x, positions = RandomDraw(2).tensor(9, 4, 192 + 64, dtype=dtype), torch.arange(9)
    cos, sin = tables()
    for view in (x[..., 192:], x[..., :64], x[:, 2, 192:], x.transpose(0, 1)[..., 3:67].transpose(0, 1), x[:1, :1, :64]):
        got = ops.rope(view, cos, sin, positions[: len(view)], interleaved)
        assert got.is_contiguous()
        assert properties.same_bits(got, ops.rope(view.clone(), cos, sin, positions[: len(view)], interleaved))
    backwards = x.permute(0, 2, 1)[:, :4, :4].flip(-1).transpose(1, 2)  # the last dimension is not contiguous
    assert properties.same_bits(
        ops.rope(backwards, *tables(half=2), positions, interleaved),
        ops.rope(backwards.contiguous(), *tables(half=2), positions, interleaved),
    )


@LAYOUTS
def test_rotations_keep_lengths_and_relative_angles(isa, interleaved):
    cos, sin = tables(half=16)
    q, k = torch.randn(1, 32).expand(60, 32), torch.randn(1, 32).expand(60, 32)
    turned_q = ops.rope(q, cos, sin, torch.arange(60), interleaved)
    turned_k = ops.rope(k, cos, sin, torch.arange(60) + 7, interleaved)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    dots = (turned_q * turned_k).sum(-1)
    torch.testing.assert_close(dots, dots[:1].expand(60), rtol=1e-4, atol=1e-4)


@LAYOUTS
def test_gradcheck(interleaved):
    cos, sin = tables(20, 3, torch.float64)
    x = RandomDraw(0).tensor(4, 2, 6, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda x: ops.rope(x, cos, sin, torch.tensor([0, 3, 19, 3]), interleaved), (x,))


@LAYOUTS
def test_opcheck_compile_export(interleaved):
    cos, sin = tables()
    x, positions = torch.randn(6, 2, 64), torch.arange(6)
    properties.assert_opcheck(ROPE, (x.clone().requires_grad_(), cos, sin, positions, interleaved))
    rest = {"cos": cos, "sin": sin, "interleaved": interleaved}
    first = {"x": x, "positions": positions, **rest}
    properties.assert_compiles(ROPE, first, {"x": torch.randn(11, 2, 64), "positions": torch.arange(11), **rest})
    tokens = torch.export.Dim("tokens")
    properties.assert_exports(ROPE, first, {"x": {0: tokens}, "positions": {0: tokens}})


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"positions": torch.tensor([0, 100])}, ValueError, r"positions\[1\] is 100"),
        ({"positions": torch.tensor([-1, 0], dtype=torch.int32)}, ValueError, r"positions\[0\] is -1"),
        ({"positions": torch.tensor([0.0, 1.0])}, ValueError, "positions has dtype"),
        ({"positions": torch.arange(3)}, ValueError, "positions has shape"),
        ({"x": torch.ones(2, 63)}, ValueError, "even last dimension"),
        ({"x": torch.ones(2, 62)}, ValueError, "cos has shape"),
        ({"x": torch.ones(2, 1, 1, 64)}, ValueError, "x has shape"),
        ({"x": torch.ones(2, 64, dtype=torch.float16)}, ValueError, "x has dtype"),
        ({"x": torch.ones(2, 64, dtype=torch.float64)}, ValueError, "cos has dtype"),
        ({"sin": torch.ones(99, 32)}, ValueError, "sin has shape"),
        ({"cos": 1.0}, TypeError, "cos is float"),
    ],
)
def test_bad_input(change, error, words):
    cos, sin = tables()
    arguments = {"x": torch.ones(2, 64), "cos": cos, "sin": sin, "positions": torch.arange(2), "interleaved": True}
    properties.assert_refused(error, words, ops.rope, **{**arguments, **change})
