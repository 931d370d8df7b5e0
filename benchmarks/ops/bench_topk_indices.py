"""topk_indices against torch.topk: distinct values, values shared by many, rows meant to be hard, and other lengths."""

import torch

from benchmarks.harness import Case
from glm5 import ops


def topk_case(rows: int, cols: int, k: int, kind: str = "gaussian", isa: str | None = None, **goals) -> Case:
    scores = torch.randn(rows, cols)
    if kind == "rounded":
        scores = (scores * 3).round()
    elif kind == "mostly zero":
        scores = (scores - 1.5).relu()
    elif kind == "constant":
        scores = torch.ones(rows, cols)
    elif kind == "nearly sorted":
        scores = torch.arange(cols) + 3 * scores
    elif kind == "sample misled":  # the largest lie where the sample looks, 64 runs of 16: the row is packed twice
        for run in range(64):
            scores[:, (cols - 16) * run // 63 :][:, :16] += 10
    return Case(
        f"topk_indices {k} of {cols}, {rows} rows, {kind}",
        lambda: ops.topk_indices(scores, k),
        lambda: torch.topk(scores, k),
        isa=isa,
        **goals,
    )


def cases(quick: bool):
    yield topk_case(16, 32768, 2048, goal_ratio=40.0)
    for kind in ("rounded", "mostly zero"):
        yield topk_case(16, 32768, 2048, kind)
    if quick:
        return
    for kind in ("constant", "nearly sorted", "sample misled"):
        yield topk_case(16, 32768, 2048, kind)
    for isa in ("avx2", "portable"):
        yield topk_case(16, 32768, 2048, isa=isa)
    yield topk_case(1, 32768, 2048)
    yield topk_case(64, 8192, 2048)
    yield topk_case(8, 131072, 2048)
    yield topk_case(256, 1024, 128)
