"""Quantisation: the reference's bits on every instruction set, and what codes and scales promise by themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5 import _native, ops, reference
from glm5.testing import RandomDraw, spec
from tests.ops import properties
from tests.ops.properties import same_bits

SPECS = [
    spec(name)
    for name in (
        "quantize_fp8",
        "dequantize_fp8",
        "quantize_int8",
        "quantize_int4",
        "dequantize_int4",
        "fake_quantize_int4",
    )
]
OPS = pytest.mark.parametrize("op", SPECS, ids=lambda op: op.name)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
BLOCKS = pytest.mark.parametrize("block", [(1, 128), (128, 128)], ids=["rows", "tiles"])
bf16, e4m3 = torch.bfloat16, torch.float8_e4m3fn


@OPS
@DTYPES
def test_has_the_bits_of_the_reference(isa, op, dtype):
    given(st.data())(lambda data: properties.assert_keeps_promise(op, data, dtype))()


@OPS
@DTYPES
def test_thread_count_does_not_matter(isa, op, dtype):
    given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(op, data, dtype))()


# ---- e4m3 ----


def every_bf16():
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(bf16)


def codes_with_scale_one(x):
    """e4m3 codes of numbers up to 448, through blocks whose first element makes the scale 1."""
    rows = torch.nn.functional.pad(x.float(), (0, -x.numel() % 127)).view(-1, 127)
    rows = torch.cat([torch.full((len(rows), 1), 448.0), rows], 1)
    q, scale = ops.quantize_fp8(rows)
    assert (scale == 1).all()
    return q[:, 1:].flatten()[: x.numel()]


def assert_is_torchs_cast(x):
    assert same_bits(codes_with_scale_one(x), x.float().to(e4m3))


def test_rounds_every_bfloat16_as_torch_does(isa):
    x = every_bf16()
    assert_is_torchs_cast(x[x.float().abs() <= 448])


def test_rounds_float32_as_torch_does(isa):
    generator = torch.Generator().manual_seed(7)
    bits = torch.randint(-(2**31), 2**31, (500_000,), generator=generator).to(torch.int32)
    x = bits.view(torch.float32)
    assert_is_torchs_cast(x[x.abs() <= 448])
    # Around every boundary between two codes, one float to each side of it.
    codes = torch.arange(0x7F, dtype=torch.uint8).view(e4m3).float()
    ties = ((codes[1:] + codes[:-1]) / 2).view(torch.int32)
    near = torch.cat([ties - 1, ties, ties + 1, codes.view(torch.int32)]).view(torch.float32)
    assert_is_torchs_cast(torch.cat([near, -near]))


@DTYPES
def test_reads_all_256_codes_exactly(isa, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(e4m3)
    for first in range(0, 256, 11):
        q = codes[first:].view(1, -1)
        out = ops.dequantize_fp8(q, torch.ones(1, -(-q.shape[1] // 128)), out_dtype=dtype)
        torch.testing.assert_close(out, q.to(dtype), rtol=0, atol=0, equal_nan=True)
        assert same_bits(out.signbit() & (out == 0), q.float().signbit() & (q.float() == 0))


@BLOCKS
def test_all_codes_come_back(isa, block):
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(2)[:384].view(3, 128)[:, torch.randperm(128)]
    codes[:, 0] = 0x7E  # 448
    for scale in (2.0**-20, 2.0**-3, 0.37, 5e5):
        x = ops.dequantize_fp8(codes.view(e4m3), torch.full((3 if block[0] == 1 else 1, 1), scale), block, torch.float32)
        again, _ = ops.quantize_fp8(x, block)
        assert same_bits(again.view(torch.uint8), codes)


@BLOCKS
@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_is_idempotent(isa, block, power_of_two):
    @given(st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 1e4]))
    def check(seed, size):
        x = RandomDraw(seed).tensor(130, 260, scale=size)
        q, scale = ops.quantize_fp8(x, block, power_of_two)
        x = ops.dequantize_fp8(q, scale, block, torch.float32)
        again, scale_again = ops.quantize_fp8(x, block, power_of_two)
        if power_of_two:  # a block whose largest code became 224 has half the scale
            assert same_bits(ops.dequantize_fp8(again, scale_again, block, torch.float32), x)
        else:
            assert same_bits(again, q)
            torch.testing.assert_close(scale_again, scale, rtol=2e-7, atol=0)

    check()


def test_scales_of_fp8(isa):
    x = torch.tensor([[448.0], [224.0], [224.1], [1e-4], [9e-5], [0.0], [3e38]])
    _, scale = ops.quantize_fp8(x)
    assert same_bits(scale, (x.clamp_min(1e-4) / 448))
    q, scale = ops.quantize_fp8(x, power_of_two=True)
    least = 2.0 ** np.ceil(np.log2(1e-4 / 448))
    assert scale.flatten().tolist()[:6] == [1.0, 0.5, 1.0, least, least, least]
    mantissa, _ = scale.frexp()
    assert (mantissa == 0.5).all()
    # Exact: with a power of two the ratio is, so that the codes are those of a plain cast.
    x = torch.randn(40, 300)
    q, scale = ops.quantize_fp8(x, power_of_two=True)
    assert same_bits(q, (x / scale.repeat_interleave(128, 1)[:, :300]).to(e4m3))


def assert_reference_bits(function, *args, **kwargs):
    got, want = (properties.as_tuple(getattr(m, function)(*args, **kwargs)) for m in (ops, reference))
    assert all(same_bits(g, w) for g, w in zip(got, want, strict=True)), function


@given(st.integers(0, 2**31))
def test_quotients_beside_a_tie_fall_on_its_right_side(seed):
    """Whatever stands for the division: ratios a unit or two of the last place from where the code changes."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-60, 90, (16, 1), generator=generator)
    amax = torch.ldexp(1 + torch.rand(16, 1, generator=generator), exponents)
    e4m3_codes = torch.arange(0x7F, dtype=torch.uint8).view(e4m3).float()
    for function, divisor, ties in (
        ("quantize_fp8", 448, (e4m3_codes[1:] + e4m3_codes[:-1]) / 2),
        ("quantize_int8", 127, torch.arange(127) + 0.5),
        ("quantize_int4", 7, torch.arange(7) + 0.5),
    ):
        around = torch.arange(-3, 4, dtype=torch.int32)[:, None]
        beside = ((amax / divisor * ties).view(torch.int32)[:, None] + around).view(torch.float32).flatten(1)
        sign = torch.where(torch.rand(beside.shape, generator=generator) < 0.5, -1.0, 1.0)
        # Runs of 96 and the largest magnitude, padded to groups of 128.
        runs = torch.nn.functional.pad(beside * sign, (0, -beside.shape[1] % 96)).unflatten(1, (-1, 96))
        x = torch.cat([amax[:, None].expand(-1, runs.shape[1], 1), runs.clamp(-amax[:, None], amax[:, None])], -1)
        x = torch.nn.functional.pad(x, (0, 31)).flatten(1)
        for isa in _native.available_isas():
            with _native.using_cpu_isa(isa):
                assert_reference_bits(function, x)


@pytest.mark.parametrize(
    "function, divisor, tie", [("quantize_fp8", 448, 2.0**-10), ("quantize_int8", 127, 0.5), ("quantize_int4", 7, 0.5)]
)
def test_a_quotient_just_above_half_a_unit_above_a_tie(isa, function, divisor, tie):
    """2 tie / (2 - 2^-23) is the tie and 2^-48 of it more than half a unit: the hardest quotient to round."""
    largest = 2 - 2.0**-23
    amax = (torch.tensor(largest) * divisor).item()
    x = torch.full((1, 128), 2 * tie)
    x[0, 0] = amax
    assert getattr(reference, function)(x)[1].item() == largest
    assert_reference_bits(function, x)
    assert getattr(ops, function)(x)[0].view(torch.uint8)[0, 1:].all()


# ---- blocks, rows and groups stand alone ----


def test_a_block_depends_on_itself_alone(isa):
    x = RandomDraw(3).tensor(300, 700, dtype=bf16)
    for block in ((1, 128), (128, 128)):
        q, scale = ops.quantize_fp8(x, block)
        for i, j in ((0, 0), (128, 128), (256, 640)):
            part = x[i : i + 128, j : j + 128]
            q_part, scale_part = ops.quantize_fp8(part, block)
            assert same_bits(q_part, q[i : i + 128, j : j + 128])
            assert same_bits(scale_part, scale[i // block[0] : (i + 128) // block[0] + (i == 256), j // 128 : j // 128 + 1])
    x = RandomDraw(4).tensor(40, 256, dtype=bf16)
    order = torch.randperm(40)
    for function in (ops.quantize_fp8, ops.quantize_int8, ops.quantize_int4, lambda x: ops.quantize_int4(x, 32, False)):
        for whole, moved, few in zip(function(x), function(x[order]), function(x[7:9]), strict=True):
            if whole is not None:
                assert same_bits(whole[order], moved) and same_bits(whole[7:9], few)
    whole = ops.quantize_int4(x, 64)
    part = ops.quantize_int4(x[:, 64:192], 64)
    assert same_bits(part[0], whole[0][:, 32:96]) and same_bits(part[1], whole[1][:, 1:3])


def test_wide_rows_are_cut_where_nothing_shows(isa):
    x = RandomDraw(5).tensor(2, 40000, dtype=bf16)
    for name, kwargs in (
        ("quantize_fp8", {}),
        ("quantize_fp8", {"block": (128, 128)}),
        ("quantize_int8", {}),
        ("quantize_int4", {"group_size": 32, "symmetric": False}),
        ("quantize_int4", {"group_size": -1}),
        ("fake_quantize_int4", {"group_size": 64}),
    ):
        assert_reference_bits(name, x, **kwargs)
    assert_reference_bits("dequantize_fp8", *reference.quantize_fp8(x))
    assert_reference_bits("dequantize_int4", *reference.quantize_int4(x, 32, False))


@DTYPES
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_poisoned_block_stays_visible_and_harms_no_other(isa, dtype, poison):
    clean = RandomDraw(6).tensor(4, 256, dtype=dtype)
    for place in (0, 5, 127):
        x = clean.clone()
        x[2, 128 + place] = poison
        ways = {
            "fp8": lambda x: ops.dequantize_fp8(*ops.quantize_fp8(x), out_dtype=dtype),
            "int4": lambda x: ops.dequantize_int4(*ops.quantize_int4(x), out_dtype=dtype),
            "int4 with zeros": lambda x: ops.dequantize_int4(*ops.quantize_int4(x, 128, False), out_dtype=dtype),
            "fake": ops.fake_quantize_int4,
            "fake with zeros": lambda x: ops.fake_quantize_int4(x, 128, False),
        }
        for name, way in ways.items():
            out, want = way(x), way(clean)
            assert out[2, 128:].isnan().all(), name
            want[2, 128:] = out[2, 128:]
            assert same_bits(out, want), name
        q, scale = ops.quantize_int8(x)
        assert not scale[2].isfinite() and (q[2] == 0).all()
        assert same_bits(q[[0, 1, 3]], ops.quantize_int8(clean)[0][[0, 1, 3]])


def test_subnormals_and_signed_zeros(isa):
    x = torch.tensor([[0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-38, 0.0, 0.0]])
    q, _ = ops.quantize_fp8(x)
    assert q.view(torch.uint8).tolist() == [[0, 0x80, 0, 0x80, 0, 0x80, 0, 0]]
    assert ops.quantize_int8(x)[0].tolist() == [[0] * 8]
    packed, scale, _ = ops.quantize_int4(torch.zeros(1, 32) - 0.0, 32)
    assert packed.tolist() == [[0] * 16] and scale.tolist() == [[0.0]]
    assert same_bits(ops.fake_quantize_int4(torch.full((1, 32), -0.0), 32), torch.zeros(1, 32))
    for size in (1e-45, 3e-45, 1e-44, 1e-40, 1e-38):
        x = torch.linspace(-size, size, 32)[None]
        for symmetric in (True, False):
            assert_reference_bits("quantize_int4", x, 32, symmetric)


# ---- int8 and int4 ----


def test_int8_reaches_127_and_no_further(isa):
    bits = torch.randint(1, 0x7F7F, (4000, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    largest = (bits << 16).view(torch.float32) * (1 + torch.rand(4000, 1) / 128)
    largest = largest[:, :1].clamp(1e-10, 3e38)
    q, _ = ops.quantize_int8(torch.cat([largest, -largest, largest * 0.5], 1))
    assert (q[:, 0] == 127).all() and (q[:, 1] == -127).all()


def test_ties_go_to_even(isa):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5]])
    assert ops.quantize_int8(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    w = torch.zeros(1, 32)
    w[0, :6] = torch.tensor([7.0, 0.5, 1.5, -2.5, -3.5, 6.5])
    packed, scale, _ = ops.quantize_int4(w, 32)
    assert scale.item() == 1.0
    assert packed[0, :3].tolist() == [0x07, 0xE2, 0x6C]


@DTYPES
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_int4_error_is_half_a_step_and_codes_come_back(isa, dtype, symmetric, group_size):
    w = RandomDraw(9).tensor(6, 256, dtype=dtype)
    packed, scale, zeros = ops.quantize_int4(w, group_size, symmetric)
    value = ops.dequantize_int4(packed, scale, zeros, torch.float32)
    step = scale.repeat_interleave(256 // scale.shape[1], 1)
    assert ((value - w.float()).abs() <= step * (0.5 if symmetric else 1.0) * 1.0001).all()
    if symmetric:
        again, scale_again, _ = ops.quantize_int4(value, group_size)
        assert same_bits(again, packed)
        torch.testing.assert_close(scale_again, scale, rtol=2e-7, atol=0)


def test_every_byte_of_packed_codes_is_read(isa):
    packed = torch.arange(256, dtype=torch.uint8).view(2, 128)
    codes = ops.dequantize_int4(packed, torch.ones(2, 1), out_dtype=torch.float32)
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(1).int()
    assert torch.equal(codes.int(), torch.where(nibbles > 7, nibbles - 16, nibbles))
    zeros = torch.tensor([[3], [200]], dtype=torch.uint8)  # any byte is a zero point
    codes = ops.dequantize_int4(packed, torch.ones(2, 1), zeros, torch.float32)
    assert torch.equal(codes.int(), nibbles - zeros.int())


@DTYPES
@pytest.mark.parametrize("symmetric", [True, False])
def test_fake_quantisation_is_quantise_then_dequantise(isa, dtype, symmetric):
    @given(st.data())
    def check(data):
        arguments = spec("fake_quantize_int4").draw(properties.HypothesisDraw(data), dtype)
        x, group_size = arguments["x"].requires_grad_(), arguments["group_size"]
        fake = ops.fake_quantize_int4(x, group_size, symmetric)
        assert same_bits(fake, ops.dequantize_int4(*ops.quantize_int4(x, group_size, symmetric), out_dtype=dtype))
        dy = torch.randn(x.shape).to(dtype)
        assert same_bits(torch.autograd.grad(fake, x, dy)[0], dy)

    check()


# ---- layouts, sizes, compilation, bad inputs ----


@DTYPES
def test_any_layout_is_read(isa, dtype):
    base = RandomDraw(11).tensor(258, 130, 3, dtype=dtype)
    views = [base[..., 0].t()[:, 1:257], base[2:, 2, :].expand(256, 3).t(), base.permute(2, 1, 0)[..., 2:], base[1:2, :, 0]]
    views = [v[..., : v.shape[-1] // 32 * 32] for v in views]
    assert not any(v.is_contiguous() for v in views)
    for x in views:
        for function in (ops.quantize_fp8, ops.quantize_int8, lambda x: ops.quantize_int4(x, 32, False)):
            assert all(same_bits(a, b) for a, b in zip(function(x), function(x.contiguous()), strict=True))
    q, scale = ops.quantize_fp8(base[..., 0].contiguous())
    assert same_bits(ops.dequantize_fp8(q.t().contiguous().t(), scale.t().contiguous().t()), ops.dequantize_fp8(q, scale))


@OPS
def test_opcheck_compile_export(op):
    x, other = torch.randn(6, 256), torch.randn(11, 256)
    rows = {0: torch.export.Dim("rows")}
    if op.name == "dequantize_fp8":
        cases = [dict(zip(("q", "scale"), ops.quantize_fp8(t), strict=True)) for t in (x, other)]
        # opcheck's schema test compares inputs by arithmetic that torch has not for e4m3.
        rest = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(torch.ops.glm5.dequantize_fp8.default, (*cases[0].values(), 1, 128, bf16), test_utils=rest)
    elif op.name == "dequantize_int4":
        cases = [dict(zip(("packed", "scale", "zeros"), ops.quantize_int4(t, 32, False), strict=True)) for t in (x, other)]
        properties.assert_opcheck(op, (*cases[0].values(), bf16))
    else:
        name = "w" if op.name == "quantize_int4" else "x"
        cases = [{name: x}, {name: other}]
        rest = {"quantize_fp8": (128, 128, True), "quantize_int8": ()}.get(op.name, (32, False))
        properties.assert_opcheck(op, (x.clone().requires_grad_(), *rest))
    properties.assert_compiles(op, *cases)
    properties.assert_exports(op, cases[0], {k: rows for k in cases[0]})


def test_gradcheck_of_what_has_none():
    x = torch.randn(4, 256, requires_grad=True)
    for outputs in (ops.quantize_fp8(x), ops.quantize_int8(x), ops.quantize_int4(x)):
        assert not any(o.requires_grad for o in outputs if o is not None)


ONES = torch.ones(2, 256)
PACKED, SCALE = torch.zeros(2, 128, dtype=torch.uint8), torch.ones(2, 2)
CODES = torch.zeros(2, 256).to(e4m3)


@pytest.mark.parametrize(
    "name, args, error, words",
    [
        ("quantize_fp8", (ONES.double(),), ValueError, "x has dtype"),
        ("quantize_fp8", (torch.ones(4),), ValueError, r"x has shape \[4\], want at least 2 dimensions"),
        ("quantize_fp8", (ONES, (2, 128)), ValueError, r"block is [\[(]2, 128[\])], want \(1, 128\) or \(128, 128\)"),
        ("quantize_fp8", (ONES, (128, 1)), ValueError, "block is"),
        ("quantize_fp8", (ONES, 128), TypeError, "block is 128, want a pair"),
        ("quantize_fp8", (ONES, (1.0, 128)), TypeError, r"block\[0\] is float"),
        ("quantize_fp8", (ONES, (1, 128), 1), TypeError, "power_of_two is int, want bool"),
        ("dequantize_fp8", (ONES, SCALE), ValueError, "q has dtype"),
        ("dequantize_fp8", (CODES, SCALE.double()), ValueError, "scale has dtype"),
        ("dequantize_fp8", (CODES, torch.ones(2, 3)), ValueError, r"scale has shape \[2, 3\], want \[2, 2\]"),
        ("dequantize_fp8", (CODES, SCALE, (128, 128)), ValueError, r"scale has shape \[2, 2\], want \[1, 2\]"),
        ("dequantize_fp8", (CODES, torch.ones(2)), ValueError, r"scale has shape \[2\]"),
        ("dequantize_fp8", (CODES, SCALE, (1, 128), torch.float16), ValueError, "out_dtype is"),
        ("dequantize_fp8", (CODES, SCALE, (1, 128), "bf16"), TypeError, "out_dtype is str, want torch.dtype"),
        ("quantize_int8", (ONES.half(),), ValueError, "x has dtype"),
        ("quantize_int8", (torch.tensor(1.0),), ValueError, r"x has shape \[\], want at least 1 dimensions"),
        ("quantize_int4", (ONES, 16), ValueError, "group_size is 16, want 32, 64, 128 or -1"),
        ("quantize_int4", (ONES, True), ValueError, "group_size is"),
        ("quantize_int4", (torch.ones(2, 96), 64), ValueError, r"w has shape \[2, 96\].* group_size = 64 divides"),
        ("quantize_int4", (torch.ones(2, 7), -1), ValueError, r"w has shape \[2, 7\], want an even last dimension"),
        ("quantize_int4", (ONES, 32, None), TypeError, "symmetric is NoneType, want bool"),
        ("dequantize_int4", (PACKED.char(), SCALE), ValueError, "packed has dtype"),
        ("dequantize_int4", (PACKED, SCALE[:1]), ValueError, r"scale has shape \[1, 2\], want \[2, 2\]"),
        ("dequantize_int4", (PACKED, torch.ones(2, 3)), ValueError, r"scale has shape \[2, 3\], want groups of equal"),
        ("dequantize_int4", (PACKED, torch.ones(2, 0)), ValueError, r"scale has shape \[2, 0\], want groups of equal"),
        ("dequantize_int4", (PACKED, torch.ones(2, 256)), ValueError, r"scale has shape \[2, 256\], want groups of equal"),
        ("dequantize_int4", (PACKED, SCALE, SCALE), ValueError, "zeros has dtype"),
        ("dequantize_int4", (PACKED, SCALE, SCALE[:, :1].byte()), ValueError, r"zeros has shape \[2, 1\], want \[2, 2\]"),
        ("dequantize_int4", (PACKED, SCALE, None, torch.int8), ValueError, "out_dtype is"),
        ("fake_quantize_int4", (ONES.double(), 32), ValueError, "x has dtype"),
        ("fake_quantize_int4", (torch.ones(2, 48), 32), ValueError, r"x has shape \[2, 48\]"),
        ("fake_quantize_int4", (ONES, "32"), TypeError, "group_size is str, want int"),
    ],
)
def test_bad_input(name, args, error, words):
    properties.assert_refused(error, f"{name}: {words}", getattr(ops, name), *args)


def test_every_instruction_set_is_compiled():
    properties.assert_every_isa_is_compiled(lambda: ops.quantize_fp8(ONES))
    assert _native.available_isas()[0] == "portable"
