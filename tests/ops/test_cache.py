"""Caches of pages: what is written is read, in the layouts that others read too, and nothing else changes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5 import ops, reference
from glm5.reference.cache import indexer_rows
from glm5.testing import RandomDraw, same_bits, spec
from tests.ops import properties

OPS = ("latent_cache_write", "latent_cache_read", "indexer_cache_write")
WRITES = ("latent_cache_write", "indexer_cache_write")


def int32(values):
    return torch.as_tensor(values, dtype=torch.int32)


def write(name, rows, slots, cache):
    getattr(ops, name)(rows, int32(slots), cache)
    return cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
@pytest.mark.parametrize("name", OPS)
class TestEveryOp:
    def test_keeps_its_promise(self, isa, name, dtype):
        given(st.data())(lambda data: properties.assert_keeps_promise(spec(name), data, dtype))()

    def test_thread_count_does_not_matter(self, isa, name, dtype):
        def same_on_three_threads(data):
            op = spec(name)
            arguments = op.draw(properties.HypothesisDraw(data), dtype)
            results = []
            for count in (1, 2, 3):
                with properties.threads(count):
                    mine = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
                    results.append(op.call(getattr(ops, name), mine))
            assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))

        given(st.data())(same_on_three_threads)()


def test_the_bytes_of_glm5s_latent_row(isa):
    """FlashMLA's layout: 512 codes, 4 scales, 64 bfloat16 numbers."""
    row = torch.randn(1, 576).bfloat16()
    cache = write("latent_cache_write", row, [9], torch.full((3, 4, 656), 7, dtype=torch.uint8))
    stored = cache[2, 1]
    codes, scale = reference.quantize_fp8(row[:, :512])
    assert torch.equal(stored[:512].view(torch.float8_e4m3fn).float(), codes[0].float())
    assert torch.equal(stored[512:528].view(torch.float32), scale[0])
    assert torch.equal(stored[528:].view(torch.bfloat16), row[0, 512:])
    cache[2, 1] = 7
    assert (cache == 7).all()
    back = ops.latent_cache_read(write("latent_cache_write", row, [9], cache), int32([9, -1]))
    assert same_bits(back[:1, :512], reference.dequantize_fp8(codes, scale)) and same_bits(back[:1, 512:], row[:, 512:])
    assert not back[1].any()


def test_the_bytes_of_an_indexer_page(isa):
    """DeepGEMM's layout: the codes of a page, then its scales."""
    k = torch.randn(1, 128)
    cache = write("indexer_cache_write", k, [70], torch.full((2, 64, 132), 7, dtype=torch.uint8))
    page = cache[1].flatten()
    codes, scale = reference.quantize_fp8(k)
    assert torch.equal(page[6 * 128 : 7 * 128].view(torch.float8_e4m3fn).float(), codes[0].float())
    assert torch.equal(page[64 * 128 + 6 * 4 :][:4].view(torch.float32), scale[0])
    page[6 * 128 : 7 * 128] = page[64 * 128 + 6 * 4 :][:4] = 7
    assert (page == 7).all() and (cache[0] == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_numbers_come_back_as_they_were(isa, dtype):
    rows = torch.randn(40, 33).to(dtype)
    slots = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:40]
    cache = torch.full((12, 5, 33), float("nan"), dtype=dtype)
    for name in WRITES:
        write(name, rows, slots, cache.fill_(float("nan")))
        assert same_bits(ops.latent_cache_read(cache, int32(slots)), rows)
        assert int(cache.isnan().any(-1).sum()) == 20


@pytest.mark.parametrize(
    "name, width", [("latent_cache_write", 146 * 1), ("latent_cache_write", 168), ("indexer_cache_write", 44)]
)
def test_of_two_rows_in_a_slot_the_later_stays(isa, name, width):
    dtype = torch.float32 if width == 146 else torch.uint8
    dim = {146: 146, 168: 146, 44: 40}[width]
    rows = torch.arange(1.0, 201)[:, None].expand(200, dim)
    for count in (1, 2, 3):
        with properties.threads(count):
            cache = write(name, rows, torch.arange(200) % 7, torch.zeros(2, 4, width, dtype=dtype))
            read = ops.latent_cache_read if name == "latent_cache_write" else lambda c, s, _: _dequantised(c, s)
            assert [round(x) for x in read(cache, int32(range(8)), torch.float32)[:, 0].tolist()] == [
                197, 198, 199, 200, 194, 195, 196, 0,
            ]  # fmt: skip


def _dequantised(cache, slots):
    codes, scale = indexer_rows(cache, slots)
    return codes.float() * scale[:, None]


@pytest.mark.parametrize("name", WRITES)
def test_compile_opcheck_and_versions(name):
    op = spec(name)
    for seed in range(6):
        arguments = op.draw(RandomDraw(seed), torch.float32)
        properties.assert_opcheck(op, tuple(arguments.values()))
    rows = [torch.randn(t, 18) for t in (3, 5)]
    slots = [torch.arange(t, dtype=torch.int32) for t in (3, 5)]
    function = getattr(ops, name)

    def step(rows, slots, cache):
        doubled = cache * 2  # before the write, and after it
        function(rows, slots, cache)
        return doubled, cache + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for r, s in zip(rows, slots, strict=True):
        caches = [torch.ones(2, 4, 18) for _ in range(2)]
        got, want = compiled(r, s, caches[0]), step(r, s, caches[1])
        assert same_bits(*caches) and all(map(same_bits, got, want))
        assert caches[1]._version == 1 and not torch.equal(caches[0][0], torch.ones(4, 18))
    weight, cache = torch.ones(2, 4, 18, requires_grad=True), torch.ones(2, 4, 18)
    product = weight * cache  # keeps the cache for its backward
    function(rows[0], slots[0], cache)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_read_opcheck_compile_export():
    op = spec("latent_cache_read")
    arguments, other = ({"cache": torch.randn(3, 4, 18), "slots": int32(range(t)), "out_dtype": None} for t in (5, 7))
    properties.assert_opcheck(op, tuple(arguments.values()))
    properties.assert_compiles(op, arguments, other)
    properties.assert_exports(op, arguments, {"slots": {0: torch.export.Dim("rows")}})


LATENT = {"rows": torch.ones(2, 18), "slots": int32([0, 1]), "cache": torch.zeros(2, 4, 18)}
INDEXER = {"k": torch.ones(2, 18), "slots": int32([0, 1]), "cache": torch.zeros(2, 4, 18)}
READ = {"cache": torch.zeros(2, 4, 18), "slots": int32([0, 1])}
FP8 = {"cache": torch.zeros(2, 4, 36, dtype=torch.uint8)}


@pytest.mark.parametrize(
    "name, arguments, change, error, words",
    [
        ("latent_cache_write", LATENT, {"rows": torch.ones(2, 17)}, ValueError, "rows has shape"),
        ("latent_cache_write", LATENT, {"rows": torch.ones(18)}, ValueError, "rows has shape"),
        ("latent_cache_write", LATENT, {"rows": torch.ones(2, 18).bfloat16()}, ValueError, "rows has dtype"),
        ("latent_cache_write", LATENT | FP8, {"rows": torch.ones(2, 18).double()}, ValueError, "rows has dtype"),
        ("latent_cache_write", LATENT | FP8, {"rows": torch.ones(2, 20)}, ValueError, "has shape"),
        ("latent_cache_write", LATENT, {"cache": torch.zeros(2, 4, 35, dtype=torch.uint8)}, ValueError, "cache has shape"),
        ("latent_cache_write", LATENT, {"cache": torch.zeros(2, 4, 18).half()}, ValueError, "cache has dtype"),
        ("latent_cache_write", LATENT, {"cache": torch.zeros(4, 18)}, ValueError, "cache has shape"),
        ("latent_cache_write", LATENT, {"cache": torch.zeros(2, 0, 18)}, ValueError, "cache has shape"),
        ("latent_cache_write", LATENT, {"cache": torch.zeros(4, 2, 18).transpose(0, 1)}, ValueError, "contiguous"),
        ("latent_cache_write", LATENT, {"slots": int32([0])}, ValueError, "slots has shape"),
        ("latent_cache_write", LATENT, {"slots": torch.tensor([0, 1])}, ValueError, "slots has dtype"),
        ("latent_cache_write", LATENT, {"slots": int32([1, 8])}, ValueError, r"slots\[1\] is 8, want -1 .* 0 to 7"),
        ("latent_cache_write", LATENT, {"slots": int32([-2, 8])}, ValueError, r"slots\[0\] is -2"),
        ("latent_cache_write", LATENT, {"cache": [1.0]}, TypeError, "cache is list"),
        ("indexer_cache_write", INDEXER, {"k": torch.ones(2, 17)}, ValueError, "k has shape"),
        ("indexer_cache_write", INDEXER | FP8, {}, ValueError, "k has shape"),
        ("indexer_cache_write", INDEXER, {"cache": torch.zeros(2, 4, 3, dtype=torch.uint8)}, ValueError, "has shape"),
        ("indexer_cache_write", INDEXER, {"cache": torch.zeros(4, 2, 18).transpose(0, 1)}, ValueError, "contiguous"),
        ("indexer_cache_write", INDEXER, {"slots": int32([1, 8])}, ValueError, r"slots\[1\] is 8"),
        ("latent_cache_read", READ, {"slots": int32([1, 8])}, ValueError, r"slots\[1\] is 8"),
        ("latent_cache_read", READ, {"slots": int32([[1]])}, ValueError, "slots has shape"),
        ("latent_cache_read", READ, {"out_dtype": torch.float64}, ValueError, "out_dtype is"),
        ("latent_cache_read", READ, {"out_dtype": "bf16"}, TypeError, "out_dtype is str"),
        (
            "latent_cache_read",
            READ,
            {"cache": torch.zeros(2, 4, 18).double(), "out_dtype": torch.float32},
            ValueError,
            "out_d",
        ),
    ],
)
def test_bad_input(name, arguments, change, error, words):
    arguments = {**arguments, **change}
    properties.assert_refused(error, words, getattr(ops, name), **arguments)
    if isinstance(cache := arguments["cache"], torch.Tensor):
        assert not cache.any(), "something was written"
