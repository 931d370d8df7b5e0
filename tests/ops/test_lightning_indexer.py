"""The lightning indexer: scores against float64, gradients, and the streamed top-k against the scores, bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5 import ops
from glm5.testing import RandomDraw, spec
from tests.ops import properties

LOGITS, TOPK = spec("lightning_indexer_logits"), spec("lightning_indexer_topk")
DTYPES = pytest.mark.parametrize("dtype", LOGITS.dtypes, ids=["bf16", "float32", "e4m3"])


@DTYPES
@pytest.mark.parametrize("op", [LOGITS, TOPK], ids=lambda op: op.name)
class TestBothOps:
    def test_keeps_its_promise(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_keeps_promise(op, data, dtype))()

    def test_thread_count_does_not_matter(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(op, data, dtype))()


@DTYPES
def test_topk_equals_topk_of_the_scores(isa, dtype):
    def equals(data):
        arguments = TOPK.draw(properties.HypothesisDraw(data), dtype)
        indices, _ = ops.lightning_indexer_topk(**arguments)
        topk = arguments.pop("topk")
        scores = ops.lightning_indexer_logits(**arguments)
        assert torch.equal(indices, ops.topk_indices(scores, topk, arguments["ks"], arguments["ke"]))

    given(st.data())(equals)()


@pytest.mark.parametrize("heads, dim", [(1, 3), (3, 4), (5, 2)])
def test_gradcheck(heads, dim):
    draw = RandomDraw(heads)
    q, k, weights = (
        draw.tensor(*shape, dtype=torch.float64).requires_grad_() for shape in [(4, heads, dim), (6, dim), (4, heads)]
    )
    ks, ke = torch.tensor([0, 1, 3, 5], dtype=torch.int32), torch.tensor([6, 4, 3, 6], dtype=torch.int32)

    def visible_scores(q, k, weights):
        scores = ops.lightning_indexer_logits(q, k, None, weights, ks, ke)
        return scores[scores > float("-inf")]

    torch.autograd.gradcheck(visible_scores, (q, k, weights))
