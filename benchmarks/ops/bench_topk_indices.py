"""topk_indices against torch.topk: distinct values, values shared by many, and rows of other lengths."""

import torch

from benchmarks.harness import Case
from glm5 import ops


def topk_case(rows: int, cols: int, k: int, kind: str = "gaussian", **goals) -> Case:
    scores = torch.randn(rows, cols)
    if kind == "rounded":
        scores = (scores * 3).round()
    elif kind == "mostly zero":
        scores = (scores - 1.5).relu()
    return Case(
        f"topk_indices {k} of {cols}, {rows} rows, {kind}",
        lambda: ops.topk_indices(scores, k),
        lambda: torch.topk(scores, k),
        **goals,
    )


def cases(quick: bool):
    yield topk_case(16, 32768, 2048, goal_ratio=40.0)
    for kind in ("rounded", "mostly zero"):
        yield topk_case(16, 32768, 2048, kind)
    if quick:
        return
    yield topk_case(64, 8192, 2048)
    yield topk_case(8, 131072, 2048)
    yield topk_case(256, 1024, 128)
