"""Sparse MLA: against float64, row by row and list by list, on every instruction set."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5 import ops
from glm5.testing import RandomDraw, spec
from tests.ops import properties

SPARSE_MLA, TARGET = spec("sparse_mla"), spec("sparse_mla_attn_target")
OPS = pytest.mark.parametrize("op", [SPARSE_MLA, TARGET], ids=lambda op: op.name)
DTYPES = pytest.mark.parametrize("dtype", SPARSE_MLA.dtypes, ids=["bf16", "float32"])
INF = float("inf")


def example(queries=5, keys=150, heads=6, dim=64, d_v=48, topk=130, dtype=torch.float32, seed=0, valid=None):
    """Arguments of sparse_mla with lists of `valid` (default topk) distinct ascending rows."""
    draw = RandomDraw(seed)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.full((queries, topk), -1, dtype=torch.int32)
    count = min(topk if valid is None else valid, keys)
    for row in indices:
        row[:count] = torch.randperm(keys, generator=generator)[:count].sort().values
    return {
        "q": draw.tensor(queries, heads, dim, dtype=dtype),
        "kv": draw.tensor(keys, dim, dtype=dtype),
        "indices": indices,
        "scale": dim**-0.5,
        "d_v": d_v,
    }


def target_arguments(arguments):
    """The same as arguments of sparse_mla_attn_target."""
    lse = ops.sparse_mla(**arguments)[1]
    return {**{k: v for k, v in arguments.items() if k != "d_v"}, "lse": lse}


@OPS
@DTYPES
class TestEveryOp:
    def test_keeps_its_promise(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_keeps_promise(op, data, dtype))()

    def test_thread_count_does_not_matter(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(op, data, dtype))()
