"""What the tests of all ops on pages share: sequences laid out in pages, and the same rows one after the other."""

from dataclasses import dataclass

import pytest
import torch

from glm5 import ops
from glm5.reference.cache import indexer_rows
from glm5.testing import RandomDraw
from glm5.testing.cache import Pages, fill_pages, lay_pages

PAGE_SIZES = pytest.mark.parametrize("page_size", [1, 7, 16, 64, 128])
LENGTHS = (150, 1, 0, 300, 65)
SEQUENCE = torch.tensor([3, 3, 0, 4, 1, 2, 0, 3], dtype=torch.int32)  # of eight queries
KS = torch.tensor([0, 100, 3, 64, 0, 0, 149, 299], dtype=torch.int32)
KE = torch.tensor([300, 290, 150, 65, 1, 0, 150, 299], dtype=torch.int32)


@dataclass
class Layout:
    """Sequences of ``LENGTHS`` in pages, NaN everywhere else."""

    pages: Pages
    dim: int

    @property
    def table(self) -> dict:
        return {"cache": self.pages.cache, "block_table": self.pages.block_table}

    def rows(self, sequence: int) -> torch.Tensor:
        """The latent rows of a sequence, one after the other."""
        return ops.latent_cache_read(self.pages.cache, self.pages.slots(sequence))

    def keys(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The indexer's keys of a sequence and their scales."""
        return indexer_rows(self.pages.cache, self.pages.slots(sequence))


def latent_layout(page_size: int, form: str, seed: int = 0, shared: int = 2, lengths=LENGTHS, dim: int = 0) -> Layout:
    """``form``: bf16, float32, float64 or fp8."""
    fp8 = form == "fp8"
    dim = dim or (146 if fp8 else 40)
    dtype = {"bf16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}.get(form, torch.uint8)
    width = dim // 128 * 132 + dim % 128 * 2 if fp8 else dim
    pages = lay_pages(lengths, page_size, width, dtype, seed, shared=shared)
    fill_pages(pages, dim, torch.float32 if fp8 else dtype, True, RandomDraw(seed))
    return Layout(pages, dim)


def indexer_layout(page_size: int, form: str, seed: int = 0, shared: int = 2, lengths=LENGTHS, dim: int = 40) -> Layout:
    fp8 = form == "e4m3"
    dtype = {"bf16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}.get(form, torch.uint8)
    pages = lay_pages(lengths, page_size, dim + 4 if fp8 else dim, dtype, seed, shared=shared)
    fill_pages(pages, dim, torch.float32 if fp8 else dtype, False, RandomDraw(seed))
    return Layout(pages, dim)


def elsewhere(arguments: dict, layout: Layout, seed: int) -> dict:
    """The same sequences in other pages of a bigger pool."""
    cache, table = layout.pages.cache, layout.pages.block_table.clone()
    bigger = torch.cat([cache.new_full((5, *cache.shape[1:]), 255 if cache.dtype == torch.uint8 else float("nan")), cache])
    order = torch.randperm(len(bigger), generator=torch.Generator().manual_seed(seed))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(bigger))
    for row, length in zip(table, layout.pages.lengths, strict=True):
        used = -(-length // cache.shape[1])
        row[:used] = place[row[:used].long() + 5].int()
    return {**arguments, "cache": bigger[order].contiguous(), "block_table": table}


# (what is changed, words of the error) for an op on eight queries of either layout with pages of 16.
BAD_PAGES = [
    ({"cache": lambda c: c[0]}, "cache has shape"),
    ({"cache": lambda c: c[:, :0]}, "cache has shape"),
    ({"cache": lambda c: c[..., :-2]}, "cache has shape"),
    ({"cache": lambda c: c.view(torch.int8) if c.dtype == torch.uint8 else c.half()}, "cache has dtype"),
    ({"block_table": lambda b: b.long()}, "block_table has dtype"),
    ({"block_table": lambda b: b[0]}, "block_table has shape"),
    ({"sequence": lambda s: s[:-1]}, "sequence has shape"),
    ({"sequence": lambda s: s.long()}, "sequence has dtype"),
    ({"sequence": lambda s: s[None]}, "sequence has shape"),
    ({"sequence": lambda s: s.clone().index_fill_(0, torch.tensor(4), 5)}, r"sequence\[4\] is 5, want 0 to 4"),
    ({"sequence": lambda s: s.clone().index_fill_(0, torch.tensor(4), -1)}, r"sequence\[4\] is -1, want 0 to 4"),
]


def changed(arguments: dict, change: dict) -> dict:
    return {**arguments, **{k: f(arguments[k]) for k, f in change.items()}}
