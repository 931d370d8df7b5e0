"""Routing, permutation, weighted return: equal to the reference where they choose or move, within budget where they sum."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5 import _native, ops, reference
from glm5.testing import RandomDraw, spec
from tests.ops import properties

ROUTER, PERMUTE, UNPERMUTE = spec("moe_router"), spec("moe_permute"), spec("moe_unpermute")
LAYOUT = spec("moe_dispatch_layout")
MOVERS = pytest.mark.parametrize("op", [PERMUTE, UNPERMUTE], ids=lambda op: op.name)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])


class TestRouter:
    def test_keeps_its_promise(self, isa):
        given(st.data())(lambda data: properties.assert_keeps_promise(ROUTER, data, torch.float32))()

    def test_thread_count_does_not_matter(self, isa):
        given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(ROUTER, data, torch.float32))()

    @pytest.mark.parametrize("name", ["ties", "nan"])
    def test_chooses_among_ties_and_nan_as_the_reference(self, isa, name):
        given(st.data())(lambda data: properties.assert_property(ROUTER, name, data, torch.float32))()

    def test_every_instruction_set_gives_the_same_bits(self):
        for seed in range(10):
            arguments = ROUTER.draw(RandomDraw(seed), torch.float32)
            with _native.using_cpu_isa("portable"):
                want = properties.run_with_gradients(ROUTER, arguments)
            for name in _native.available_isas():
                with _native.using_cpu_isa(name):
                    got = properties.run_with_gradients(ROUTER, arguments)
                assert all(properties.same_bits(g, w) for g, w in zip(got, want, strict=True)), name

    @pytest.mark.parametrize("experts, topk", [(64, 8), (8, 2), (3, 1)])
    def test_a_token_depends_on_itself_alone(self, isa, experts, topk):
        logits, bias = torch.randn(45, experts), torch.randn(experts) * 0.1
        weights, ids = ops.moe_router(logits, bias, topk)
        order = torch.randperm(45)
        for rows in (order, slice(0, 1), slice(44, 45), slice(15, 17)):
            w, i = ops.moe_router(logits[rows], bias, topk)
            assert properties.same_bits(weights[rows], w) and torch.equal(ids[rows], i)

    @pytest.mark.parametrize("experts", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129, 256])
    def test_chooses_what_the_reference_chooses(self, isa, experts):
        """Few experts and many, whole vectors and rests, values shared by many, NaN and infinities among them."""
        inf = float("inf")
        logits = torch.randn(40, experts).mul(2).round()
        odd = torch.randint(12, logits.shape)
        for value, number in ((float("nan"), 0), (inf, 1), (-inf, 2)):
            logits.masked_fill_(odd == number, value)
        logits[-1] = float("nan")
        bias = torch.randint(2, (experts,)).float()
        bias[experts // 2] = -inf
        bias[-1] = inf
        for topk in {1, min(2, experts), min(8, experts), experts}:
            ids = ops.moe_router(logits, bias, topk)[1]
            assert torch.equal(ids, reference.topk_indices(logits.double().sigmoid() + bias.double(), topk))

    def test_bias_moves_the_choice_and_not_the_weights(self, isa):
        logits = torch.randn(20, 16)
        bias = torch.zeros(16)
        bias[5] = 2.0
        weights, ids = ops.moe_router(logits, bias, 3, renormalize=False)
        assert (ids == 5).any(1).all()
        torch.testing.assert_close(weights, logits.sigmoid().gather(1, ids.long()))

    def test_ties_go_to_the_lower_expert_and_ids_ascend(self, isa):
        _, ids = ops.moe_router(torch.zeros(2, 300), torch.zeros(300), 8)
        assert torch.equal(ids, torch.arange(8, dtype=torch.int32).expand(2, 8))
        _, ids = ops.moe_router(torch.randn(50, 33), torch.zeros(33), 7)
        assert (ids.diff(dim=1) > 0).all()
        # Groups tie too.
        _, ids = ops.moe_router(torch.zeros(1, 8), torch.zeros(8), 2, num_groups=4, topk_groups=2)
        assert ids.tolist() == [[0, 1]]

    def test_groups_limit_the_choice(self, isa):
        # The best expert stands alone in a poor group: its group loses to the sum of two.
        logits = torch.tensor([[9.0, -9.0, 1.0, 1.0, 0.5, 0.5]])
        _, ids = ops.moe_router(logits, torch.zeros(6), 2, num_groups=3, topk_groups=1)
        assert ids.tolist() == [[2, 3]]
        _, ids = ops.moe_router(logits, torch.zeros(6), 2, num_groups=3, topk_groups=2)
        assert ids.tolist() == [[2, 3]]

    @pytest.mark.parametrize("num_groups, topk_groups", [(1, 1), (2, 1), (2, 2)])
    def test_nan_and_minus_infinity_are_never_chosen(self, isa, num_groups, topk_groups):
        nan, inf = float("nan"), float("inf")
        logits = torch.tensor([[nan, 1, nan, -inf, 0, nan, nan, 2], [nan] * 8, [inf, -inf, inf, 0, 0, 0, 0, 0]])
        bias = torch.tensor([0, 0, 0, -inf, 0, 0, 0, 0])
        options = {"topk": 4, "num_groups": num_groups, "topk_groups": topk_groups, "scaling": 2.0}
        weights, ids = ops.moe_router(logits, bias, **options)
        want_weights, want_ids = reference.moe_router(logits.double(), bias.double(), **options)
        assert torch.equal(ids, want_ids)
        torch.testing.assert_close(weights.double(), want_weights, rtol=1e-6, atol=0)
        assert ids[1].tolist() == [-1] * 4 and not weights[1].any()

    def test_replay_fixes_the_choice(self, isa):
        logits, bias = torch.randn(12, 16), torch.randn(16)
        weights, ids = ops.moe_router(logits, bias, 4)
        again = ops.moe_router(logits, torch.zeros(16), 4, replay=ids)
        assert properties.same_bits(weights, again[0]) and torch.equal(ids, again[1])
        holes = ids.clone()
        holes[:, 2] = -1
        weights, again = ops.moe_router(logits, bias, 4, replay=holes, scaling=2.5)
        assert torch.equal(again, holes) and not weights[:, 2].any()
        torch.testing.assert_close(weights.sum(1), torch.full((12,), 2.5))

    def test_gradcheck(self):
        for seed, renormalize in ((0, True), (1, False)):
            logits = RandomDraw(seed).tensor(3, 8, dtype=torch.float64).requires_grad_()
            bias = torch.zeros(8, dtype=torch.float64)
            torch.autograd.gradcheck(
                lambda x, b=bias, r=renormalize: ops.moe_router(x, b, 3, renormalize=r, scaling=2.5)[0], (logits,)
            )

    def test_bias_takes_no_gradient(self):
        bias = torch.zeros(8, requires_grad=True)
        ops.moe_router(torch.randn(3, 8, requires_grad=True), bias, 2)[0].sum().backward()
        assert bias.grad is None

    def test_opcheck_compile_export(self):
        logits, bias = torch.randn(6, 16), torch.randn(16)
        properties.assert_opcheck(ROUTER, (logits.clone().requires_grad_(), bias, 4, 2, 1, True, 2.5, None))
        rest = {"bias": bias, "topk": 4}
        properties.assert_compiles(ROUTER, {"logits": logits, **rest}, {"logits": torch.randn(11, 16), **rest})
        properties.assert_exports(ROUTER, {"logits": logits, **rest}, {"logits": {0: torch.export.Dim("tokens")}})

    @pytest.mark.parametrize(
        "change, error, words",
        [
            ({"logits": torch.ones(2, 8, dtype=torch.bfloat16)}, ValueError, "logits has dtype"),
            ({"bias": torch.ones(7)}, ValueError, "bias has shape"),
            ({"topk": 0}, ValueError, "topk is 0"),
            ({"topk": 9}, ValueError, "topk is 9"),
            ({"topk": 5, "num_groups": 2}, ValueError, "topk is 5"),
            ({"num_groups": 3}, ValueError, "num_groups is 3"),
            ({"topk_groups": 2}, ValueError, "topk_groups is 2"),
            ({"replay": torch.tensor([[0, 8], [0, 1]], dtype=torch.int32)}, ValueError, r"replay\[0, 1\] is 8"),
            ({"replay": torch.tensor([[0, 1], [-2, 1]], dtype=torch.int32)}, ValueError, r"replay\[1, 0\] is -2"),
            ({"replay": torch.tensor([[0, 1], [3, 3]], dtype=torch.int32)}, ValueError, "expert 3 twice"),
            ({"replay": torch.tensor([[0, 1]], dtype=torch.int32)}, ValueError, "replay has shape"),
            ({"replay": torch.tensor([[0, 1], [0, 1]])}, ValueError, "replay has dtype"),
            ({"replay": [[0, 1]]}, TypeError, "replay is list"),
        ],
    )
    def test_bad_input(self, change, error, words):
        properties.assert_refused(
            error, words, ops.moe_router, **{"logits": torch.ones(2, 8), "bias": torch.ones(8), "topk": 2, **change}
        )


@MOVERS
class TestMovers:
    @DTYPES
    def test_keeps_its_promise(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_keeps_promise(op, data, dtype))()

    @DTYPES
    def test_thread_count_does_not_matter(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(op, data, dtype))()


def test_movers_gradcheck():
    ids = torch.tensor([[0, 3], [-1, 0], [2, 3]], dtype=torch.int32)
    x = RandomDraw(0).tensor(3, 5, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda x: ops.moe_permute(x, ids, 4)[0], (x,))
    slots = torch.tensor([[4, 1], [-1, 0], [2, 5]], dtype=torch.int32)
    y = RandomDraw(1).tensor(6, 5, dtype=torch.float64).requires_grad_()
    weights = RandomDraw(2).tensor(3, 2, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda y, w: ops.moe_unpermute(y, slots, w), (y, weights))


@DTYPES
def test_permute_is_the_reference_exactly(isa, dtype):
    for seed in range(30):
        arguments = PERMUTE.draw(RandomDraw(seed), dtype)
        for got, want in zip(ops.moe_permute(**arguments), reference.moe_permute(**arguments), strict=True):
            assert properties.same_bits(got, want)


@DTYPES
def test_unpermute_undoes_permute(isa, dtype):
    x = RandomDraw(0).tensor(21, 40, dtype=dtype)
    ids = torch.rand(21, 16).argsort(-1)[:, :4].to(torch.int32)
    xp, row_of_slot, slot_of_row, group_ends = ops.moe_permute(x, ids, 16)
    assert torch.equal(xp, x[row_of_slot.long()]) and group_ends[-1] == 84
    assert properties.same_bits(ops.moe_unpermute(xp, slot_of_row, torch.full((21, 4), 0.25)), x)


@DTYPES
def test_a_token_comes_back_the_same_from_any_batch(isa, dtype):
    """Permute, let each expert work, unpermute: a token's bits do not depend on its neighbours or on the order of ids."""
    x, ids = RandomDraw(1).tensor(40, 67, dtype=dtype), torch.rand(40, 8).argsort(-1)[:, :3].to(torch.int32)
    weights = torch.rand(40, 3)
    gain = torch.linspace(-2, 3, 8).to(dtype)

    def layer(x, ids, weights):
        xp, _, slot_of_row, group_ends = ops.moe_permute(x, ids, 8)
        expert = torch.searchsorted(group_ends, torch.arange(len(xp), dtype=torch.int32), right=True)
        return ops.moe_unpermute(xp * gain[expert, None], slot_of_row, weights)

    whole = layer(x, ids, weights)
    order = torch.randperm(40)
    assert properties.same_bits(whole[order], layer(x[order], ids[order], weights[order]))
    for t in (0, 7, 8, 39):
        assert properties.same_bits(whole[t : t + 1], layer(x[t : t + 1], ids[t : t + 1], weights[t : t + 1]))
    assert properties.same_bits(whole, layer(x, ids.flip(1), weights.flip(1)))


def test_large_copies_go_past_the_caches(isa):
    """From 32 MiB on, of rows that begin and end anywhere in a vector, with slots left over."""
    for dtype, dim, tokens, paths in (
        (torch.bfloat16, 3001, 1500, {"moe_permute.streamed"}),
        (torch.float32, 5, 2_100_000 // 5, {"moe_permute.streamed"}),
        (torch.bfloat16, 3001, 100, {"moe_permute.copied"}),
    ):
        x, ids = torch.randn(tokens, dim).to(dtype), torch.randint(-1, 6, (tokens, 4), dtype=torch.int32)
        with _native.counted_paths() as counts:
            xp, rows, *_ = ops.moe_permute(x, ids, 6)
        assert {p for p in counts if p.startswith("moe_permute.")} == paths
        used = rows >= 0
        assert torch.equal(xp[used], x[rows[used].long()]) and not xp[~used].any()


def test_movers_opcheck_compile_export():
    x, ids = torch.randn(6, 16), torch.randint(4, (6, 2), dtype=torch.int32)
    properties.assert_opcheck(PERMUTE, (x.clone().requires_grad_(), ids, 4))
    first, second = {"x": x, "ids": ids}, {"x": torch.randn(11, 16), "ids": torch.randint(4, (11, 2), dtype=torch.int32)}
    properties.assert_compiles(PERMUTE, {**first, "num_experts": 4}, {**second, "num_experts": 4})
    tokens = torch.export.Dim("tokens")
    properties.assert_exports(PERMUTE, {**first, "num_experts": 4}, {"x": {0: tokens}, "ids": {0: tokens}})

    def back(tokens):
        slots = torch.randperm(2 * tokens).view(tokens, 2).to(torch.int32)
        return {"y": torch.randn(2 * tokens, 16), "slot_of_row": slots, "weights": torch.rand(tokens, 2)}

    first = back(6)
    properties.assert_opcheck(
        UNPERMUTE, (first["y"].clone().requires_grad_(), first["slot_of_row"], first["weights"].clone().requires_grad_())
    )
    properties.assert_compiles(UNPERMUTE, first, back(11))
    dynamic = {"y": {0: 2 * tokens}, "slot_of_row": {0: tokens}, "weights": {0: tokens}}
    properties.assert_exports(UNPERMUTE, first, dynamic)


def test_nothing_to_move(isa):
    """No tokens, no choices, no columns."""
    for tokens, topk, dim in ((0, 2, 5), (3, 0, 5), (3, 2, 0)):
        x, ids = torch.randn(tokens, dim, requires_grad=True), torch.full((tokens, topk), -1, dtype=torch.int32)
        xp, rows, slots, ends = ops.moe_permute(x, ids, 4)
        weights = torch.rand(tokens, topk, requires_grad=True)
        y = ops.moe_unpermute(xp, slots, weights)
        assert xp.shape == (tokens * topk, dim) and y.shape == (tokens, dim) and not y.any() and not ends.any()
        dx, dweights = torch.autograd.grad(y.sum(), (x, weights))
        assert not dx.any() and not dweights.any()
    weights, ids = ops.moe_router(torch.randn(0, 8), torch.zeros(8), 2)
    assert weights.shape == ids.shape == (0, 2)


IDS = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((torch.ones(2, 4), IDS, 2), ValueError, r"ids\[1, 1\] is 2, want 0 <= id < 2"),
        ((torch.ones(2, 4), IDS - 2, 3), ValueError, r"ids\[0, 0\] is -2"),
        ((torch.ones(2, 4), IDS.long(), 3), ValueError, "ids has dtype"),
        ((torch.ones(3, 4), IDS, 3), ValueError, "ids has shape"),
        ((torch.ones(4), IDS, 3), ValueError, "x has shape"),
        ((torch.ones(2, 4), IDS, 0), ValueError, "num_experts is 0"),
        ((torch.ones(2, 4), None, 3), TypeError, "ids is NoneType"),
    ],
)
def test_permute_bad_input(arguments, error, words):
    properties.assert_refused(error, words, ops.moe_permute, *arguments)


SLOTS = torch.tensor([[0, 1], [3, 2]], dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((torch.ones(3, 4), SLOTS, torch.ones(2, 2)), ValueError, r"slot_of_row\[1, 0\] is 3"),
        ((torch.ones(4, 4), SLOTS.clamp(max=2), torch.ones(2, 2)), ValueError, "slot 2 twice"),
        ((torch.ones(4, 4), SLOTS - 2, torch.ones(2, 2)), ValueError, r"slot_of_row\[0, 0\] is -2"),
        ((torch.ones(4, 4), SLOTS, torch.ones(2, 1)), ValueError, "weights has shape"),
        ((torch.ones(4, 4), SLOTS, torch.ones(2, 2).bfloat16()), ValueError, "weights has dtype"),
        ((torch.ones(4, 4), SLOTS, [1.0]), TypeError, "weights is list"),
    ],
)
def test_unpermute_bad_input(arguments, error, words):
    properties.assert_refused(error, words, ops.moe_unpermute, *arguments)


def test_router_backward_refuses_an_expert_chosen_twice():
    ids = torch.tensor([[0, 1], [3, 3]], dtype=torch.int32)
    properties.assert_refused(
        ValueError,
        r"ids\[1\] holds expert 3 twice",
        torch.ops.glm5.moe_router_backward,
        torch.ones(2, 2),
        torch.ones(2, 8),
        ids,
        True,
        1.0,
    )


class TestDispatchLayout:
    def test_keeps_its_promise(self, isa):
        given(st.data())(lambda data: properties.assert_keeps_promise(LAYOUT, data, torch.float32))()

    def test_is_that_of_a_loop(self, isa):
        """Token by token, with sets."""
        for seed in range(20):
            arguments = LAYOUT.draw(RandomDraw(seed), torch.float32)
            ids, experts, ranks, ranks_per_node = arguments.values()
            on_rank = [{e // (experts // ranks) for e in row if e >= 0} for row in ids.tolist()]
            on_node = [{r // ranks_per_node for r in row} for row in on_rank]
            per_rank, per_node, per_expert, in_rank = ops.moe_dispatch_layout(**arguments)
            assert per_rank.tolist() == [sum(r in row for row in on_rank) for r in range(ranks)]
            assert per_node.tolist() == [sum(n in row for row in on_node) for n in range(ranks // ranks_per_node)]
            assert per_expert.tolist() == [ids.eq(e).sum() for e in range(experts)]
            assert in_rank.dtype == torch.bool and in_rank.shape == (len(ids), ranks)
            assert [set(row.nonzero().flatten().tolist()) for row in in_rank] == on_rank

    def test_a_token_counts_once_for_a_rank_and_once_for_a_node(self, isa):
        # Four ranks of two experts, two to a node: 0 and 1 share a rank, 0 and 2 a node, 0 and 4 nothing; 5 is chosen twice.
        ids = torch.tensor([[0, 1], [0, 2], [0, 4], [5, 5], [-1, -1]], dtype=torch.int32)
        per_rank, per_node, per_expert, in_rank = ops.moe_dispatch_layout(ids, 8, 4, 2)
        assert per_rank.tolist() == [3, 1, 2, 0] and per_node.tolist() == [3, 2]
        assert per_expert.tolist() == [3, 1, 1, 0, 1, 2, 0, 0]
        assert in_rank.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0], [0] * 4]

    def test_its_counts_are_the_sizes_of_the_permuted_groups(self, isa):
        ids = torch.randint(-1, 16, (70, 4), dtype=torch.int32)
        ends = ops.moe_permute(torch.randn(70, 3), ids, 16)[3]
        assert torch.equal(ops.moe_dispatch_layout(ids, 16, 4, 2)[2], ends.diff(prepend=ends.new_zeros(1)))

    def test_of_any_layout_and_of_nothing(self, isa):
        ids = torch.randint(-1, 8, (6, 9), dtype=torch.int32)
        for view in (ids.T, ids[:, ::2], ids[1:, 1:], ids[:1].expand(5, 9), ids[:0], ids[:, :0]):
            for got, want in zip(
                ops.moe_dispatch_layout(view, 8, 4, 2), ops.moe_dispatch_layout(view.clone(), 8, 4, 2), strict=True
            ):
                assert torch.equal(got, want)
        per_rank, per_node, per_expert, in_rank = ops.moe_dispatch_layout(ids[:0], 8, 4, 2)
        assert not per_rank.any() and not per_node.any() and not per_expert.any() and in_rank.shape == (0, 4)

    def test_opcheck_compile_export(self):
        arguments = {"ids": torch.randint(-1, 8, (6, 2), dtype=torch.int32)}
        rest = {"num_experts": 8, "num_ranks": 4, "ranks_per_node": 2}
        properties.assert_opcheck(LAYOUT, (arguments["ids"], 8, 4, 2))
        more = {"ids": torch.randint(-1, 8, (11, 2), dtype=torch.int32)}
        properties.assert_compiles(LAYOUT, {**arguments, **rest}, {**more, **rest})
        properties.assert_exports(LAYOUT, {**arguments, **rest}, {"ids": {0: torch.export.Dim("tokens")}})

    @pytest.mark.parametrize(
        "arguments, error, words",
        [
            ((IDS, 2, 1, 1), ValueError, r"ids\[1, 1\] is 2, want 0 <= id < 2"),
            ((IDS - 2, 3, 1, 1), ValueError, r"ids\[0, 0\] is -2"),
            ((IDS.long(), 3, 1, 1), ValueError, "ids has dtype"),
            ((IDS[0], 3, 1, 1), ValueError, "ids has shape"),
            ((IDS, 0, 1, 1), ValueError, "num_experts is 0, want at least 1"),
            ((IDS, 8, 0, 1), ValueError, "num_ranks is 0, want a divisor of the 8 experts"),
            ((IDS, 8, 3, 1), ValueError, "num_ranks is 3, want a divisor of the 8 experts"),
            ((IDS, 8, 16, 1), ValueError, "num_ranks is 16, want a divisor of the 8 experts"),
            ((IDS, 8, 4, 0), ValueError, "ranks_per_node is 0, want a divisor of the 4 ranks"),
            ((IDS, 8, 4, 3), ValueError, "ranks_per_node is 3, want a divisor of the 4 ranks"),
            ((IDS, 8, 4.0, 1), TypeError, "num_ranks is float"),
            (([[0]], 8, 4, 1), TypeError, "ids is list"),
        ],
    )
    def test_bad_input(self, arguments, error, words):
        properties.assert_refused(error, words, ops.moe_dispatch_layout, *arguments)
