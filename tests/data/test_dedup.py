"""Duplicates: what a set in memory would find, found on disk; similarities as they are, and a bounded memory's sort."""

import hashlib
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm5.data import dedup
from glm5.data.dedup import HELD_OUT, Deduplicator, SortedRuns


def digests(items: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(hashlib.sha256(x).digest()[:16] for x in items), "<u8").reshape(-1, 2)


def decide(folder, texts, held_out=None, exact=True, near=0.8, ids=None, batch=7):
    """{number: rule} of what is dropped."""
    folder.mkdir()
    found = Deduplicator(folder, exact, near)
    held_out = np.zeros(len(texts), bool) if held_out is None else np.array(held_out, bool)
    ids = digests([b"%d" % i for i in range(len(texts))]) if ids is None else ids
    for i in range(0, len(texts), batch):
        here = slice(i, i + batch)
        found.add(ids[here], digests(texts[here]), held_out[here], texts[here])
    duplicate = found.duplicate_ids()
    found.compare()
    drops = list(found.drops())
    found.close()
    assert drops == sorted(drops)
    return dict(drops) if duplicate is None else duplicate


def shingles(text: bytes) -> set:
    words = re.findall(rb"[A-Za-z0-9_]+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def similarity(a: bytes, b: bytes) -> float:
    a, b = shingles(a), shingles(b)
    return len(a & b) / max(1, len(a | b))


# ---- words and signatures ----


@given(st.text(max_size=300))
def test_words_are_those_of_the_text_without_case(text):
    raw = text.encode()
    begin, hashes = dedup.word_hashes(raw)
    words = re.findall(rb"[\xe0-\xff][A-Za-z0-9_\x80-\xdf]*|[A-Za-z0-9_\x80-\xdf]+", raw)
    assert len(words) == len(begin) == len(hashes)
    assert all(raw[b:].startswith(word) for b, word in zip(begin, words, strict=True))
    by_word = {}
    for word, value in zip(words, hashes.tolist(), strict=True):
        folded = bytes(b + 32 if 65 <= b <= 90 else b for b in word)
        assert by_word.setdefault(folded, value) == value
    assert len(set(by_word.values())) == len(by_word)


@given(st.lists(st.text(alphabet="ab c\n", max_size=120).map(str.encode), max_size=12), st.integers(16, 200))
def test_a_signature_does_not_depend_on_its_neighbours(texts, block):
    alone = [dedup.signatures([text]) for text in texts]
    together, meaningful = dedup.signatures(texts)
    for i, (table, means) in enumerate(alone):
        assert np.array_equal(table[0], together[i]) and means[0] == meaningful[i]
    assert [bool(shingles(text)) for text in texts] == meaningful.tolist()


def prose(rng, words):
    return [b"w%d" % n for n in rng.integers(0, 3000, words)]


def test_agreement_of_signatures_is_the_jaccard_similarity():
    rng, errors = np.random.default_rng(0), []
    for changed in np.linspace(0, 0.3, 120):
        words = prose(rng, 1500)
        other = [w if rng.random() > changed else b"new" for w in words]
        a, b = b" ".join(words), b" ".join(other)
        table, _ = dedup.signatures([a, b])
        errors.append((table[0] == table[1]).mean() - similarity(a, b))
    # 120 bins: at most sqrt(1/4 / 120) = 0.046 for one pair
    assert abs(np.mean(errors)) < 0.012 and np.std(errors) < 0.046


def test_a_long_text_is_compared_in_blocks(monkeypatch):
    monkeypatch.setattr(dedup, "BLOCK_BYTES", 1000)
    rng = np.random.default_rng(1)
    text = b" ".join(prose(rng, 4000))
    assert len(text) > 10_000
    table, _ = dedup.signatures([text, text, text[:500]])
    assert np.array_equal(table[0], table[1])
    monkeypatch.undo()
    whole, _ = dedup.signatures([text])
    assert (whole[0] == table[0]).mean() > 0.9  # but for the shingles over the edges


# ---- sorting ----


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 5) | st.integers(0, 2**64 - 1), st.integers(0, 9)), max_size=40), max_size=12
    ),
    st.integers(1, 60),
    st.integers(2, 9),
)
def test_runs_come_back_sorted(tmp_path_factory, parts, run_records, at_once):
    runs = SortedRuns(tmp_path_factory.mktemp("runs") / "runs", run_records)
    for part in parts:
        runs.add(np.array([k for k, _ in part], np.uint64), np.array([r for _, r in part], np.uint64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "_RUNS_AT_ONCE", at_once)
        blocks = list(runs.merged())
    runs.close()
    assert [tuple(pair) for block in blocks for pair in block.tolist()] == sorted(pair for part in parts for pair in part)


def test_a_merge_of_many_runs_holds_a_little_of_each(tmp_path):
    runs = SortedRuns(tmp_path / "runs", run_records=1024)
    count = dedup._RUNS_AT_ONCE + 20  # two passes
    for i in range(count):
        runs.add(np.random.default_rng(i).integers(0, 2**64, 1024, dtype=np.uint64), np.zeros(1024, np.uint64))
    sizes, last = [], 0
    for block in runs.merged():
        assert last <= block[0, 0] and (np.diff(block[:, 0].astype(object)) >= 0).all()
        sizes.append(len(block))
        last = block[-1, 0]
    assert sum(sizes) == count * 1024 and max(sizes) <= 1024
    assert sum(len(block) for block in runs.merged()) == count * 1024  # again
    runs.close()


# ---- decisions ----


@given(data=st.data(), exact=st.booleans(), run_records=st.integers(1, 40))
def test_exact_duplicates_are_those_a_set_would_find(tmp_path_factory, data, exact, run_records):
    numbers = data.draw(st.lists(st.integers(0, 6), max_size=40))
    texts = [b"text %d" % n for n in numbers]
    held_out = data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SortedRuns.__init__, "__defaults__", (run_records,))
        got = decide(tmp_path_factory.mktemp("d") / "d", texts, held_out, exact, near=0)
    train = {t for t, h in zip(texts, held_out, strict=True) if not h}
    expected, seen = set(), set()
    for side in (False, True):
        for i, (text, held) in enumerate(zip(texts, held_out, strict=True)):
            if held == side:
                if (exact and text in seen) or (held and text in train):
                    expected.add(i)
                seen.add(text)
    assert got == dict.fromkeys(sorted(expected), "exact_duplicate")


@pytest.fixture(scope="module")
def corpus():
    """Texts, each 30 to 2,000 words, some of them edited copies of earlier ones."""
    rng = np.random.default_rng(3)
    texts = []
    for _ in range(300):
        if texts and rng.random() < 0.5:
            words = texts[rng.integers(len(texts))].split()
            changed = rng.choice([0, 0.005, 0.01, 0.06, 0.06, 0.3])  # 0.06: similar to 0.58, which often meets in a band
            texts.append(b" ".join(w if rng.random() > changed else b"x%d" % rng.integers(99) for w in words))
        else:
            texts.append(b" ".join(prose(rng, int(rng.integers(30, 2000)))))
    return texts


def test_near_duplicates_are_the_similar_ones(corpus, tmp_path):
    got = decide(tmp_path / "d", corpus)
    sets = [shingles(text) for text in corpus]
    wrong = []
    for i in range(len(corpus)):
        nearest = max((len(sets[i] & sets[j]) / max(1, len(sets[i] | sets[j])) for j in range(i)), default=0)
        if (nearest > 0.93) != (i in got) and not 0.67 < nearest < 0.93:
            wrong.append((i, nearest))
    assert not wrong and len(got) > 50 and set(got.values()) == {"exact_duplicate", "near_duplicate"}


def test_decisions_do_not_depend_on_how_much_is_sorted_at_once(corpus, tmp_path):
    expected = decide(tmp_path / "a", corpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SortedRuns.__init__, "__defaults__", (500,))
        patch.setattr(dedup, "_PAIRS_AT_ONCE", 10)
        assert decide(tmp_path / "b", corpus, batch=64) == expected


def test_a_copy_leaves_the_held_out_side(tmp_path):
    rng = np.random.default_rng(5)
    words = prose(rng, 400)
    texts = [b" ".join(words), b" ".join([*words[:-1], b"other"])]
    assert decide(tmp_path / "a", texts, [True, False]) == {0: "near_duplicate"}
    assert decide(tmp_path / "b", texts, [False, True]) == {1: "near_duplicate"}
    assert decide(tmp_path / "c", [texts[0]] * 2, [True, False], exact=False, near=0) == {0: "exact_duplicate"}


def test_texts_of_few_shingles_are_compared_as_others_are(tmp_path):
    rng = np.random.default_rng(7)
    texts = [b" ".join(prose(rng, int(rng.integers(8, 40)))) for _ in range(150)]
    texts += [texts[0].upper().replace(b" ", b"  "), texts[1] + b"."]
    assert decide(tmp_path / "d", texts) == {150: "near_duplicate", 151: "near_duplicate"}


def test_short_texts_are_compared_exactly_alone(tmp_path):
    assert decide(tmp_path / "a", [b"one two three four", b"one two three  four", b"", b"!!", b"!"]) == {}


def test_equal_ids_are_found(tmp_path):
    ids = digests([b"a", b"b", b"c", b"b"])
    assert decide(tmp_path / "a", [b"1", b"2", b"3", b"4"], ids=ids, near=0) == (1, 3)
    half = ids.copy()
    half[3, 1] += 1  # half of the digest alone is equal
    assert decide(tmp_path / "b", [b"1", b"2", b"3", b"4"], ids=half, near=0) == {}
    assert HELD_OUT == 1 << 63
