"""Specs of the caches, and pools of pages for the ops that read them."""

from dataclasses import dataclass

import torch

from glm5 import reference
from glm5.reference.cache import indexer_rows
from glm5.testing.quantize import draw_values
from glm5.testing.spec import OpSpec, register

GARBAGE = (-1, 2**31 - 1, -(2**31), 5)  # what block table entries hold that nobody reads


@dataclass
class Pages:
    """A pool [pages, page_size, width] and the sequences in it: what a paged op is given, and how long each sequence is."""

    cache: torch.Tensor
    block_table: torch.Tensor
    lengths: list[int]

    def slots(self, sequence: int) -> torch.Tensor:
        """int32 slots of the sequence's positions."""
        size = self.cache.shape[1]
        positions = torch.arange(self.lengths[sequence])
        return (self.block_table[sequence, positions // size] * size + positions % size).int()

    def put(self, rows: torch.Tensor, slots: torch.Tensor, latent: bool) -> None:
        """Writes rows as the caches' references do."""
        (reference.latent_cache_write if latent else reference.indexer_cache_write)(rows, slots, self.cache)


def lay_pages(lengths, page_size: int, width: int, dtype, seed: int = 0, spare: int = 3, shared: int = 0) -> Pages:
    """Pages for sequences of these lengths, in shuffled order, the first ``shared`` of all sequences being the same ones.

    Nothing is in them but NaN (0xff in bytes); nor will be in the ``spare`` pages, in places behind a sequence's end, and,
    in the block table, behind its pages.
    """
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-n // page_size) for n in lengths]
    table = torch.tensor(GARBAGE, dtype=torch.int32).repeat(len(lengths), max(needed, default=0) // 4 + 1)
    order = torch.randperm(sum(needed) + spare, generator=generator).int()
    used = 0
    for row, count in enumerate(needed):
        own = order[used : used + count]
        used += count
        table[row, :count] = own
        if row and shared:
            both = min(shared, count, needed[0])
            table[row, :both] = table[0, :both]
    pool = (len(order), page_size, width)
    cache = torch.full(pool, 255, dtype=dtype) if dtype == torch.uint8 else torch.full(pool, float("nan"), dtype=dtype)
    return Pages(cache, table, list(lengths))


def fill_pages(pages: Pages, dim: int, dtype, latent: bool, draw, change=lambda rows: rows) -> None:
    """Drawn rows of ``dim`` for every position of every sequence, ``change``d before they are written."""
    slots = [pages.slots(i) for i in range(len(pages.lengths))]
    slots = torch.cat(slots).unique().int() if slots else torch.zeros(0, dtype=torch.int32)
    pages.put(change(draw.tensor(len(slots), dim, dtype=dtype)), slots, latent)


def draw_latent_pages(draw, dtype, lengths) -> tuple[Pages, int]:
    """A pool of latent rows in ``dtype``, or, for bfloat16, sometimes in FP8; and the dims of a row."""
    fp8 = dtype == torch.bfloat16 and draw.choice([False, True])
    dim = draw.choice([146, 320, 128] if fp8 else [18, 1, 48, 64, 130])
    width = dim // 128 * 132 + dim % 128 * 2 if fp8 else dim
    pages = lay_pages(
        lengths, draw.choice([16, 1, 7, 64]), width, torch.uint8 if fp8 else dtype,
        seed=draw.integer(0, 2**31 - 1), shared=draw.choice([0, 0, 2]),
    )  # fmt: skip
    fill_pages(pages, dim, dtype, True, draw)
    return pages, dim


def draw_lengths(draw) -> list[int]:
    """Lengths of one to three sequences."""
    return [draw.choice([40, 0, 1, 65, 150]) for _ in range(draw.integer(1, 3))]


def draw_sequences(draw, queries: int, pages: Pages) -> torch.Tensor:
    """int32 [queries]: which sequence each belongs to, neighbours often to the same."""
    last = len(pages.lengths) - 1
    mixed = [draw.integer(0, last) for _ in range(queries)]
    return torch.tensor(mixed if draw.choice([False, True]) else sorted(mixed), dtype=torch.int32)


def draw_positions(draw, sequence: torch.Tensor, pages: Pages) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 ks and ke of queries of these sequences: all so far, the last ones, any range, or none."""
    ks, ke = torch.zeros_like(sequence), torch.zeros_like(sequence)
    for t, s in enumerate(sequence.tolist()):
        length = pages.lengths[s]
        kind = draw.choice(["all", "window", "any", "none"])
        if kind == "all":
            ke[t] = length
        elif kind == "window":
            ks[t], ke[t] = max(length - 37, 0), length
        elif kind == "any":
            ks[t], ke[t] = draw.integer(0, length), draw.integer(0, length)
        else:
            ks[t], ke[t] = 2**30, -5
    return ks, ke


def _draw_slots(draw, rows: int, num_slots: int) -> torch.Tensor:
    """int32 slots of rows: distinct ones, some skipped; or any, some twice."""
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))
    if draw.choice([False, True]):
        return torch.randint(-1, num_slots, (rows,), generator=generator).int()
    slots = torch.full((rows,), -1, dtype=torch.int32)
    some = torch.randperm(rows, generator=generator)[: min(rows, num_slots)]
    slots[some] = torch.randperm(num_slots, generator=generator)[: len(some)].int()
    return slots


def _draw_cache(draw, dtype, dims, fp8_dims, width_of) -> tuple[torch.Tensor, int]:
    """A pool in ``dtype`` or in FP8 with something in it, and the dims of a row."""
    fp8 = draw.choice([False, True])
    dim = draw.choice(fp8_dims if fp8 else dims)
    pages, size = draw.choice([3, 1, 0]), draw.choice([16, 1, 7])
    if not fp8:
        return draw.tensor(pages, size, dim, dtype=dtype), dim
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))
    return torch.randint(0, 256, (pages, size, width_of(dim)), generator=generator, dtype=torch.uint8), dim


def _draw_latent_cache(draw, dtype):
    return _draw_cache(draw, dtype, [18, 1, 576], [576, 128, 146, 18], lambda dim: dim // 128 * 132 + dim % 128 * 2)


def _draw_latent_cache_write(draw, dtype):
    cache, dim = _draw_latent_cache(draw, dtype)
    rows = draw_values(draw, draw.choice([5, 0, 1, 40]), dim, dtype=dtype)
    return {"rows": rows, "slots": _draw_slots(draw, rows.shape[0], cache.shape[0] * cache.shape[1]), "cache": cache}


def _draw_latent_cache_read(draw, dtype):
    cache, _ = _draw_latent_cache(draw, dtype)
    slots = _draw_slots(draw, draw.choice([5, 0, 1, 40]), cache.shape[0] * cache.shape[1])
    return {"cache": cache, "slots": slots, "out_dtype": draw.choice([None, torch.bfloat16, torch.float32])}


def _draw_indexer_cache_write(draw, dtype):
    cache, dim = _draw_cache(draw, dtype, [18, 1, 128], [128, 1, 3, 18, 130], lambda dim: dim + 4)
    k = draw_values(draw, draw.choice([5, 0, 1, 40]), dim, dtype=dtype)
    return {"k": k, "slots": _draw_slots(draw, k.shape[0], cache.shape[0] * cache.shape[1]), "cache": cache}


def _written_rows(outputs, arguments):
    """What each row was written as, zeros for those without a slot."""
    pool, slots = outputs[0].flatten(0, 1), arguments["slots"]
    if not len(pool):
        return (pool.new_zeros(len(slots), pool.shape[1]),)
    return (pool[slots.long().clamp(min=0)].masked_fill(slots[:, None] < 0, 0),)


def _written_keys(outputs, arguments):
    """The same of a pool in which scales lie behind all codes of a page."""
    if outputs[0].dtype != torch.uint8:
        return _written_rows(outputs, arguments)
    codes, scale = indexer_rows(outputs[0], arguments["slots"])
    absent = arguments["slots"] < 0
    return codes.view(torch.uint8).masked_fill(absent[:, None], 0), scale.masked_fill(absent, 0)


def _own_slots(arguments):
    """No two rows have the same slot."""
    slots = arguments["slots"][arguments["slots"] >= 0]
    return len(slots.unique()) == len(slots)


def _register_write(name, draw, rows, outputs, in_rows):
    register(
        OpSpec(
            name, draw, bitwise=True, mutates=("cache",), rows=(rows, "slots"), outputs=outputs, in_rows=in_rows,
            independent=_own_slots,
        )
    )  # fmt: skip


_register_write("latent_cache_write", _draw_latent_cache_write, "rows", ("rows",), _written_rows)
_register_write("indexer_cache_write", _draw_indexer_cache_write, "k", ("rows", "rows"), _written_keys)
register(OpSpec("latent_cache_read", _draw_latent_cache_read, bitwise=True, rows=("slots",), outputs=("rows",)))
