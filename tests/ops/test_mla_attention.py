"""Dense attention: against float64, row by row, document by document, on every instruction set."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5 import ops
from glm5.testing import RandomDraw, spec
from tests.ops import properties

ATTENTION, TARGET = spec("mla_attention"), spec("mla_attn_target")
OPS = pytest.mark.parametrize("op", [ATTENTION, TARGET], ids=lambda op: op.name)
DTYPES = pytest.mark.parametrize("dtype", ATTENTION.dtypes, ids=["bf16", "float32"])
INF, NAN = float("inf"), float("nan")


@OPS
@DTYPES
class TestEveryOp:
    def test_keeps_its_promise(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_keeps_promise(op, data, dtype))()

    def test_thread_count_does_not_matter(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(op, data, dtype))()


def causal(queries, keys=None, ks=0):
    """Ranges of the last `queries` of `keys` tokens of a document that starts at token ks."""
    keys = queries if keys is None else keys
    ke = torch.arange(keys - queries + 1, keys + 1, dtype=torch.int32)
    return torch.full_like(ke, ks), ke


def example(queries, keys, ks, ke, heads=2, dk=40, dv=24, dtype=torch.float32, seed=0):
    draw = RandomDraw(seed)
    return {
        "q": draw.tensor(queries, heads, dk, dtype=dtype),
        "k": draw.tensor(keys, heads, dk, dtype=dtype),
        "v": draw.tensor(keys, heads, dv, dtype=dtype),
        "ks": ks,
        "ke": ke,
        "scale": dk**-0.5,
    }


@DTYPES
class TestARowIsAFunctionOfItsKeys:
    def test_any_batch_split_and_order(self, isa, dtype):
        a = example(300, 300, *causal(300), dtype=dtype)
        out, lse = ops.mla_attention(**a)
        order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
        for rows in (order, torch.arange(0, 137), torch.arange(137, 300), torch.tensor([299]), torch.tensor([0, 150])):
            part = {**a, "q": a["q"][rows], "ks": a["ks"][rows], "ke": a["ke"][rows]}
            got = ops.mla_attention(**part)
            assert properties.same_bits(got[0], out[rows]) and properties.same_bits(got[1], lse[rows])

    def test_a_document_shifted_in_its_pack(self, isa, dtype):
        a = example(290, 290, *causal(290), dtype=dtype)
        out, lse = ops.mla_attention(**a)
        for shift in (1, 7, 64, 300):
            other = example(shift, shift, *causal(shift), dtype=dtype, seed=5)
            packed = {n: torch.cat([other[n], a[n]]) for n in ("q", "k", "v")}
            packed["ks"] = torch.cat([other["ks"], a["ks"] + shift])
            packed["ke"] = torch.cat([other["ke"], a["ke"] + shift])
            got = ops.mla_attention(**packed, scale=a["scale"])
            assert properties.same_bits(got[0][shift:], out) and properties.same_bits(got[1][shift:], lse)
