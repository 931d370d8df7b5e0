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


def _scores(draw):
    rows, cols = draw.choice([3, 1, 0, 6]), draw.choice([200, 1, 0, 5, 16, 63, 64, 1000, 5000])
    return draw.tensor(rows, cols, dtype=torch.float32, scale=draw.choice([1e-3, 1.0, 100.0]))


def _arguments(draw, scores, dtype):
    arguments = {"scores": scores.to(dtype), "k": draw.choice([7, 1, 0, 64, 512, 6000])}
    if draw.integer(0, 1):
        arguments["ks"], arguments["ke"] = draw_ranges(draw, *scores.shape)
    return arguments


def _draw_distinct(draw, dtype):
    scores = _scores(draw)
    if draw.choice([False, True]):
        scores = scores.sort(-1, descending=draw.choice([False, True])).values
    return _arguments(draw, scores, dtype)


def _draw_ties(draw, dtype):
    scores, kind = _scores(draw), draw.choice(["few values", "mostly zero", "all equal"])
    if kind == "few values":
        scores = (scores * 2).round() / 2
    elif kind == "mostly zero":
        scores = torch.where(scores > scores.abs().mean(), scores, -0.0)
        scores[:, ::3] = scores[:, ::3].clamp(min=0.0)
    else:
        scores = torch.full_like(scores, 1.5)
    return _arguments(draw, scores, dtype)


def _draw_special(draw, dtype):
    scores = _scores(draw)
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))
    which = torch.randint(0, 12, scores.shape, generator=generator)
    for i, value in enumerate([float("nan"), float("-inf"), float("inf"), 0.0, -0.0, -float("nan")]):
        scores[which == i] = value
    return _arguments(draw, scores, dtype)


def _same_values(got, want, arguments, dtype):
    """The values chosen are the reference's; which of equal ones was chosen is the business of ``ties``."""
    scores, chosen = arguments["scores"], got[0].long()
    if not torch.equal(chosen >= 0, want[0] >= 0):
        return ["other counts of chosen indices than the reference's, or -1s that do not stand at the end"]
    if chosen.numel() and int(chosen.max()) >= scores.shape[1]:
        return [f"index {int(chosen.max())} of {scores.shape[1]} columns"]
    ascending = (chosen[:, 1:] > chosen[:, :-1]) | (chosen[:, 1:] < 0)
    if not ascending.all():
        return ["indices that do not ascend"]
    values = (
        [scores.gather(1, i.long().clamp(min=0)).masked_fill(i < 0, 0) for i in (chosen, want[0])] if scores.numel() else []
    )
    if values and not torch.equal(values[0].sort(-1).values, values[1].sort(-1).values):
        return ["other values chosen than the reference's"]
    return []


register(
    OpSpec(
        "topk_indices",
        _draw_distinct,
        compare=_same_values,
        rows=("scores", "ks", "ke"),
        outputs=("rows",),
        ties=_draw_ties,
        special=_draw_special,
        poisons=(),
    )
)
