"""int4 checkpoints of others: bytes come back, values agree with the formats' own definitions, misfits are named."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5 import ops
from glm5.model.int4_formats import (
    MSMODELSLIM_DOWN_PARTS,
    CompressedTensorsInt4,
    Int4Weight,
    MsModelSlimInt4,
    from_compressed_tensors,
    from_msmodelslim,
    to_compressed_tensors,
    to_msmodelslim,
)
from glm5.testing import same_bits


def same(a: tuple, b: tuple) -> bool:
    return all((x is None and y is None) or same_bits(x, y) for x, y in zip(a, b, strict=True))


@st.composite
def weights(draw, num_groups=(1, 2, 3), sizes=(2, 6, 8, 32, 128), symmetric=(True, False)):
    """Canonical weights of any codes, with scales that bfloat16 holds."""
    shape = (*draw(st.sampled_from([(), (3,)])), draw(st.sampled_from([2, 4, 8, 10, 24])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups, size = draw(st.sampled_from(num_groups)), draw(st.sampled_from(sizes))
    packed = torch.randint(0, 256, (*shape, size * groups // 2), generator=generator, dtype=torch.uint8)
    scale = torch.rand(*shape, groups, generator=generator).bfloat16().float()
    zeros = torch.randint(0, 16, scale.shape, generator=generator, dtype=torch.uint8)
    return Int4Weight(packed, scale, None if draw(st.sampled_from(symmetric)) else zeros)


def codes_of(weight: Int4Weight) -> torch.Tensor:
    """Integers [..., N, K]."""
    ones = torch.ones_like(weight.scale)
    return ops.dequantize_int4(weight.packed, ones, weight.zeros, torch.float32).int()


# ---- compressed-tensors ----


@given(weights())
def test_compressed_tensors_and_back(weight):
    stored = to_compressed_tensors(weight)
    assert same(from_compressed_tensors(stored), weight)
    assert same(to_compressed_tensors(from_compressed_tensors(stored)), stored)


@given(weights())
def test_compressed_tensors_as_its_readers_read_it(weight):
    stored = to_compressed_tensors(weight)
    rows, columns = stored.weight_shape.tolist()
    # Code i of eight lies at bit 4 i, plus 8.
    codes = torch.stack([stored.weight_packed >> 4 * i & 15 for i in range(8)], -1).flatten(-2)[..., :columns] - 8
    if stored.weight_zero_point is not None:
        eight = torch.stack([stored.weight_zero_point >> 4 * i & 15 for i in range(8)], -2)
        zeros = eight.flatten(-3, -2)[..., :rows, :] - 8
        codes = codes - zeros.repeat_interleave(columns // zeros.shape[-1], -1)
    assert torch.equal(codes, codes_of(weight))


def test_compressed_tensors_by_hand():
    """-8 to 7 are stored as 0 to 15, the first in the lowest bits."""
    packed = torch.tensor([[0x76543210, -0x01234568]], dtype=torch.int32)  # the second is 0xFEDCBA98
    stored = CompressedTensorsInt4(packed, torch.tensor([[0.5]]).bfloat16(), torch.tensor([1, 16]), None)
    weight = from_compressed_tensors(stored)
    assert codes_of(weight).tolist() == [list(range(-8, 8))]
    assert ops.dequantize_int4(*weight).tolist() == [[c / 2 for c in range(-8, 8)]]


def test_a_scale_that_would_be_rounded_is_refused():
    packed, scale, _ = ops.quantize_int4(torch.randn(4, 64), 32)
    weight = Int4Weight(packed, scale, None)
    with pytest.raises(ValueError, match="scale has values that are not exact in torch.bfloat16"):
        to_compressed_tensors(weight)
    assert same(from_compressed_tensors(to_compressed_tensors(weight, torch.float32)), weight)


GOOD = to_compressed_tensors(Int4Weight(torch.zeros(4, 6, dtype=torch.uint8), torch.ones(4, 2), torch.ones(4, 2).byte()))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"weight_packed": GOOD.weight_packed.long()}, "weight_packed has dtype"),
        ({"weight_packed": GOOD.weight_packed[:, :1]}, r"weight_packed has shape \[4, 1\], want \[..., 4, 2\]"),
        ({"weight_packed": torch.full_like(GOOD.weight_packed, -1)}, "weight_packed holds codes beyond K = 12"),
        ({"weight_shape": torch.tensor([4])}, r"weight_shape has shape \[1\]"),
        ({"weight_shape": torch.tensor([4, 15])}, "groups of equal, even size for K = 15"),
        ({"weight_scale": GOOD.weight_scale.double()}, "weight_scale has dtype"),
        ({"weight_scale": GOOD.weight_scale[:2]}, r"weight_scale has shape \[2, 2\]"),
        ({"weight_scale": GOOD.weight_scale.repeat(1, 4)}, "groups of equal, even size for K = 12"),
        ({"weight_zero_point": GOOD.weight_zero_point.long()}, "weight_zero_point has dtype"),
        ({"weight_zero_point": GOOD.weight_zero_point[:, :1]}, r"weight_zero_point has shape \[1, 1\], want \[..., 1, 2\]"),
        ({"weight_zero_point": torch.full_like(GOOD.weight_zero_point, -1)}, "zero points beyond N = 4"),
    ],
)
def test_bad_compressed_tensors(change, words):
    with pytest.raises(ValueError, match=words):
        from_compressed_tensors(GOOD._replace(**change))


# ---- msModelSlim ----

single_groups = weights(num_groups=(1,), sizes=(16, 32, 144), symmetric=(True,))
PARTS = st.sampled_from([1, 2, MSMODELSLIM_DOWN_PARTS])


@given(single_groups, PARTS)
def test_msmodelslim_and_back(weight, parts):
    stored = to_msmodelslim(weight, parts)
    assert same(from_msmodelslim(stored), weight)
    assert same(to_msmodelslim(from_msmodelslim(stored), parts), stored)


@given(single_groups, PARTS)
def test_msmodelslim_as_its_readers_read_it(weight, parts):
    stored = to_msmodelslim(weight, parts)
    codes = codes_of(weight)
    # Transposed to [K, N], a byte holds outputs 2 j (low nibble, sign-extended) and 2 j + 1.
    pairs = stored.weight.transpose(-1, -2).int()
    read = torch.stack([(pairs & 15 ^ 8) - 8, pairs >> 4], -1).flatten(-2)
    assert torch.equal(read.transpose(-1, -2), codes)
    # As the tool computes it: a float32 sum.
    bias = 8 * (codes.float() * stored.weight_scale).unflatten(-1, (parts, -1)).sum(-1)
    torch.testing.assert_close(stored.scale_bias, bias, rtol=1e-5, atol=1e-5 * float(8 * 8 * weight.scale.amax() * 144))
    from_msmodelslim(stored._replace(scale_bias=bias))


@given(single_groups, st.integers(0, 2**31))
def test_scale_bias_makes_up_for_nibbles_of_activations_read_without_sign(weight, seed):
    """x = 16 high + (low + 8) with low in [-8, 7]: the products with signed nibbles and scale_bias are those with x."""
    stored = to_msmodelslim(weight, 1)
    codes = codes_of(weight)
    x = torch.randint(-128, 128, (5, codes.shape[-1]), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    high, low = x >> 4, (x & 15) - 8
    product = 16 * (high @ codes.mT) + low @ codes.mT  # exact
    scale, bias = (t.double().mT for t in (stored.weight_scale, stored.scale_bias))
    torch.testing.assert_close(product * scale + bias, (x @ codes.mT) * scale, rtol=1e-6, atol=1e-3)


SLIM = to_msmodelslim(Int4Weight(torch.full((4, 6), 0x21, dtype=torch.uint8), torch.ones(4, 1), None))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"weight": SLIM.weight.byte()}, "weight has dtype"),
        ({"weight": SLIM.weight[:, :11]}, "weight has shape .*even last dimension"),
        ({"weight": SLIM.weight[0]}, "weight has shape .*at least 2 dimensions"),
        ({"weight_scale": SLIM.weight_scale.bfloat16()}, "weight_scale has dtype"),
        ({"weight_scale": SLIM.weight_scale[:2]}, r"weight_scale has shape \[2, 1\], want \[..., 4, 1\]"),
        ({"weight_offset": SLIM.weight_offset + 1}, "weight_offset is not zero"),
        ({"scale_bias": SLIM.scale_bias[:2]}, r"scale_bias has shape \[2, 1\]"),
        ({"scale_bias": SLIM.scale_bias.repeat(1, 5)}, "scale_bias has 5 parts, want a divisor of K = 12"),
        ({"scale_bias": SLIM.scale_bias * 1.001}, r"scale_bias\[0, 0\] is 144.144, want 144"),
        ({"scale_bias": SLIM.scale_bias * float("nan")}, r"scale_bias\[0, 0\] is nan"),
    ],
)
def test_bad_msmodelslim(change, words):
    with pytest.raises(ValueError, match=words):
        from_msmodelslim(SLIM._replace(**change))


PACKED, SCALE = torch.zeros(4, 6, dtype=torch.uint8), torch.ones(4, 1)


@pytest.mark.parametrize(
    "write, weight, words",
    [
        (to_msmodelslim, (PACKED, SCALE, SCALE.byte()), "zeros is a tensor"),
        (to_msmodelslim, (PACKED, torch.ones(4, 2), None), r"scale has shape \[4, 2\], want \[..., N, 1\]"),
        (to_msmodelslim, (PACKED[:3], SCALE[:3], None), r"packed has shape \[3, 6\], want an even number of rows"),
        (lambda w: to_msmodelslim(w, 5), (PACKED, SCALE, None), "scale_bias has 5 parts"),
        (to_compressed_tensors, (PACKED.char(), SCALE, None), "packed has dtype"),
        (to_compressed_tensors, (PACKED, SCALE[:2], None), r"scale has shape \[2, 1\]"),
        (to_compressed_tensors, (PACKED, SCALE, SCALE[:2].byte()), r"zeros has shape \[2, 1\]"),
        (to_compressed_tensors, (PACKED, SCALE, torch.full((4, 1), 16).byte()), "zeros has values above 15"),
    ],
)
def test_bad_canonical(write, weight, words):
    with pytest.raises(ValueError, match=words):
        write(Int4Weight(*weight))


def test_names_are_the_checkpoints():
    assert CompressedTensorsInt4._fields == ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    assert MsModelSlimInt4._fields == ("weight", "weight_scale", "weight_offset", "scale_bias")
