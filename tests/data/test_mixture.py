"""The loader: every document once an epoch, quotas, boundaries, draws that depend on no history."""

import shutil
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5.data import ByteTokenizer, DataError, DataWriter, MixedDataset, mixture
from glm5.data.mixture import MIX_PERIOD, mix_shares
from glm5.data.random import Order, generator
from tests.data.folders import random_text, text_folder

IGNORED, SIZE = -100, 64
FIELDS = ("tokens", "targets", "positions", "ks", "ke")
EOS = ByteTokenizer().eos_id


@pytest.fixture(scope="module", autouse=True)
def small_windows():
    """Several windows an epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "WINDOW_PIECES", 20)
        patch.setattr(mixture, "_DOCUMENTS_AT_ONCE", 7)
        yield


@cache
def folder():
    """Documents of many lengths in "code" and "web", conversations with masks in "chat", one sort of length in "even"."""
    rng, root = np.random.default_rng(0), Path(tempfile.mkdtemp())
    with DataWriter(root / "data", ByteTokenizer(), shard_tokens=1 << 11) as writer:
        add = lambda domain, n, **more: writer.add(domain, ByteTokenizer().encode_document(random_text(rng, n)), **more)  # noqa: E731
        for n in [1, 2, 5, 60, 61, 62, 63, 64, 200, 0, 31, 700, 12, 40] * 3:
            add("code", n)
        for n in rng.integers(1, 300, 25):
            add("web", int(n))
        for n in rng.integers(1, 150, 40):
            add("chat", int(n), mask=rng.integers(0, 2, n + 3) | (np.arange(n + 3) == 5))
        for _ in range(50):
            add("even", 30)
        data = writer.finish()
    data.root = root
    return data


def teardown_module():
    shutil.rmtree(folder().root)


def dataset(mix=None, size=SIZE, seed=3, **more):
    return MixedDataset(folder(), mix or {"code": 1.0}, size, seed, **more)


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, field), getattr(b, field)) for field in FIELDS)


def epoch(dataset, number=0, limit=10**6):
    """The numbers of the packs of one epoch of a dataset with one domain."""
    packs = dataset._domains[0]
    first = next(g for g in range(limit) if packs.epoch_of(g) >= number)
    return range(first, next(g for g in range(first, limit) if packs.epoch_of(g) > number))


def pieces(batch):
    """Token ids and targets of every run that attention sees as one document, padding too."""
    starts = batch.ks.unique().tolist()
    for begin, end in zip(starts, [*starts[1:], len(batch.tokens)], strict=True):
        yield batch.tokens[begin:end].tolist(), batch.targets[begin:end].tolist()


def documents(domain):
    """{tuple of ids: how often} of a domain."""
    domain = folder().domain(domain)
    return Counter(tuple(domain.tokens(i).tolist()) for i in range(domain.num_documents))


# ---- quotas

mixes = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.5, 100), min_size=1, max_size=6)


@given(mixes)
def test_every_domain_is_always_within_a_pack_of_its_due(mix):
    shares = mix_shares(mix)
    assert sum(shares.values()) == MIX_PERIOD and list(shares) == sorted(mix)
    for name, weight in mix.items():
        assert abs(shares[name] - MIX_PERIOD * weight / sum(mix.values())) < 1
    quotas = mixture._Quotas(list(shares.values()))
    domains = np.array([quotas.place(g)[0] for g in range(MIX_PERIOD + 10)])
    for d, share in enumerate(quotas.shares):
        counts = np.cumsum(domains == d)
        assert (np.abs(counts - np.arange(1, len(counts) + 1) * share / MIX_PERIOD) < 1).all()


@given(mixes, st.integers(0, 10**12))
def test_a_place_counts_the_packs_of_its_domain(mix, first):
    quotas = mixture._Quotas(list(mix_shares(mix).values()))
    found = [quotas.place(g) for g in range(first, first + 300)]
    for d in range(len(mix)):
        mine = [place for domain, place in found if domain == d]
        assert mine == list(range(mine[0], mine[0] + len(mine))) if mine else True
    assert all(quotas.place(g)[1] == sum(quotas.place(h)[0] == quotas.place(g)[0] for h in range(g)) for g in range(30))


@given(st.integers(1, 5000), st.integers(0, 2**32 - 1), st.integers(0, 9), st.integers(0, 2**64 - 1))
def test_an_order_is_a_permutation(length, seed, index, of):
    order = Order(seed, 4, index, length, of)
    whole = order[np.arange(length)]
    assert np.array_equal(np.sort(whole), np.arange(length))
    some = np.arange(0, length, 3)
    assert np.array_equal(order[some], whole[some])
    if length > 50:
        assert not np.array_equal(whole, Order(seed, 4, index + 1, length, of)[np.arange(length)])


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), min_size=2, max_size=5, unique=True))
def test_every_index_and_owner_has_a_stream_of_its_own(counters):
    drawn = [generator(7, 4, index, of).integers(0, 1 << 64, 4, dtype=np.uint64).tolist() for index, of in counters]
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])
    for (index, of), numbers in zip(counters, drawn, strict=True):
        philox = np.random.Philox(key=[7, 4], counter=index << 128 | of << 192)  # one integer of 256 bits
        assert philox.random_raw(4).tolist() == numbers


def test_an_order_is_about_uniform():
    """Each item in each of eight places, over many rounds: chi^2 with 49 degrees of freedom."""
    counts = np.zeros((8, 8))
    for index in range(4000):
        counts[np.arange(8), Order(0, 4, index, 8)[np.arange(8)]] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 90


# ---- documents in packs


@pytest.mark.parametrize("domain", ["code", "web"])
@pytest.mark.parametrize("number", [0, 1])
def test_an_epoch_has_every_token_of_every_document_once(domain, number):
    """Pieces put together again are the documents, and every token but a document's last one has its target."""
    data = dataset({domain: 1.0})
    batch = data.collate(epoch(data, number))
    want = documents(domain)
    cut = Counter()
    for ids, times in want.items():
        for i in range(0, len(ids), SIZE):
            cut[ids[i : i + SIZE], (*ids[i + 1 : i + SIZE + 1], IGNORED)[: len(ids[i : i + SIZE])]] += times
    found = Counter((tuple(ids), tuple(targets)) for ids, targets in pieces(batch))
    padding = {key: times for key, times in found.items() if set(key[0]) == {EOS} and set(key[1]) == {IGNORED}}
    for key in padding:
        found[key] = cut[key]
    assert +found == +cut


@pytest.mark.parametrize("mix", [{"code": 1.0}, {"code": 1.0, "web": 2.0, "chat": 1.0}])
def test_keys_and_positions_stay_inside_a_document_and_a_pack(mix):
    batch = dataset(mix).batch(3, 40)
    place = torch.arange(len(batch.tokens))
    assert torch.equal(batch.ke.long(), place + 1)
    assert torch.equal(batch.positions.long(), place - batch.ks)
    assert torch.equal(batch.ks.long() // SIZE, place // SIZE)
    assert (batch.tokens.dtype, batch.positions.dtype, batch.ks.dtype) == (torch.int64, torch.int32, torch.int32)


def test_packs_are_well_filled():
    data = dataset({"web": 1.0})
    tokens, packs = folder().domain("web").num_tokens, len(epoch(data))
    assert tokens / SIZE <= packs <= 1.25 * tokens / SIZE + 2


def test_conversations_stay_whole_and_only_their_masked_tokens_are_targets():
    """One that is too long keeps its beginning."""
    data, domain = dataset({"chat": 1.0}, size=100), folder().domain("chat")
    want = Counter()
    for i in range(domain.num_documents):
        ids, counts = domain.tokens(i).tolist(), domain.mask(i).tolist()
        targets = [t if c else IGNORED for t, c in zip(ids[1:], counts[1:], strict=True)] + [IGNORED]
        want[tuple(ids[:100]), tuple(targets[:100])] += 1
    assert any(len(ids) == 100 for ids, _ in want) and any(len(ids) < 100 for ids, _ in want)
    found = Counter((tuple(i), tuple(t)) for i, t in pieces(data.collate(epoch(data))) if set(t) != {IGNORED})
    assert found == want


def test_a_conversation_whose_beginning_teaches_nothing_is_left_out(tmp_path):
    with DataWriter(tmp_path / "d", ByteTokenizer()) as writer:
        for i, n in enumerate((20, 50, 50, 17)):
            mask = np.arange(n) == (16, 10, 20, 16)[i]  # of 16 tokens the last one's target is number 16
            writer.add("chat", np.full(n, i, np.int32), mask=mask)
        writer.add("late", np.zeros(50, np.int32), mask=np.arange(50) > 40)
        data = writer.finish()
    loader = MixedDataset(data, {"chat": 1.0}, 16, 0)
    batch = loader.collate(epoch(loader))
    assert sorted(batch.tokens.unique().tolist()) == [0, 1, 3]
    assert batch.targets[batch.targets != IGNORED].sort().values.tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match="domain late has nothing to train on: no conversation .* among its first 16"):
        MixedDataset(data, {"late": 1.0}, 16, 0).batch(0, 1)


# ---- draws


@given(
    st.integers(1, 9), st.integers(0, 40), st.integers(0, 100), st.integers(1, 8), st.sampled_from([0.0, 0.7]), st.booleans()
)
def test_ranks_together_have_the_global_batch_whatever_their_number(packs, step, first, world, power, mixed):
    """And no history decides: every rank is a new dataset that jumps there."""
    mix = {"code": 2.0, "web": 1.0, "chat": 0.5} if mixed else {"web": 1.0}
    world, more = min(world, packs), dict(long_document_power=power)
    whole = dataset(mix, **more).batch(step, packs, first)
    shares = [dataset(mix, rank=rank, world_size=world, **more).batch(step, packs, first) for rank in range(world)]
    assert torch.equal(torch.cat([share.tokens for share in shares]), whole.tokens)
    assert torch.equal(torch.cat([share.targets for share in shares]), whole.targets)
    assert torch.equal(torch.cat([share.positions for share in shares]), whole.positions)
    offset = np.cumsum([0] + [len(share.tokens) for share in shares])
    for name in ("ks", "ke"):
        assert torch.equal(
            torch.cat([getattr(s, name) + int(o) for s, o in zip(shares, offset, strict=False)]), getattr(whole, name)
        )
    assert max(map(len, (s.tokens for s in shares))) - min(map(len, (s.tokens for s in shares))) <= SIZE


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.sampled_from([0.0, 1.0]))
def test_a_batch_depends_on_no_earlier_one(steps, power):
    mix = {"code": 1.0, "chat": 1.0}
    used = dataset(mix, long_document_power=power)
    for step in steps:
        assert same(used.batch(step, 3), dataset(mix, long_document_power=power).batch(step, 3))


def test_steps_of_another_size_and_start_are_cut_from_the_same_row():
    data = dataset({"code": 1.0, "web": 1.0})
    packs = torch.cat([data.batch(i, 4).tokens for i in range(6)])
    assert torch.equal(packs, data.batch(0, 24).tokens)
    assert torch.equal(packs[5 * SIZE :], torch.cat([data.batch(i, 1, 5).tokens for i in range(19)]))


def test_the_order_and_the_scale_of_weights_mean_nothing():
    mixes = [{"code": 1.0, "web": 3.0}, {"web": 3.0, "code": 1.0}, {"web": 0.6, "code": 0.2}]
    first, *others = [dataset(mix).batch(0, 30) for mix in mixes]
    assert all(same(first, other) for other in others)


def test_seed_epoch_and_domain_decide_the_order():
    base, data = dataset(), dataset(seed=4)
    assert not torch.equal(base.batch(0, 9).tokens, data.batch(0, 9).tokens)
    first, second = (base.collate(epoch(base, n)) for n in (0, 1))
    assert not torch.equal(first.tokens[: 9 * SIZE], second.tokens[: 9 * SIZE])


def test_held_out_packs_are_those_of_one_epoch():
    data = dataset({"web": 1.0})
    packs = len(epoch(data))
    assert data.num_packs(at_most=10**6) == packs and data.num_packs(at_most=3) == 3
    both = dataset({"web": 1.0, "even": 1.0})
    count = both.num_packs(10**6)
    seen = [both._domains[d].epoch_of(p) for d, p in map(both._mix.place, range(count + 1))]
    assert not any(seen[:-1]) and seen[-1] == 1


# ---- long documents


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_documents_come_in_proportion_to_a_power_of_their_length(power):
    epochs, domain = 60, folder().domain("web")
    data = dataset({"web": 1.0}, long_document_power=power)
    last = next(g for g in range(10**6) if data._domains[0].epoch_of(g) >= epochs)
    starts = Counter(tuple(ids[:4]) for ids, _ in pieces(data.collate(range(last))) if ids[:2] == [258, 260])
    longest = max(domain.lengths[:])
    for i in range(domain.num_documents):
        due = epochs * (domain.lengths[i] / longest) ** power
        assert abs(starts[tuple(domain.tokens(i)[:4].tolist())] - due) < 1


def test_a_power_of_zero_and_equal_lengths_change_nothing():
    even = [dataset({"even": 1.0}, long_document_power=power).batch(0, 30) for power in (0.0, 1.0)]
    assert same(*even)


# ---- memory


def test_what_is_held_does_not_grow_with_the_domain(tmp_path):
    """Two windows, and four numbers for each window that was passed."""
    data = text_folder(tmp_path / "d", code=[b"x" * 20] * 2000)
    loader = MixedDataset(data, {"code": 1.0}, 32, 0)
    loader.batch(1500, 1)
    packs = loader._domains[0]
    assert len(packs._held) == 2 and all(len(window.spans) == 20 for window in packs._held.values())
    assert len(packs._ends) == 76 and len(packs._begins) == 77


# ---- bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(size=1), "sequence_length is 1, want at least 2"),
        (dict(rank=2, world_size=2), "rank is 2 and world_size 2"),
        (dict(long_document_power=-1.0), "long_document_power is -1.0"),
        (dict(long_document_power=float("nan")), "long_document_power is nan"),
        (dict(mix={"code": 0.0}), "weights above zero"),
        (dict(mix={"code": float("inf")}), "weights above zero"),
        (dict(mix={"code": 1.0, "web": 1e-9}), "mix gives web a share below 1 / 4096"),
        (dict(mix={"core": 1.0}), "no domain 'core'; it has chat, code, even, web"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises((ValueError, DataError), match=message):
        dataset(**changes)


def test_an_empty_mix_and_too_many_ranks():
    with pytest.raises(ValueError, match="weights above zero"):
        MixedDataset(folder(), {}, SIZE, 0)
    with pytest.raises(ValueError, match="2 packs a step for 4 ranks"):
        dataset(world_size=4).batch(0, 2)
