"""The conventions that every backend inherits from the references, pinned by small examples."""

import math

import torch

from glm5 import reference

INF, NAN = float("inf"), float("nan")


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_topk_is_ascending_and_padded():
    scores = torch.tensor([[1.0, 5.0, 3.0, 4.0]])
    assert reference.topk_indices(scores, 2).tolist() == [[1, 3]]
    assert reference.topk_indices(scores, 6).tolist() == [[0, 1, 2, 3, -1, -1]]
    assert reference.topk_indices(scores, 2, int32(2), int32(4)).tolist() == [[2, 3]]
    assert reference.topk_indices(scores, 0).shape == (1, 0)


def test_topk_ties_go_to_the_lower_index_and_zeros_tie():
    assert reference.topk_indices(torch.tensor([[-0.0, 0.0, -0.0, 1.0]]), 2).tolist() == [[0, 3]]
    assert reference.topk_indices(torch.tensor([[0.0, -0.0, 0.0]]), 1).tolist() == [[0]]


def test_topk_never_selects_nan_or_minus_infinity():
    assert reference.topk_indices(torch.tensor([[NAN, -INF, 2.0, INF]]), 3).tolist() == [[2, 3, -1]]


def test_empty_range_attends_to_nothing():
    q, k, v = torch.randn(2, 3, 4), torch.randn(5, 3, 4), torch.randn(5, 3, 2)
    out, lse = reference.mla_attention(q, k, v, int32(1, 0), int32(1, 1), 0.5)
    assert torch.equal(out[0], torch.zeros(3, 2)) and torch.equal(lse[0], torch.full((3,), INF))
    assert torch.allclose(out[1], v[0]) and torch.allclose(lse[1], (q[1] * k[0]).sum(-1) * 0.5)


def test_sparse_mla_is_dense_attention_over_the_selected_rows():
    q, kv = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    out, lse = reference.sparse_mla(q, kv, torch.tensor([[1, 2, 3, -1], [-1, -1, -1, -1]], dtype=torch.int32), 0.3, 4)
    keys = kv[:, None].expand(5, 3, 6)
    dense, dense_lse = reference.mla_attention(q, keys, keys[..., :4], int32(1, 0), int32(4, 0), 0.3)
    torch.testing.assert_close(out, dense)
    torch.testing.assert_close(lse, dense_lse)
    assert lse[1, 0] == INF


def test_lse_is_a_natural_logarithm_and_shows_a_poisoned_row():
    q, kv = torch.ones(1, 1, 1), torch.tensor([[0.0], [0.0], [NAN]])
    _, lse = reference.sparse_mla(q, kv, torch.tensor([[0, 1]], dtype=torch.int32), 1.0, 1)
    assert math.isclose(lse.item(), math.log(2), rel_tol=1e-6)
    _, lse = reference.sparse_mla(q, kv, torch.tensor([[0, 2]], dtype=torch.int32), 1.0, 1)
    assert lse.isnan().all()
    indices, lse = reference.lightning_indexer_topk(q, kv, None, torch.ones(1, 1), int32(0), int32(3), 3)
    assert indices.tolist() == [[0, 1, -1]] and lse.isnan().all()
    indices, lse = reference.lightning_indexer_topk(q, kv, None, torch.ones(1, 1), int32(0), int32(0), 3)
    assert indices.tolist() == [[-1, -1, -1]] and lse.item() == INF


def test_gradients_of_empty_rows_are_zero_not_nan():
    q = torch.randn(2, 3, 4, requires_grad=True)
    kv = torch.randn(5, 4, requires_grad=True)
    out, lse = reference.sparse_mla(q, kv, torch.tensor([[-1, -1], [0, -1]], dtype=torch.int32), 1.0, 4)
    (out.sum() + lse[1].sum()).backward()
    assert q.grad.isfinite().all() and kv.grad.isfinite().all() and (q.grad[0] == 0).all()


def test_indexer_logits():
    q, k = torch.tensor([[[1.0], [-1.0]]]), torch.tensor([[2.0], [-3.0]])
    logits = reference.lightning_indexer_logits(q, k, None, torch.tensor([[0.5, 10.0]]), int32(0), int32(2))
    assert logits.tolist() == [[1.0, 30.0]]
    logits = reference.lightning_indexer_logits(q, k, torch.tensor([2.0, 1.0]), torch.ones(1, 2), int32(0), int32(1))
    assert logits.tolist() == [[4.0, -INF]]


def test_kl_is_zero_at_the_target_and_zero_without_keys():
    logits = torch.tensor([[0.0, math.log(3), -INF], [-INF, -INF, -INF]], requires_grad=True)
    target = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]])
    kl = reference.indexer_kl_loss(logits, target)
    torch.testing.assert_close(kl, torch.zeros(2), atol=1e-6, rtol=0)
    kl.sum().backward()
    assert logits.grad.isfinite().all()
    selected = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int32)
    kl = reference.indexer_kl_loss(logits, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), selected)
    assert kl.tolist() == [0.0, 0.0]


def test_indexer_kl_is_the_loss_of_its_parts():
    g = torch.Generator().manual_seed(0)
    q, k, w = (torch.randn(s, generator=g, dtype=torch.float64) for s in [(4, 2, 8), (6, 8), (4, 2)])
    aq, ak = torch.randn(4, 3, 5, generator=g, dtype=torch.float64), torch.randn(6, 3, 5, generator=g, dtype=torch.float64)
    ks, ke = int32(0, 1, 2, 3), int32(6, 5, 2, 4)
    _, lse = reference.mla_attention(aq, ak, ak, ks, ke, 0.7)
    target = reference.mla_attn_target(aq, ak, lse, ks, ke, 0.7)
    torch.testing.assert_close(target.sum(-1), torch.tensor([1.0, 1, 0, 1], dtype=torch.float64))
    kl = reference.lightning_indexer_kl(q, k, w, ks, ke, aq, ak, lse, 0.7)
    logits = reference.lightning_indexer_logits(q, k, None, w, ks, ke)
    torch.testing.assert_close(kl, reference.indexer_kl_loss(logits, target))
    assert (kl >= -1e-12).all() and kl[2] == 0


def test_rope_rotates_pairs_in_place():
    cos, sin = torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert reference.rope(x, cos, sin, int32(1), True).tolist() == [[-2.0, 1.0, 3.0, 4.0]]
    assert reference.rope(x, cos, sin, int32(1), False).tolist() == [[-3.0, 2.0, 1.0, 4.0]]
    assert torch.equal(reference.rope(x, cos, sin, int32(0), True), x)


def test_router_prefers_the_lower_expert_and_ignores_the_bias_in_weights():
    weights, ids = reference.moe_router(torch.zeros(1, 4), torch.tensor([0.0, 0.0, 0.0, 1.0]), 2, scaling=2.5)
    assert ids.tolist() == [[0, 3]]
    torch.testing.assert_close(weights, torch.tensor([[1.25, 1.25]]))
    logits = torch.tensor([[9.0, 0.0, 8.0, 7.0]])
    _, ids = reference.moe_router(logits, torch.zeros(4), 2, num_groups=2, topk_groups=1)
    assert ids.tolist() == [[2, 3]]
    weights, ids = reference.moe_router(logits, torch.zeros(4), 2, replay=torch.tensor([[1, 0]], dtype=torch.int32))
    assert ids.tolist() == [[1, 0]] and weights[0, 1] > weights[0, 0]


def test_permute_is_stable_by_expert_then_token_and_unpermute_undoes_it():
    x = torch.arange(3.0)[:, None]
    xp, row_of_slot, slot_of_row, group_ends = reference.moe_permute(x, torch.tensor([[1, 2], [0, 1], [1, -1]]), 4)
    assert row_of_slot.tolist() == [1, 0, 1, 2, 0, -1]
    assert xp.flatten().tolist() == [1, 0, 1, 2, 0, 0]
    assert slot_of_row.tolist() == [[1, 4], [0, 2], [3, -1]]
    assert group_ends.tolist() == [1, 4, 5, 5]
    back = reference.moe_unpermute(xp, slot_of_row, torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 9.0]]))
    torch.testing.assert_close(back, x)


def test_grouped_linear_gives_zero_past_the_last_group():
    x, w = torch.randn(4, 3), torch.randn(2, 5, 3)
    y = reference.grouped_linear(x, w, int32(1, 3))
    torch.testing.assert_close(y, torch.stack([w[0] @ x[0], w[1] @ x[1], w[1] @ x[2], torch.zeros(5)]))


def test_token_logprobs():
    hidden, head = torch.zeros(2, 3), torch.randn(8, 3)
    logp, entropy = reference.token_logprobs(hidden, head, torch.tensor([0, 7]), torch.ones(2))
    torch.testing.assert_close(logp, torch.full((2,), -math.log(8)))
    torch.testing.assert_close(entropy, torch.full((2,), math.log(8)))


def test_hadamard_is_its_own_inverse():
    x = torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close(reference.rotate_hadamard(reference.rotate_hadamard(x)), x)
    assert reference.rotate_hadamard(torch.tensor([1.0, 1.0])).tolist()[1] == 0


def test_outputs_keep_their_dtypes():
    b = torch.bfloat16
    q, kv = torch.randn(2, 3, 4, dtype=b), torch.randn(5, 4, dtype=b)
    out, lse = reference.sparse_mla(q, kv, torch.zeros(2, 1, dtype=torch.int32), 1.0, 4)
    assert out.dtype == b and lse.dtype == torch.float32
    assert reference.linear(q[0], kv).dtype == b
    assert reference.linear(q[0], kv, out_dtype=torch.float32).dtype == torch.float32
    logits = reference.lightning_indexer_logits(q, kv, None, torch.ones(2, 3), int32(0, 0), int32(5, 5))
    assert logits.dtype == torch.float32
