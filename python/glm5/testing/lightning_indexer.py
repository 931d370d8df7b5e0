"""Specs of the lightning indexer."""

from functools import partial

import torch

from glm5 import reference
from glm5.reference.cache import indexer_rows, slots_of
from glm5.testing.cache import draw_lengths, draw_positions, draw_sequences, fill_pages, lay_pages
from glm5.testing.compare import BUDGETS, relative_error
from glm5.testing.spec import OpSpec, register, widened
from glm5.testing.topk_indices import draw_ranges

_DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn)


def _draw_logits(draw, dtype):
    queries, keys = draw.choice([3, 1, 0, 16, 17, 40]), draw.choice([65, 1, 0, 15, 64, 130, 300])
    heads, dim = draw.choice([3, 1, 2, 4, 7, 32, 128]), draw.choice([16, 1, 3, 33, 64, 128])
    scale = draw.choice([0.1, 1.0, 4.0])
    real = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = {
        "q": draw.tensor(queries, heads, dim, dtype=torch.float32, scale=scale).clamp(-400, 400).to(dtype),
        "k": draw.tensor(keys, dim, dtype=torch.float32).clamp(-400, 400).to(dtype),
        "k_scale": None,
        "weights": draw.tensor(queries, heads, dtype=real),
    }
    if dtype == torch.float8_e4m3fn and draw.integer(0, 3):
        arguments["k_scale"] = draw.tensor(keys, dtype=torch.float32).abs() + 0.01
    arguments["ks"], arguments["ke"] = draw_ranges(draw, queries, keys)
    return arguments


def _draw_topk(draw, dtype):
    return {**_draw_logits(draw, dtype), "topk": draw.choice([0, 1, 16, 64, 400])}


def _whole(arguments):
    """Queries and weights as small whole numbers. With keys of -1, 0 and 1 every score is exact in float32, and most are
    shared by several keys."""
    rounded = {k: arguments[k].float().round().clamp(-2, 2).to(arguments[k].dtype) for k in ("q", "weights")}
    return {**arguments, **rounded}


def _draw_ties(draw, dtype):
    arguments = _whole(_draw_topk(draw, dtype))
    arguments["k"] = arguments["k"].float().sign().to(arguments["k"].dtype)
    if arguments["k_scale"] is not None:
        arguments["k_scale"] = torch.full_like(arguments["k_scale"], 0.5)
    return arguments


def valid_choice(logits, got, want, arguments, dtype):
    """By the scores of the reference ``logits`` every chosen score reaches the true k-th score and none above it is missing,
    both within the score budget."""
    indices, lse = got
    topk = arguments["topk"]
    found = []
    error = relative_error(lse, want[1])
    if not error <= BUDGETS["softmax"][torch.float32][0]:
        found.append(f"lse: relative error {error:.3g}")
    theirs = widened(arguments)
    theirs.pop("topk")
    scores = logits(**theirs)
    visible = scores[scores > float("-inf")]
    slack = BUDGETS["scores"][torch.float32][0] * visible.norm().item() if visible.numel() else 0.0
    for row, (chosen, score) in enumerate(zip(indices.tolist(), scores, strict=True)):
        candidates = int((score > float("-inf")).sum())
        keys = [key for key in chosen if key >= 0]
        if chosen != sorted(set(keys)) + [-1] * (topk - len(keys)) or len(keys) != min(topk, candidates):
            found.append(f"query {row}: not ascending, padded with -1, of the right count")
            continue
        if not keys:
            continue
        kth = score.sort(descending=True).values[len(keys) - 1]
        missing = score.clone()
        missing[keys] = float("-inf")
        if score[keys].min() < kth - slack or missing.max() > kth + slack:
            found.append(f"query {row}: a better key than those chosen")
    return found


_ROWS = {"rows": ("q", "weights", "ks", "ke"), "keys": ("k", "k_scale"), "positions": ("ks", "ke")}
register(
    OpSpec(
        "lightning_indexer_logits",
        _draw_logits,
        differentiable=("q", "k", "weights"),
        budget="scores",
        dtypes=_DTYPES,
        outputs=("columns",),
        **_ROWS,
    )
)
register(
    OpSpec(
        "lightning_indexer_topk",
        _draw_topk,
        budget="scores",
        dtypes=_DTYPES,
        compare=partial(valid_choice, reference.lightning_indexer_logits),
        outputs=("positions", "rows"),
        ties=_draw_ties,
        **_ROWS,
    )
)


def _draw_topk_paged(draw, dtype, change=lambda keys: keys):
    fp8 = dtype == torch.float8_e4m3fn
    heads, dim = draw.choice([3, 1, 4, 32]), draw.choice([16, 1, 33, 128])
    pages = lay_pages(
        draw_lengths(draw), draw.choice([16, 1, 7, 64]), dim + 4 if fp8 else dim, torch.uint8 if fp8 else dtype,
        seed=draw.integer(0, 2**31 - 1), shared=draw.choice([0, 0, 2]),
    )  # fmt: skip
    fill_pages(pages, dim, torch.float32 if fp8 else dtype, False, draw, change)
    queries = draw.choice([3, 0, 1, 9])
    sequence = draw_sequences(draw, queries, pages)
    ks, ke = draw_positions(draw, sequence, pages)
    return {
        "q": draw.tensor(queries, heads, dim, scale=draw.choice([0.1, 1.0])).clamp(-400, 400).to(dtype),
        "weights": draw.tensor(queries, heads, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
        "cache": pages.cache,
        "block_table": pages.block_table,
        "sequence": sequence,
        "ks": ks,
        "ke": ke,
        "topk": draw.choice([16, 0, 1, 200]),
    }


def _draw_ties_paged(draw, dtype):
    return {**_whole(_draw_topk_paged(draw, dtype, torch.sign)), "topk": draw.choice([16, 5, 1, 33])}


def paged_logits(q, weights, cache, block_table, sequence, ks, ke):
    """[Tq, positions] scores of each query's keys, -inf elsewhere."""
    scores = torch.full((q.shape[0], block_table.shape[1] * cache.shape[1]), float("-inf"), dtype=torch.float64)
    for t, (s, first, last) in enumerate(zip(*(x.tolist() for x in (sequence, ks, ke)), strict=True)):
        if first < last:
            k, k_scale = indexer_rows(cache, slots_of(block_table, s, torch.arange(first, last), cache.shape[1]))
            row, whole = slice(t, t + 1), (ks.new_zeros(1), ks.new_full((1,), last - first))
            scores[t, first:last] = reference.lightning_indexer_logits(q[row], k, k_scale, weights[row], *whole)
    return scores


register(
    OpSpec(
        "lightning_indexer_topk_paged",
        _draw_topk_paged,
        budget="scores",
        dtypes=_DTYPES,
        compare=partial(valid_choice, paged_logits),
        rows=("q", "weights", "sequence", "ks", "ke"),
        outputs=("rows", "rows"),
        ties=_draw_ties_paged,
    )
)
