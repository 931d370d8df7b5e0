"""The matrix products: against float64, row by row, on every instruction set, through every microkernel."""

import pytest
import torch
import torch.fx.experimental.proxy_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5 import _native, ops, reference
from glm5.testing import RandomDraw, relative_error, spec
from tests.ops import properties
from tests.ops.properties import same_bits

OPS = [spec("linear"), spec("batched_linear"), spec("grouped_linear")]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])


def gaussian(seed, *shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@DTYPES
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
class TestEveryProduct:
    def test_keeps_its_promise(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_keeps_promise(op, data, dtype))()

    def test_thread_count_does_not_matter(self, isa, op, dtype):
        settings(max_examples=8)(
            given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(op, data, dtype))
        )()


@DTYPES
@pytest.mark.parametrize("inner", [1, 31, 64, 513, 1100])
def test_a_row_depends_on_itself_alone(isa, dtype, inner):
    x, w, bias = gaussian(0, 300, inner, dtype=dtype), gaussian(1, 75, inner, dtype=dtype), gaussian(2, 75, dtype=dtype)
    whole = ops.linear(x, w, bias)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert same_bits(whole[order], ops.linear(x[order], w, bias))
    for rows in range(1, 40):  # every number of rows a microkernel can hold, at changing starts
        start = 5 * rows
        assert same_bits(whole[start : start + rows], ops.linear(x[start : start + rows], w, bias)), rows
    for out in (1, 2, 15, 16, 17, 31, 33, 74):  # and a column depends on its row of w alone
        assert same_bits(whole[:40, :out], ops.linear(x[:40], w[:out], bias[:out])), out
        assert same_bits(whole[:3, :out], ops.linear(x[:3], w[:out], bias[:out])), out
    with properties.threads(2):
        assert same_bits(whole, ops.linear(x, w, bias))


@DTYPES
def test_large_products_tile_without_a_trace(isa, dtype):
    """More rows and columns than a tile holds: still the bits of one row on its own."""
    x, w = gaussian(0, 530, 640, dtype=dtype), gaussian(1, 530, 640, dtype=dtype)
    whole = ops.linear(x, w)
    for row in (0, 119, 120, 239, 240, 529):
        assert same_bits(whole[row : row + 1], ops.linear(x[row : row + 1], w))
    assert relative_error(whole, reference.linear(x.double(), w.double())) < (3e-3 if dtype == torch.bfloat16 else 1e-6)


@DTYPES
def test_all_products_share_one_order(isa, dtype):
    """A head of batched_linear and a group of grouped_linear have the bits of linear: the model may use either."""
    x, w = gaussian(0, 37, 3, 600, dtype=dtype), gaussian(1, 3, 40, 600, dtype=dtype)
    batched = ops.batched_linear(x, w)
    for head in range(3):
        assert same_bits(batched[:, head], ops.linear(x[:, head], w[head]))
    rows = gaussian(2, 37, 600, dtype=dtype)
    grouped = ops.grouped_linear(rows, w, torch.tensor([5, 5, 30], dtype=torch.int32))
    assert same_bits(grouped[:5], ops.linear(rows[:5], w[0]))
    assert same_bits(grouped[5:30], ops.linear(rows[5:30], w[2]))
    assert same_bits(grouped[30:], torch.zeros(7, 40, dtype=dtype))
    # The gradient of x too: its rows are products with w transposed.
    dy = gaussian(3, 37, 40, dtype=dtype)
    dx = torch.ops.glm5.linear_dx(dy, w[0])
    assert same_bits(dx[7:9], torch.ops.glm5.linear_dx(dy[7:9], w[0]))
    assert same_bits(dx, ops.linear(dy, w[0].T.contiguous()))


def test_float32_output_of_bf16_input(isa):
    x, w = gaussian(0, 29, 700, dtype=torch.bfloat16), gaussian(1, 50, 700, dtype=torch.bfloat16)
    bias = gaussian(2, 50, dtype=torch.bfloat16)
    wide = ops.linear(x, w, bias, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert relative_error(wide, reference.linear(x.double(), w.double(), bias.double())) < 1e-6
    assert same_bits(wide.bfloat16(), ops.linear(x, w, bias)), "one rounding of the same sum"
    assert same_bits(wide[3:4], ops.linear(x[3:4], w, bias, out_dtype=torch.float32))
    x.requires_grad_()
    ops.linear(x, w, None, torch.float32).sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_long_sums_stay_accurate(isa):
    x, w = gaussian(0, 4, 100_003, dtype=torch.float32), gaussian(1, 5, 100_003, dtype=torch.float32)
    assert relative_error(ops.linear(x, w), reference.linear(x.double(), w.double())) < 1e-6
    dy, tall = gaussian(2, 100_003, 3, dtype=torch.float32), gaussian(3, 100_003, 4, dtype=torch.float32)
    assert relative_error(torch.ops.glm5.linear_dw(dy, tall), dy.double().T @ tall.double()) < 1e-6
    assert relative_error(torch.ops.glm5.linear_dbias(dy), dy.double().sum(0)) < 1e-6


@DTYPES
def test_values_that_poison_stay_in_their_row(isa, dtype):
    x, w = gaussian(0, 14, 101, dtype=dtype), gaussian(1, 35, 101, dtype=dtype)
    clean = ops.linear(x, w)
    x[3, 100], x[7, 0] = float("nan"), float("inf")
    got = ops.linear(x, w)
    assert got[3].isnan().all() and not got[7].isfinite().any()
    rest = [r for r in range(14) if r not in (3, 7)]
    assert same_bits(got[rest], clean[rest])
    w[34, 100] = float("inf")
    assert same_bits(ops.linear(x, w)[rest, :34], clean[rest, :34])


@DTYPES
def test_slices_of_wider_tensors(isa, dtype):
    wide_x, wide_w = gaussian(0, 20, 300, dtype=dtype), gaussian(1, 30, 400, dtype=dtype)
    x, w = wide_x[:, 7:160], wide_w[:, 11:164]
    assert same_bits(ops.linear(x, w), ops.linear(x.contiguous(), w.contiguous()))
    assert same_bits(
        ops.linear(wide_x[::2, ::2], wide_w[:, 0:150]), ops.linear(wide_x[::2, ::2].clone(), wide_w[:, :150].clone())
    )
    assert same_bits(
        ops.linear(wide_x.T[:20], wide_w[:, :20]), ops.linear(wide_x.T[:20].contiguous(), wide_w[:, :20].contiguous())
    )
    heads = wide_x.view(20, 3, 100)[:, :, 5:71]
    w3 = gaussian(2, 3, 9, 80, dtype=dtype)[:, :, 3:69]
    assert same_bits(ops.batched_linear(heads, w3), ops.batched_linear(heads.contiguous(), w3.contiguous()))


def test_every_microkernel_runs(isa):
    """Every register tile of this instruction set, few rows too, sums resumed and joined over parts and blocks of k."""
    rows, few = {"portable": (4, 4), "avx2": (6, 4)}.get(isa, (12, 8))
    seen = {}
    for m in range(1, rows + 1):
        # 80 columns are whole vectors of lines in every set, 83 are not.
        x, w = gaussian(m, m, 70, dtype=torch.float32), gaussian(99, 83, 70, dtype=torch.float32)
        columns = w.T.contiguous()
        want = reference.linear(x.double(), w.double())
        with _native.counted_paths() as counts:
            for n in (3, 80, 83):
                got = ops.linear(x, w[:n])
                assert relative_error(got, want[:, :n]) < 1e-6
                # B in rows of columns, and A across memory, which only the tiles take: the same bits.
                assert same_bits(got, torch.ops.glm5.linear_dx(x, columns[:, :n]))
                assert same_bits(got, torch.ops.glm5.linear_dw(x.T.contiguous(), columns[:, :n]))
        seen.update(counts)
    with _native.counted_paths() as counts:
        ops.linear(gaussian(0, 13, 5, dtype=torch.float32), gaussian(1, 3, 5, dtype=torch.float32))
        ops.linear(gaussian(0, 1, 64, dtype=torch.float32), gaussian(1, 3, 64, dtype=torch.float32))
        x, w = gaussian(0, 40, 1100, dtype=torch.float32), gaussian(1, 70, 1100, dtype=torch.float32)
        whole = ops.linear(x, w)
        assert relative_error(whole, reference.linear(x.double(), w.double())) < 1e-6
        assert same_bits(whole[7:8], ops.linear(x[7:8], w))
        assert same_bits(whole[:, 66:], ops.linear(x, w[66:]))
    seen.update(counts)
    # A tile of one row is left to products that accumulate.
    wanted = {f"gemm {m}x{n}" for m in range(2, rows + 1) for n in (1, 2)} | {f"gemm lines {m}" for m in range(1, few + 1)}
    wanted |= {"gemm block in parts", "gemm joins block", "gemm joins last block"}
    wanted |= {"gemm lines direct A", "gemm lines packed A", "gemm across: vectors", "gemm across: one vector"}
    assert wanted <= seen.keys(), wanted - seen.keys()


@DTYPES
def test_few_rows_have_the_bits_of_many(isa, dtype):
    """Lines of B multiplied as they come from memory, in several tasks, and the packed product: one order of summation."""
    for inner in (32, 512, 1056, 2085):
        x, w = gaussian(inner, 40, inner, dtype=dtype), gaussian(1, 700, inner, dtype=dtype)
        whole = ops.linear(x, w)
        for rows in range(1, 10):
            assert same_bits(whole[3 : 3 + rows], ops.linear(x[3 : 3 + rows], w)), (inner, rows)
        strided = gaussian(2, inner, 40, dtype=dtype).T  # rows across memory
        assert same_bits(ops.linear(strided[:3], w), ops.linear(strided.contiguous(), w)[:3])


@DTYPES
def test_weights_are_read_where_they_are(isa, dtype):
    """Parts of a wider tensor, and their transposes (W_UV and W_UK of the absorbed form): the bits of copies, no copies."""
    for inner, out in ((40, 24), (515, 300), (1100, 70)):
        up = gaussian(inner, 3, inner + 8, out, dtype=dtype)
        w_uk, w_uv = up[:, :inner].transpose(1, 2), up[:, 5:]
        for w in (w_uk, w_uv):
            copy, x = w.contiguous(), gaussian(1, 20, 3, w.shape[2], dtype=dtype)
            whole = ops.batched_linear(x, copy)
            for rows in (*range(1, 10), 16, 17, 20):
                assert same_bits(ops.batched_linear(x[:rows], w), whole[:rows]), (inner, out, rows)
                wide = gaussian(2, rows, 3, w.shape[2] + 3, dtype=dtype)[..., 1:-2]
                assert same_bits(ops.batched_linear(wide, w), ops.batched_linear(wide.contiguous(), copy))
            dy = gaussian(3, 20, 3, w.shape[1], dtype=dtype)
            for rows in (1, 3, 20):
                gradients = [
                    torch.autograd.grad(ops.batched_linear(x0 := x[:rows].clone().requires_grad_(), w0), (x0, w0), dy[:rows])
                    for w0 in (w.detach().requires_grad_(), copy.clone().requires_grad_())
                ]
                assert all(same_bits(got, want) for got, want in zip(*gradients, strict=True))
    x, w = gaussian(0, 2, 600, dtype=dtype), gaussian(1, 600, 90, dtype=dtype).T
    assert same_bits(ops.linear(x, w), ops.linear(x, w.contiguous()))


@pytest.mark.skipif("amx" not in _native.available_isas(), reason="this processor has no AMX")
def test_every_tile_path_runs():
    """Every AMX register tile, either operand packed, tiles read in place and through scratch, sums resumed from memory."""
    seen = {}
    shapes = [
        (1, 300, 1024), (5, 40, 1100), (16, 33, 70), (20, 40, 64), (33, 48, 70), (40, 5, 1100), (40, 20, 64),
        (100, 100, 2000), (600, 530, 1400), (70, 110, 2600), (330, 530, 5200), (16, 16, 0),
    ]  # fmt: skip
    with _native.using_cpu_isa("amx"):
        for m, n, k in shapes:
            x, w = gaussian(m, m, k, dtype=torch.bfloat16), gaussian(n, n, k, dtype=torch.bfloat16)
            with _native.counted_paths() as counts:
                whole = ops.linear(x, w, out_dtype=torch.float32)
            seen.update(counts)
            assert relative_error(whole, reference.linear(x.double(), w.double())) < 1e-6
            for row in {0, 4, m // 2, m - 1}:
                alone = ops.linear(x[row : row + 1], w, out_dtype=torch.float32)
                assert same_bits(whole[row : row + 1], alone), (m, n, k, row)
            for col in {0, n // 2, n - 1}:
                alone = ops.linear(x, w[col : col + 1], out_dtype=torch.float32)
                assert same_bits(whole[:, col : col + 1], alone), (m, n, k, col)
    wanted = {f"gemm amx {a}x{b}" for a in (1, 2) for b in (1, 2)}
    wanted |= {"gemm amx streams in place", "gemm amx streams through scratch", "gemm amx resumes"}
    wanted |= {"gemm amx one row in place", "gemm amx few rows"}
    wanted |= {"gemm amx packed lines near", "gemm amx packed lines from afar"}
    wanted |= {"gemm amx finishes rows beside", "gemm amx finishes columns beside"}
    assert wanted <= seen.keys(), wanted - seen.keys()


@pytest.mark.skipif("amx" not in _native.available_isas(), reason="this processor has no AMX")
@pytest.mark.parametrize("m, n, k", [(200, 96, 64), (130, 32, 512), (34, 32, 32), (700, 512, 256), (2300, 2112, 32)])
def test_short_rows_against_whole_tiles(m, n, k):
    """Blocks that are rounded and stored while the next is multiplied: the sums of the other paths, rounded once."""
    x, w = gaussian(m, m, k, dtype=torch.bfloat16), gaussian(n, n, k, dtype=torch.bfloat16)
    with _native.using_cpu_isa("amx"):
        with _native.counted_paths() as counts:
            whole = ops.linear(x, w)
        assert "gemm amx blocks across" in counts
        assert same_bits(whole, ops.linear(x, w, out_dtype=torch.float32).bfloat16())
        for rows in (1, 31, 33):
            assert same_bits(whole[:rows], ops.linear(x[:rows], w)), rows
        assert same_bits(torch.ops.glm5.linear_dx(x, w.T.contiguous()), whole)


@pytest.mark.parametrize(
    "rows, out, inner", [(700, 300, 290), (1100, 128, 96), (2700, 150, 70), (70, 2700, 150), (33, 65, 600)]
)
def test_gradients_have_the_bits_of_linear(isa, rows, out, inner):
    """Whichever way the operands lie in memory, an element's sum is the same."""
    dy, w = gaussian(0, rows, out, dtype=torch.bfloat16), gaussian(1, out, inner, dtype=torch.bfloat16)
    x = gaussian(2, rows, inner, dtype=torch.bfloat16)
    dx, dw = torch.ops.glm5.linear_dx(dy, w), torch.ops.glm5.linear_dw(dy, x)
    assert same_bits(dx, ops.linear(dy, w.T.contiguous()))
    assert same_bits(dw, ops.linear(dy.T.contiguous(), x.T.contiguous()))
    assert same_bits(dx[31:32], torch.ops.glm5.linear_dx(dy[31:32], w))
    assert relative_error(dx, dy.double() @ w.double()) < 3e-3
    assert relative_error(dw, dy.double().T @ x.double()) < 3e-3


@pytest.mark.skipif("amx" not in _native.available_isas(), reason="this processor has no AMX")
@pytest.mark.parametrize("m, n, k", [(1100, 128, 96), (2000, 512, 256), (300, 70, 600)])
def test_gradient_of_weights_in_blocks_of_k(m, n, k):
    """Stripes that pack both operands, a block of k at a time: the sums of one long chain, at any thread count."""
    dy, x = gaussian(m, m, n, dtype=torch.bfloat16), gaussian(n, m, k, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    with _native.using_cpu_isa("amx"):
        whole = ops.linear(dy.T.contiguous(), x.T.contiguous())
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                with _native.counted_paths() as counts:
                    assert same_bits(torch.ops.glm5.linear_dw(dy, x), whole), count
                assert count > 1 or k > 512 or "gemm amx blocks go on" in counts
        finally:
            torch.set_num_threads(threads)


def test_only_the_gradients_asked_for_are_computed():
    x, w = torch.randn(5, 8), torch.randn(6, 8, requires_grad=True)
    calls = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.name())
            return func(*args, **(kwargs or {}))

    y = ops.linear(x, w).sum()
    with Watch():
        y.backward()
    assert "glm5::linear_dw" in calls and "glm5::linear_dx" not in calls


def test_autocast():
    x, w = torch.randn(5, 8), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(x, w)
    assert same_bits(y, ops.linear(x.bfloat16(), w.bfloat16()))


def test_without_gradients_everything_else_is_as_with_them():
    """The short way past the gradient's wrapper: same bits, autocast, modes and tracing still there."""
    x, w = torch.randn(5, 8), torch.randn(6, 8, requires_grad=True)
    want, calls = ops.linear(x, w), []
    assert want.requires_grad

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.name())
            return func(*args, **(kwargs or {}))

    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = ops.linear(x, w)
            assert same_bits(got, want) and not got.requires_grad
            with torch.autocast("cpu", torch.bfloat16):
                assert ops.linear(x, w).dtype == torch.bfloat16
            with Watch():
                ops.linear(x, w)
            assert calls[-1] == "glm5::linear"
            assert ops.linear(x.to("meta"), w.to("meta")).shape == (5, 6)
            with pytest.raises(ValueError, match="w has shape"):
                ops.linear(x, w[:, :3])
    with torch.no_grad():
        assert same_bits(torch.compile(ops.linear, fullgraph=True, backend="eager")(x, w), want)
        traced = torch.fx.experimental.proxy_tensor.make_fx(lambda a, b: ops.linear(a, b))(x, w)
        assert "glm5.linear" in traced.code and same_bits(traced(x, w), want)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_gradcheck(op):
    for seed in (1, 5, 11):
        arguments = op.draw(RandomDraw(seed), torch.float64)
        small = {k: v for k, v in arguments.items()}
        inner = min(arguments["w"].shape[-1], 6)
        small["x"], small["w"] = arguments["x"][:9, ..., :inner], arguments["w"][..., :5, :inner]
        if small.get("bias") is not None:
            small["bias"] = arguments["bias"][: small["w"].shape[0]]
        if "group_ends" in small:
            small["group_ends"] = small["group_ends"].clamp(max=small["x"].shape[0])
        names = [k for k in op.differentiable if small.get(k) is not None]
        rest = {k: v for k, v in small.items() if k not in names}
        leaves = [small[k].contiguous().requires_grad_() for k in names]
        function = getattr(ops, op.name)
        assert torch.autograd.gradcheck(
            lambda *a, f=function, n=names, r=rest: f(**dict(zip(n, a, strict=True)), **r), leaves, atol=1e-5
        )


EXAMPLES = {
    "linear": lambda m: {"x": torch.randn(m, 16), "w": torch.randn(9, 16), "bias": torch.randn(9)},
    "batched_linear": lambda m: {"x": torch.randn(m, 3, 16), "w": torch.randn(3, 9, 16)},
    "grouped_linear": lambda m: {
        "x": torch.randn(m, 16),
        "w": torch.randn(2, 9, 16),
        "group_ends": torch.tensor([3, 6], dtype=torch.int32),
    },
}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_opcheck_compile_export(op):
    arguments, other = EXAMPLES[op.name](7), EXAMPLES[op.name](11)
    leaves = [v.clone().requires_grad_(v.is_floating_point()) for v in arguments.values()]
    properties.assert_opcheck(op, tuple(leaves))
    properties.assert_compiles(op, arguments, other)
    properties.assert_exports(op, arguments, {"x": {0: torch.export.Dim("tokens")}})


f32, bf16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ops.linear(torch.ones(2, 3), torch.ones(4, 5)), ValueError, "w has shape .* want size 3"),
        (lambda: ops.linear(torch.ones(2, 3), torch.ones(4, 3, dtype=bf16)), ValueError, "w has dtype"),
        (lambda: ops.linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)), ValueError, "bias has shape"),
        (lambda: ops.linear(torch.ones(3), torch.ones(4, 3)), ValueError, "x has shape .* want 2 dimensions"),
        (lambda: ops.linear(torch.ones(2, 3, dtype=torch.int32), torch.ones(4, 3)), ValueError, "x has dtype"),
        (lambda: ops.linear(torch.ones(2, 3), torch.ones(4, 3), None, bf16), ValueError, "out_dtype is BFloat16"),
        (lambda: ops.linear([1.0], torch.ones(4, 3)), TypeError, "x is list"),
        (lambda: ops.batched_linear(torch.ones(2, 3, 4), torch.ones(2, 5, 4)), ValueError, "w has shape .* want size 3"),
        (lambda: ops.batched_linear(torch.ones(2, 4), torch.ones(2, 5, 4)), ValueError, "want 3 dimensions"),
        (
            lambda: ops.grouped_linear(torch.ones(2, 4), torch.ones(2, 5, 4), torch.tensor([1, 3], dtype=torch.int32)),
            ValueError,
            r"group_ends\[1\] is 3, want a number in \[1, 2\]",
        ),
        (
            lambda: ops.grouped_linear(torch.ones(2, 4), torch.ones(2, 5, 4), torch.tensor([2, 1], dtype=torch.int32)),
            ValueError,
            r"group_ends\[1\] is 1",
        ),
        (
            lambda: ops.grouped_linear(torch.ones(2, 4), torch.ones(2, 5, 4), torch.tensor([1, 2])),
            ValueError,
            "group_ends has dtype Long",
        ),
        (
            lambda: ops.grouped_linear(torch.ones(2, 4), torch.ones(2, 5, 4), torch.tensor([1], dtype=torch.int32)),
            ValueError,
            "group_ends has shape",
        ),
    ],
)
def test_bad_input(call, error, words):
    properties.assert_refused(error, words, call)
