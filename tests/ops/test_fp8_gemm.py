"""fp8_gemm and fp8_grouped_gemm: against float64, row by row, on every instruction set, through every microkernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5 import _native, ops, reference
from glm5.testing import RandomDraw, relative_error, spec
from tests.ops import properties
from tests.ops.properties import same_bits

OPS = [spec("fp8_gemm"), spec("fp8_grouped_gemm")]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
f32, e4m3 = torch.float32, torch.float8_e4m3fn


def matrix(seed, rows, inner, *, lines=1):
    """Codes [rows, inner] and their scales, one for ``lines`` rows and 128 columns."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(rows, inner, generator=generator).mul(8).to(e4m3)
    return codes, torch.rand(-(-rows // lines), -(-inner // 128), generator=generator) + 0.1


def operands(rows, columns, inner):
    return *matrix(rows + inner, rows, inner), *matrix(columns + 1, columns, inner, lines=128)


def exact(a, a_scale, b, b_scale):
    return reference.fp8_gemm(a, a_scale.double(), b, b_scale)


@DTYPES
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
class TestEveryProduct:
    def test_keeps_its_promise(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_keeps_promise(op, data, dtype))()

    def test_thread_count_does_not_matter(self, isa, op, dtype):
        settings(max_examples=8)(
            given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(op, data, dtype))
        )()


@pytest.mark.parametrize("inner", [1, 64, 127, 128, 300, 1100])
def test_a_row_depends_on_itself_alone(isa, inner):
    a, a_scale, b, b_scale = operands(300, 200, inner)
    whole = ops.fp8_gemm(a, a_scale, b, b_scale, f32)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert same_bits(whole[order], ops.fp8_gemm(a[order], a_scale[order], b, b_scale, f32))
    for rows in (*range(1, 19), 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 129):  # every tile, at changing starts
        some = slice(2 * rows, 3 * rows)
        assert same_bits(whole[some], ops.fp8_gemm(a[some], a_scale[some], b, b_scale, f32)), rows
    with properties.threads(2):
        assert same_bits(whole, ops.fp8_gemm(a, a_scale, b, b_scale, f32))


def test_a_column_depends_on_its_row_of_b_alone(isa):
    a, a_scale, b, b_scale = operands(40, 300, 400)
    whole = ops.fp8_gemm(a, a_scale, b, b_scale, f32)
    for rows in (1, 3, 40):
        for columns in (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 299):
            scale = b_scale[: -(-columns // 128)]
            assert same_bits(whole[:rows, :columns], ops.fp8_gemm(a[:rows], a_scale[:rows], b[:columns], scale, f32)), (
                columns
            )
    # A column in another place, under the same scale.
    assert same_bits(whole[:, 128 + 77 : 256], ops.fp8_gemm(a, a_scale, b[128 + 77 : 256], b_scale[1:2], f32))


def test_more_rows_than_are_packed_together(isa):
    a, a_scale, b, b_scale = operands(2100, 70, 200)
    whole = ops.fp8_gemm(a, a_scale, b, b_scale, f32)
    assert relative_error(whole, exact(a, a_scale, b, b_scale)) < 1e-6
    for row in (0, 699, 700, 704, 1023, 1024, 1407, 1408, 2099):
        some = slice(row, row + 1)
        assert same_bits(whole[some], ops.fp8_gemm(a[some], a_scale[some], b, b_scale, f32)), row


def test_groups_have_the_bits_of_single_products(isa):
    """Groups of 0 to 70 rows, rows past the last group: the model may use either op."""
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 0, 2, 7, 16, 17, 70, 0, 33, 3]
    ends = torch.tensor(sizes).cumsum(0).int()
    rows, inner, columns = sum(sizes) + 4, 300, 200
    a, a_scale = matrix(1, rows, inner)
    b = torch.randn(len(sizes), columns, inner, generator=generator).mul(8).to(e4m3)
    b_scale = torch.rand(len(sizes), 2, 3, generator=generator) + 0.1
    for threads in (1, 2):
        with properties.threads(threads):
            y = ops.fp8_grouped_gemm(a, a_scale, b, b_scale, ends)
        for e, (end, size) in enumerate(zip(ends.tolist(), sizes, strict=True)):
            some = slice(end - size, end)
            assert same_bits(y[some], ops.fp8_gemm(a[some], a_scale[some], b[e], b_scale[e])), e
        assert same_bits(y[-4:], torch.zeros(4, columns, dtype=torch.bfloat16))


@pytest.mark.parametrize("beside", [0.0, 1.0])
def test_every_code_is_read_exactly(isa, beside):
    """One code at a time among zeros or ones: the products are the codes, NaN where one is NaN, the others as they were."""
    codes = torch.arange(256, dtype=torch.uint8).view(e4m3)
    one = torch.zeros(256, 256).fill_diagonal_(1)
    ones, blocks = torch.ones(256, 2), torch.ones(2, 2)
    want = torch.full((256, 256), beside)
    want.diagonal().copy_(codes.float().nan_to_num())
    values = want.to(e4m3)
    for a, b, c in ((values, one.to(e4m3), want), (one.to(e4m3), values, want.T)):
        for rows in (1, 16, 256):
            assert torch.equal(ops.fp8_gemm(a[-rows:], ones[-rows:], b, blocks, f32), c[-rows:])
    for code in (0x7F, 0xFF):
        bad = values.clone()
        bad.view(torch.uint8)[70, 3] = code
        row = ops.fp8_gemm(bad, ones, one.to(e4m3), blocks, f32)
        column = ops.fp8_gemm(one.to(e4m3), ones, bad, blocks, f32)
        for got in (row, column.T):
            assert got[70].isnan().all()
            rest = [r for r in range(256) if r != 70]
            assert torch.equal(got[rest], (want if got is row else want.T)[rest])


def test_scales_that_poison_stay_in_their_row(isa):
    a, a_scale, b, b_scale = operands(20, 200, 300)
    clean = ops.fp8_gemm(a, a_scale, b, b_scale)
    a_scale[3, 2], a_scale[7, 0] = float("nan"), float("inf")
    got = ops.fp8_gemm(a, a_scale, b, b_scale)
    assert got[3].isnan().all() and not got[7].isfinite().any()
    rest = [r for r in range(20) if r not in (3, 7)]
    assert same_bits(got[rest], clean[rest])
    b_scale[1, 1] = float("nan")
    got = ops.fp8_gemm(a, a_scale, b, b_scale)
    assert got[:, 128:].isnan().all() and same_bits(got[rest, :128], clean[rest, :128])


def test_the_scale_is_the_rounded_product_of_two(isa):
    """One block of one product: nothing but the scales rounds. Their product may leave float32's range, as float32 does."""
    one = torch.zeros(1, 128)
    one[0, 5] = 1
    code = one.to(e4m3)
    for x, y in ((1 / 3, 1 / 7), (3e38, 1e3), (1e-30, 1e-30), (1e-20, 1e-20), (-2.5, 0.1), (0.0, -1.0)):
        a_scale, b_scale = torch.tensor([[x]]), torch.tensor([[y]])
        got = ops.fp8_gemm(code, a_scale, code, b_scale, f32)
        assert torch.equal(got, a_scale * b_scale), (x, y)


def test_bf16_output_is_the_float32_one_rounded(isa):
    a, a_scale, b, b_scale = operands(70, 200, 500)
    wide = ops.fp8_gemm(a, a_scale, b, b_scale, f32)
    assert same_bits(wide.bfloat16(), ops.fp8_gemm(a, a_scale, b, b_scale))
    assert same_bits(wide[:3].bfloat16(), ops.fp8_gemm(a[:3], a_scale[:3], b, b_scale))


def test_is_close_to_the_product_before_quantisation(isa):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(50, 700, generator=generator), torch.randn(260, 700, generator=generator)
    y = ops.fp8_gemm(*ops.quantize_fp8(x), *ops.quantize_fp8(w, (128, 128)), f32)
    assert relative_error(y, x.double() @ w.double().T) < 0.05


def test_views_are_read_where_they_are(isa):
    wide_a, wide_b = matrix(0, 40, 700)[0], matrix(1, 300, 700)[0]
    a_scale, b_scale = matrix(2, 20, 300)[1], matrix(3, 130, 300, lines=128)[1]
    a, b = wide_a[::2, 33:333], wide_b[5:135, 7:307]
    want = ops.fp8_gemm(a.contiguous(), a_scale, b.contiguous(), b_scale)
    assert same_bits(ops.fp8_gemm(a, a_scale, b, b_scale), want)
    scales = (a_scale.T.contiguous().T, b_scale[:, :1].expand(-1, 3))
    assert same_bits(ops.fp8_gemm(a, scales[0], b, scales[1]), ops.fp8_gemm(a, a_scale, b, scales[1].contiguous()))
    across = wide_b.T[:300, :130].contiguous().T  # [130, 300], columns contiguous
    assert same_bits(ops.fp8_gemm(a, a_scale, across, b_scale), ops.fp8_gemm(a, a_scale, across.contiguous(), b_scale))
    one_row = wide_a[:1, 33:333].expand(20, 300)
    assert same_bits(ops.fp8_gemm(one_row, a_scale, b, b_scale), ops.fp8_gemm(one_row.contiguous(), a_scale, b, b_scale))
    three = wide_b[:260, :300].unflatten(0, (2, 130))
    ends = torch.tensor([4, 20], dtype=torch.int32)
    args = (matrix(4, 260, 300, lines=128)[1][:2].expand(2, 2, 3), ends)
    assert same_bits(
        ops.fp8_grouped_gemm(a, a_scale, three, *args), ops.fp8_grouped_gemm(a, a_scale, three.contiguous(), *args)
    )


@pytest.mark.parametrize("m, n, k", [(0, 5, 130), (5, 0, 130), (5, 70, 0), (0, 0, 0), (1, 1, 1)])
def test_empty_sizes(isa, m, n, k):
    a, a_scale, b, b_scale = operands(m, n, k)
    y = ops.fp8_gemm(a, a_scale, b, b_scale)
    assert y.shape == (m, n)
    assert k > 0 or same_bits(y, torch.zeros(m, n, dtype=torch.bfloat16))
    none = ops.fp8_grouped_gemm(a, a_scale, b[None][:0], b_scale[None][:0], torch.tensor([], dtype=torch.int32), f32)
    assert same_bits(none, torch.zeros(m, n))


def test_every_microkernel_runs(isa):
    """Every register tile of this instruction set gives the bits of its rows alone."""
    if isa == "amx":
        shapes = [(m, n) for m in (1, 2, 15, 16, 17, 32, 33, 48, 64, 65, 80, 130) for n in (16, 64, 100)]
        wanted = {"fp8_gemm amx 2x2", "fp8_gemm amx 2x1", "fp8_gemm amx few", "fp8_gemm amx few narrow"}
    else:
        rows = {"portable": 4, "avx2": 6, "avx512": 12}[isa]
        shapes = [(m, n) for m in range(1, rows + 2) for n in (3, 16, 32, 70)]
        wanted = {f"fp8_gemm {m}x{panels}" for m in range(1, rows + 1) for panels in (1, 2)}
    seen = {}
    for m, n in shapes:
        a, a_scale, b, b_scale = operands(m, n, 300)
        with _native.counted_paths() as counts:
            got = ops.fp8_gemm(a, a_scale, b, b_scale, f32)
        seen.update(counts)
        assert relative_error(got, exact(a, a_scale, b, b_scale)) < 1e-6
        for row in {0, m // 2, m - 1}:
            some = slice(row, row + 1)
            assert same_bits(got[some], ops.fp8_gemm(a[some], a_scale[some], b, b_scale, f32)), (m, n, row)
    assert wanted <= seen.keys(), wanted - seen.keys()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_compiler(op):
    cases = (op.draw(RandomDraw(seed), f32) for seed in range(1000))
    arguments = next(c for c in cases if c["a"].shape[0] > 2 and min(c["b"].shape) > 2)
    more = {k: torch.cat([arguments[k], arguments[k][:2]]) for k in ("a", "a_scale")}
    # opcheck's schema test compares inputs by arithmetic that torch has not for e4m3.
    rest = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.glm5, op.name).default, tuple(arguments.values()), test_utils=rest)
    properties.assert_compiles(op, arguments, {**arguments, **more})
    tokens = torch.export.Dim("tokens")
    properties.assert_exports(op, arguments, {"a": {0: tokens}, "a_scale": {0: tokens}})


def refused(**other):
    a, a_scale, b, b_scale = operands(5, 140, 300)
    arguments = {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale, **other}
    return (ops.fp8_grouped_gemm if "group_ends" in other else ops.fp8_gemm)(**arguments)


grouped = {"b": torch.zeros(2, 140, 300).to(e4m3), "b_scale": torch.zeros(2, 2, 3)}


@pytest.mark.parametrize(
    "other, error, words",
    [
        ({"a": torch.zeros(5, 300)}, ValueError, "fp8_gemm: a has dtype Float, want Float8_e4m3fn"),
        ({"a": torch.zeros(300).to(e4m3)}, ValueError, "a has shape .300., want 2 dimensions"),
        ({"a_scale": torch.ones(5, 2)}, ValueError, "a_scale has shape .5, 2., want size 3"),
        ({"a_scale": torch.ones(4, 3)}, ValueError, "a_scale has shape .4, 3., want size 5"),
        ({"a_scale": torch.ones(5, 3).double()}, ValueError, "a_scale has dtype Double, want Float"),
        ({"b": torch.zeros(140, 299).to(e4m3)}, ValueError, "b has shape .140, 299., want size 300"),
        ({"b": torch.zeros(140, 300).to(torch.float8_e5m2)}, ValueError, "b has dtype Float8_e5m2, want"),
        ({"b_scale": torch.ones(1, 3)}, ValueError, "b_scale has shape .1, 3., want size 2"),
        ({"b_scale": torch.ones(2, 4)}, ValueError, "b_scale has shape .2, 4., want size 3"),
        ({"out_dtype": torch.float16}, ValueError, "out_dtype is Half, want BFloat16 or Float"),
        ({"b": [1.0]}, TypeError, "b is list, want torch.Tensor"),
        ({"group_ends": torch.tensor([1, 5], dtype=torch.int32)}, ValueError, "fp8_grouped_gemm: b has shape .*want 3"),
        ({**grouped, "group_ends": torch.tensor([5, 1], dtype=torch.int32)}, ValueError, r"group_ends\[1\] is 1"),
        ({**grouped, "group_ends": torch.tensor([1, 6], dtype=torch.int32)}, ValueError, r"group_ends\[1\] is 6"),
        ({**grouped, "group_ends": torch.tensor([5], dtype=torch.int32)}, ValueError, "group_ends has shape"),
        ({**grouped, "group_ends": torch.tensor([1, 5])}, ValueError, "group_ends has dtype Long"),
        (
            {**grouped, "b_scale": torch.zeros(3, 2, 3), "group_ends": torch.tensor([1, 5], dtype=torch.int32)},
            ValueError,
            "b_scale has shape .3, 2, 3., want size 2",
        ),
    ],
)
def test_bad_input(other, error, words):
    properties.assert_refused(error, words, refused, **other)
