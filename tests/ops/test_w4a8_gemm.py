"""int4 weights times int8 activations: prepacking bit for bit, products against dequantised float64, one set of bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5 import _native, ops, reference
from glm5.testing import relative_error, spec
from tests.ops import properties
from tests.ops.properties import same_bits

bf16, f32 = torch.bfloat16, torch.float32
MOVES = [spec("w4a8_prepack"), spec("w4a8_unpack")]
PRODUCTS = [spec("w4a8_gemm"), spec("w4a8_grouped_gemm")]
DTYPES = pytest.mark.parametrize("dtype", [bf16, f32], ids=["bf16", "float32"])
# (k in a group, groups): a row of any even length too.
GROUPS = [(32, 5), (64, 3), (128, 2), (128, 9), (250, 1), (4, 1), (32, 1)]
ZEROS = pytest.mark.parametrize("with_zeros", [False, True], ids=["symmetric", "zeros"])


def canonical(seed, n, size, groups, with_zeros, *before):
    """packed, scale and zeros (or None) of a random weight [*before, n, size * groups]."""
    g = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (*before, n, size * groups // 2), generator=g, dtype=torch.uint8)
    scale = torch.rand((*before, n, groups), generator=g) * 0.02 + 1e-3
    zeros = torch.randint(0, 16, (*before, n, groups), generator=g, dtype=torch.uint8)
    return packed, scale, zeros if with_zeros else None


def codes_of(packed):
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2).int()


def activations(seed, m, k):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (m, k), generator=g, dtype=torch.int8)
    return x, torch.rand(m, generator=g) * 0.02 + 1e-3


# ---- prepacking ----


@pytest.mark.parametrize("op", MOVES, ids=lambda op: op.name)
def test_moving_keeps_its_promise(isa, op):
    given(st.data())(lambda data: properties.assert_keeps_promise(op, data, f32))()


@ZEROS
def test_a_weight_comes_back_bit_for_bit(isa, with_zeros):
    for size, groups in GROUPS:
        for n, before in ((1, ()), (16, (2,)), (33, (3, 2)), (47, ())):
            weight = canonical(n, n, size, groups, with_zeros, *before)
            w = ops.w4a8_prepack(*weight)
            assert w.dtype == (torch.uint8 if with_zeros else torch.int8) and w.shape[:-1] == weight[1].shape
            back = ops.w4a8_unpack(w)
            assert all(got is None if want is None else same_bits(got, want) for got, want in zip(back, weight, strict=True))


def test_every_set_packs_alike():
    weight = canonical(0, 70, 64, 3, True)
    packed = []
    for name in _native.available_isas():
        with _native.using_cpu_isa(name):
            packed.append(ops.w4a8_prepack(*weight))
    assert all(same_bits(packed[0], p) for p in packed)


def test_a_weight_from_any_layout():
    packed, scale, zeros = canonical(0, 24, 32, 4, True, 2)
    want = ops.w4a8_prepack(packed, scale, zeros)
    across = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (packed, scale, zeros)]
    assert same_bits(ops.w4a8_prepack(*across), want)
    wide = torch.stack([want, want], 3)[:, :, :, 1]
    assert not wide.is_contiguous()
    assert all(same_bits(a, b) for a, b in zip(ops.w4a8_unpack(wide), (packed, scale, zeros), strict=True))
    x, x_scale = activations(1, 5, 128)
    assert same_bits(ops.w4a8_gemm(x, x_scale, wide[1]), ops.w4a8_gemm(x, x_scale, want[1]))
    twice = torch.stack([x, x], 2)[..., 0]
    assert same_bits(ops.w4a8_gemm(twice, x_scale.repeat_interleave(2)[::2], want[0]), ops.w4a8_gemm(x, x_scale, want[0]))
    spread = x[:1].expand(4, -1)
    assert same_bits(
        ops.w4a8_gemm(spread, x_scale[:1].expand(4), want[0]), ops.w4a8_gemm(x[:1], x_scale[:1], want[0]).repeat(4, 1)
    )


# ---- products ----


@DTYPES
@pytest.mark.parametrize("op", PRODUCTS, ids=lambda op: op.name)
class TestEveryProduct:
    def test_keeps_its_promise(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_keeps_promise(op, data, dtype))()

    def test_thread_count_does_not_matter(self, isa, op, dtype):
        settings(max_examples=8)(
            given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(op, data, dtype))
        )()


def exactly(x, x_scale, packed, scale, zeros):
    """The definition step by step. Sums of a group are exact integers; float64 holds the product with a scale exactly."""
    n, groups = scale.shape
    codes = codes_of(packed).view(n, groups, -1).long()
    codes = (codes ^ 8) - 8 if zeros is None else codes - zeros.long().unsqueeze(-1)
    sums = torch.einsum("mgk,ngk->mng", x.view(x.shape[0], groups, -1).long(), codes)
    total = torch.zeros(x.shape[0], n)
    for g in range(groups):
        total = (sums[..., g].float().double() * scale[:, g].double() + total.double()).float()
    return total * x_scale[:, None]


@ZEROS
@pytest.mark.parametrize("size, groups", GROUPS)
def test_a_product_has_the_bits_of_its_definition(isa, size, groups, with_zeros):
    """In every set, so all sets agree. (A fused multiply-add rounds once, float64 then float32 twice, the same but for one
    case in 2^29.)"""
    for m, n in ((1, 40), (3, 16), (9, 33), (30, 17), (70, 96)):
        weight = canonical(m, n, size, groups, with_zeros)
        x, x_scale = activations(m, m, size * groups)
        got = ops.w4a8_gemm(x, x_scale, ops.w4a8_prepack(*weight), out_dtype=f32)
        want = exactly(x, x_scale, *weight)
        assert same_bits(got, want), (m, n)
        assert same_bits(ops.w4a8_gemm(x, x_scale, ops.w4a8_prepack(*weight)), want.bfloat16())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("x_value", [-128, -127, 127])
@pytest.mark.parametrize("size, groups", [(32, 3), (128, 256), (32768, 1)])
def test_the_largest_sums_are_exact(isa, size, groups, x_value, symmetric):
    """All codes and activations at their ends: no 16-bit or 32-bit step on the way saturates or wraps."""
    k = size * groups
    for code, zero in ((8, 0), (7, 0)) if symmetric else ((0, 15), (15, 0), (15, 15)):
        packed = torch.full((17, k // 2), code * 17, dtype=torch.uint8)
        zeros = None if symmetric else torch.full((17, groups), zero, dtype=torch.uint8)
        w = ops.w4a8_prepack(packed, torch.ones(17, groups), zeros)
        value = (code - 16 if code > 7 else code) if symmetric else code - zero
        for m in (1, 20):
            got = ops.w4a8_gemm(torch.full((m, k), x_value, dtype=torch.int8), torch.ones(m), w, out_dtype=f32)
            assert same_bits(got, torch.full((m, 17), float(size * x_value * value)) * groups), (code, zero, m)


def test_each_code_at_each_place(isa):
    """A one in x picks out one k of every column: nibble order, signs and zero points show."""
    for with_zeros in (False, True):
        packed, _, zeros = canonical(3, 37, 32, 2, with_zeros)
        w = ops.w4a8_prepack(packed, torch.ones(37, 2), zeros)
        x = torch.eye(64, dtype=torch.int8)
        codes = codes_of(packed)
        values = codes - zeros.int().repeat_interleave(32, 1) if with_zeros else torch.where(codes > 7, codes - 16, codes)
        assert same_bits(ops.w4a8_gemm(x, torch.ones(64), w, out_dtype=f32), values.T.float().contiguous())
        one = torch.cat([ops.w4a8_gemm(x[i : i + 1], torch.ones(1), w, out_dtype=f32) for i in range(64)])
        assert same_bits(one, values.T.float().contiguous())


@ZEROS
@pytest.mark.parametrize("size, groups", [(128, 3), (32, 5), (250, 1)])
def test_a_row_depends_on_itself_alone(isa, size, groups, with_zeros):
    weight = canonical(0, 75, size, groups, with_zeros)
    w = ops.w4a8_prepack(*weight)
    x, x_scale = activations(1, 150, size * groups)
    whole = ops.w4a8_gemm(x, x_scale, w)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    assert same_bits(whole[order], ops.w4a8_gemm(x[order], x_scale[order], w))
    for rows in range(1, 50):  # every number of rows that a tile can hold, at changing starts
        part = slice(2 * rows, 3 * rows)
        assert same_bits(whole[part], ops.w4a8_gemm(x[part], x_scale[part], w)), rows
    for n in (1, 2, 15, 16, 17, 31, 33, 74):  # and a column depends on its own weights alone
        less = ops.w4a8_prepack(*(t if t is None else t[:n] for t in weight))
        for rows in (1, 5, 40):
            assert same_bits(whole[:rows, :n], ops.w4a8_gemm(x[:rows], x_scale[:rows], less)), (n, rows)
    with properties.threads(2):
        assert same_bits(whole, ops.w4a8_gemm(x, x_scale, w))


def test_many_tasks_leave_no_trace(isa):
    """Rows and columns enough to be cut both ways."""
    w = ops.w4a8_prepack(*canonical(0, 330, 128, 4, True))
    x, x_scale = activations(1, 600, 512)
    whole = ops.w4a8_gemm(x, x_scale, w, out_dtype=f32)
    for row in (0, 11, 12, 255, 256, 287, 599):
        assert same_bits(whole[row : row + 1], ops.w4a8_gemm(x[row : row + 1], x_scale[row : row + 1], w, out_dtype=f32))
    assert relative_error(whole, reference.w4a8_gemm(x, x_scale.double(), w)) < 1e-6
    with properties.threads(2):
        assert same_bits(whole, ops.w4a8_gemm(x, x_scale, w, out_dtype=f32))


@ZEROS
def test_a_group_has_the_bits_of_its_own_product(isa, with_zeros):
    sizes = [1, 0, 3, 8, 9, 40, 17, 0]
    w = ops.w4a8_prepack(*canonical(0, 50, 32, 6, with_zeros, len(sizes)))
    ends = torch.tensor(sizes).cumsum(0).int()
    x, x_scale = activations(1, int(ends[-1]) + 4, 192)
    got = ops.w4a8_grouped_gemm(x, x_scale, w, ends)
    start = 0
    for e, end in enumerate(ends.tolist()):
        assert same_bits(got[start:end], ops.w4a8_gemm(x[start:end], x_scale[start:end], w[e])), e
        start = end
    assert same_bits(got[start:], torch.zeros(4, 50, dtype=bf16))


def test_every_tile_runs(isa):
    """Each number of rows to a tile, with and without zero points, weights split in registers and in memory."""
    seen = set()
    for with_zeros in (False, True):
        weight = canonical(0, 40, 128, 5, with_zeros)
        w = ops.w4a8_prepack(*weight)
        for m in (*range(1, 14), 33, 50):
            x, x_scale = activations(m, m, 640)
            with _native.counted_paths() as counts:
                got = ops.w4a8_gemm(x, x_scale, w, out_dtype=f32)
            assert same_bits(got, exactly(x, x_scale, *weight)), m
            seen |= counts.keys()
    wanted = {"w4a8 nibbles"}
    wanted |= {"w4a8 bytes"} if isa == "avx512" else {"w4a8 amx 1", "w4a8 amx 2"} if isa == "amx" else set()
    assert seen == wanted


def test_sizes_of_nothing(isa):
    w = ops.w4a8_prepack(*canonical(0, 5, 32, 2, False))
    x, x_scale = activations(0, 3, 64)
    assert ops.w4a8_gemm(x[:0], x_scale[:0], w).shape == (0, 5)
    none = ops.w4a8_prepack(*canonical(0, 0, 32, 2, True))
    assert none.shape[:2] == (0, 2) and ops.w4a8_gemm(x, x_scale, none).shape == (3, 0)
    for groups in (0, 1):  # k = 0
        empty = ops.w4a8_prepack(torch.zeros(5, 0, dtype=torch.uint8), torch.ones(5, groups))
        assert same_bits(ops.w4a8_gemm(x[:, :0], x_scale, empty), torch.zeros(3, 5, dtype=bf16))
    experts = ops.w4a8_prepack(*canonical(0, 5, 32, 2, False, 0))
    got = ops.w4a8_grouped_gemm(x, x_scale, experts, torch.zeros(0, dtype=torch.int32), out_dtype=f32)
    assert same_bits(got, torch.zeros(3, 5))


def test_values_that_poison_stay_where_they_are(isa):
    packed, scale, _ = canonical(0, 20, 32, 3, False)
    x, x_scale = activations(1, 15, 96)
    clean = ops.w4a8_gemm(x, x_scale, ops.w4a8_prepack(packed, scale))
    scale[4, 2], x_scale[3], x_scale[7] = float("nan"), float("nan"), float("inf")
    got = ops.w4a8_gemm(x, x_scale, ops.w4a8_prepack(packed, scale))
    assert got[3].isnan().all() and not got[7].isfinite().any() and got[:, 4].isnan().all()
    rows, columns = [r for r in range(15) if r not in (3, 7)], [c for c in range(20) if c != 4]
    assert same_bits(got[rows][:, columns], clean[rows][:, columns])


# ---- torch's side ----


def example(name, m):
    x, x_scale = activations(0, m, 96)
    if name == "w4a8_gemm":
        return {"x": x, "x_scale": x_scale, "w": ops.w4a8_prepack(*canonical(0, 9, 32, 3, False)), "out_dtype": bf16}
    ends = torch.tensor([3, 6], dtype=torch.int32)
    w = ops.w4a8_prepack(*canonical(0, 9, 32, 3, True, 2))
    return {"x": x, "x_scale": x_scale, "w": w, "group_ends": ends, "out_dtype": f32}


@pytest.mark.parametrize("op", PRODUCTS, ids=lambda op: op.name)
def test_opcheck_compile_export(op):
    arguments, other = example(op.name, 7), example(op.name, 11)
    properties.assert_opcheck(op, tuple(arguments.values()))
    properties.assert_compiles(op, arguments, other)
    tokens = torch.export.Dim("tokens")
    properties.assert_exports(op, arguments, {"x": {0: tokens}, "x_scale": {0: tokens}})


@ZEROS
def test_moves_under_opcheck_compile_export(with_zeros):
    def arguments(n):
        packed, scale, zeros = canonical(0, n, 32, 3, with_zeros)
        return {"packed": packed, "scale": scale} | ({"zeros": zeros} if with_zeros else {})

    prepack, unpack = MOVES
    properties.assert_opcheck(prepack, tuple(arguments(9).values()))
    properties.assert_compiles(prepack, arguments(9), arguments(33))
    w = ops.w4a8_prepack(**arguments(9))
    properties.assert_opcheck(unpack, (w,))
    with torch.no_grad():
        exported = torch.export.export(_Unpack(), (w,)).module()
        assert all(same_bits(a, b) for a, b in zip(exported(w), ops.w4a8_unpack(w), strict=True) if b is not None)


class _Unpack(torch.nn.Module):
    def forward(self, w):
        return ops.w4a8_unpack(w)


def u8(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


def i8(*shape):
    return torch.zeros(shape, dtype=torch.int8)


def ends(*values):
    return torch.tensor(values, dtype=torch.int32)


W = ops.w4a8_prepack(u8(5, 32), torch.ones(5, 2))
WE = ops.w4a8_prepack(u8(2, 5, 32), torch.ones(2, 5, 2))
ONE = torch.ones(1)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ops.w4a8_prepack(u8(5, 32), torch.ones(5, 3)), ValueError, "scale has shape .* 32, 64 or 128 of the 64 k"),
        (lambda: ops.w4a8_prepack(u8(5, 32), torch.ones(5, 4)), ValueError, "scale has shape .* 32, 64 or 128"),
        (lambda: ops.w4a8_prepack(u8(5, 32), torch.ones(4, 2)), ValueError, "scale has shape .* want size 5"),
        (lambda: ops.w4a8_prepack(u8(5, 32), torch.ones(2)), ValueError, "scale has shape .* want 2 dimensions"),
        (lambda: ops.w4a8_prepack(u8(5, 32), torch.ones(5, 0)), ValueError, "scale has shape"),
        (lambda: ops.w4a8_prepack(u8(32), torch.ones(1)), ValueError, "packed has shape .* at least 2 dimensions"),
        (lambda: ops.w4a8_prepack(i8(5, 32), torch.ones(5, 2)), ValueError, "packed has dtype Char, want Byte"),
        (lambda: ops.w4a8_prepack(u8(5, 32), torch.ones(5, 2).bfloat16()), ValueError, "scale has dtype"),
        (lambda: ops.w4a8_prepack(u8(5, 32), torch.ones(5, 2), i8(5, 2)), ValueError, "zeros has dtype"),
        (lambda: ops.w4a8_prepack(u8(5, 32), torch.ones(5, 2), u8(5, 1)), ValueError, "zeros has shape"),
        (
            lambda: ops.w4a8_prepack(u8(5, 32), torch.ones(5, 2), u8(5, 2) + 16),
            ValueError,
            "zeros holds 16, want zero points",
        ),
        (lambda: ops.w4a8_prepack(u8(1, 2**17 + 1), torch.ones(1, 1)), ValueError, "packed has shape .* at most 262144 k"),
        (lambda: ops.w4a8_prepack(u8(5, 32), [1.0]), TypeError, "scale is list"),
        (lambda: ops.w4a8_unpack(W.int()), ValueError, "w has dtype Int, want Char or Byte"),
        (lambda: ops.w4a8_unpack(W[0]), ValueError, "w has shape .* at least 3 dimensions"),
        (lambda: ops.w4a8_unpack(W[..., :3]), ValueError, "w has shape .* from w4a8_prepack"),
        (lambda: ops.w4a8_unpack(W[..., :-4]), ValueError, "w has shape .* from w4a8_prepack"),
        (lambda: ops.w4a8_unpack(i8(5, 0, 8)), ValueError, "w has shape .* from w4a8_prepack"),
        (lambda: ops.w4a8_gemm(i8(1, 62), ONE, W), ValueError, "x has shape .* want size 64 in dimension 1"),
        (lambda: ops.w4a8_gemm(i8(64), ONE, W), ValueError, "x has shape .* want 2 dimensions"),
        (lambda: ops.w4a8_gemm(u8(1, 64), ONE, W), ValueError, "x has dtype Byte, want Char"),
        (lambda: ops.w4a8_gemm(i8(1, 64), torch.ones(2), W), ValueError, "x_scale has shape .* want size 1"),
        (lambda: ops.w4a8_gemm(i8(1, 64), ONE.double(), W), ValueError, "x_scale has dtype"),
        (lambda: ops.w4a8_gemm(i8(1, 64), ONE, WE), ValueError, "w has shape .* want 3 dimensions"),
        (lambda: ops.w4a8_gemm(i8(1, 64), ONE, W, torch.float64), ValueError, "out_dtype is Double, want BFloat16 or Float"),
        (lambda: ops.w4a8_gemm(i8(1, 64), None, W), TypeError, "x_scale is NoneType"),
        (lambda: ops.w4a8_grouped_gemm(i8(1, 64), ONE, W, ends(1)), ValueError, "w has shape .* want 4 dimensions"),
        (lambda: ops.w4a8_grouped_gemm(i8(1, 64), ONE, WE, ends(1)), ValueError, "group_ends has shape .* want size 2"),
        (
            lambda: ops.w4a8_grouped_gemm(i8(1, 64), ONE, WE, ends(1, 2)),
            ValueError,
            r"group_ends\[1\] is 2, want .* \[1, 1\]",
        ),
        (lambda: ops.w4a8_grouped_gemm(i8(1, 64), ONE, WE, ends(1, 0)), ValueError, r"group_ends\[1\] is 0"),
        (lambda: ops.w4a8_grouped_gemm(i8(1, 64), ONE, WE, ends(1, 1).long()), ValueError, "group_ends has dtype Long"),
    ],
)
def test_bad_input_is_refused(call, error, words):
    properties.assert_refused(error, words, call)
