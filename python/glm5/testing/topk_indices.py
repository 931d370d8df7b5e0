"""Spec of top-k selection: given the scores, every backend chooses exactly what the reference chooses."""

import torch

from glm5.testing.spec import OpSpec, register


def draw_ranges(draw, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ks and ke, int32 [queries]: causal, packed documents, everything, or arbitrary (empty ranges included)."""
    kind = draw.choice(["causal", "documents", "all", "arbitrary"])
    query = torch.arange(queries)
    if kind == "causal":
        return torch.zeros(queries, dtype=torch.int32), (query + 1).clamp(max=keys).int()
    if kind == "documents":
        length = draw.integer(1, max(1, keys))
        return (query // length * length).clamp(max=keys).int(), (query + 1).clamp(max=keys).int()
    if kind == "all":
        return torch.zeros(queries, dtype=torch.int32), torch.full((queries,), keys, dtype=torch.int32)
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))
    ends = torch.randint(0, keys + 1, (2, queries), generator=generator, dtype=torch.int32)
    return ends[0], ends[1]


def _draw_topk_indices(draw, dtype):
    rows, cols = draw.choice([3, 1, 0, 6]), draw.choice([200, 1, 0, 5, 16, 63, 64, 1000, 5000])
    scores = draw.tensor(rows, cols, dtype=torch.float32, scale=draw.choice([1e-3, 1.0, 100.0]))
    kind = draw.choice(["distinct", "few values", "mostly zero", "sorted", "all equal", "special"])
    if kind == "few values":
        scores = (scores * 2).round() / 2
    elif kind == "mostly zero":
        scores = torch.where(scores > scores.abs().mean(), scores, -0.0)
        scores[:, ::3] = scores[:, ::3].clamp(min=0.0)
    elif kind == "sorted":
        scores = scores.sort(-1, descending=draw.choice([False, True])).values
    elif kind == "all equal":
        scores = torch.full_like(scores, 1.5)
    elif kind == "special":
        generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))
        which = torch.randint(0, 12, scores.shape, generator=generator)
        for i, value in enumerate([float("nan"), float("-inf"), float("inf"), 0.0, -0.0, -float("nan")]):
            scores[which == i] = value
    arguments = {"scores": scores.to(dtype), "k": draw.choice([7, 1, 0, 64, 512, 6000])}
    if draw.integer(0, 1):
        arguments["ks"], arguments["ke"] = draw_ranges(draw, rows, cols)
    return arguments


def _same_choice(got, want, arguments, dtype):
    return [] if torch.equal(got[0], want[0]) else ["other indices than the reference's"]


register(OpSpec("topk_indices", _draw_topk_indices, compare=_same_choice, rows=("scores", "ks", "ke"), outputs=("rows",)))
