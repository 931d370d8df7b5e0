"""Batches: boundaries that everything respects, and draws that are a function of (seed, step)."""

import numpy as np
import pytest
import torch

from glm5.data import ByteTokenizer, CorpusError, PackedDataset, python_stdlib
from glm5.data.corpus import is_validation

IGNORED = -100


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 256, n).astype(np.uint8).tobytes() for n in [1, 2, 5, 60, 61, 62, 63, 64, 200, 0, 31, 700, 12, 40]
    ]


@pytest.fixture(scope="module")
def dataset(documents):
    return PackedDataset(documents, sequence_length=64, seed=3)


def everything(dataset):
    return dataset.collate(range(dataset.num_packs))


def test_every_token_of_every_document_appears_once(dataset, documents):
    batch = everything(dataset)
    real = torch.ones_like(batch.tokens, dtype=torch.bool)
    size = dataset.sequence_length
    for i, pack in enumerate(dataset._packs):
        real[i * size + pack.num_tokens : (i + 1) * size] = False
    tokenizer = ByteTokenizer()
    expected = np.concatenate([tokenizer.encode_document(d) for d in documents])
    assert np.array_equal(np.sort(batch.tokens[real].numpy()), np.sort(expected))
    # one token of each document, its end-of-text, has no target
    assert int((batch.targets != IGNORED).sum()) == len(expected) - len(documents)
    assert (batch.targets[~real] == IGNORED).all()


def test_keys_positions_and_targets_stay_inside_a_document(dataset):
    batch = everything(dataset)
    place = torch.arange(len(batch.tokens))
    assert torch.equal(batch.ke.long(), place + 1)
    assert torch.equal(batch.positions.long(), place - batch.ks)
    # a range never crosses the pack it lies in
    size = dataset.sequence_length
    assert torch.equal(batch.ks.long() // size, place // size)
    # inside a document the target is the next token; the last token of a piece has the next token of its file or none
    same = batch.ks[1:] == batch.ks[:-1]
    has = batch.targets[:-1] != IGNORED
    assert torch.equal(batch.targets[:-1][same & has], batch.tokens[1:][same & has])
    tokenizer = ByteTokenizer()
    assert (batch.tokens[:-1][same & ~has] == tokenizer.eos_id).all()


def test_a_cut_document_keeps_the_target_over_the_cut():
    text = bytes(range(100)) * 2
    dataset = PackedDataset([text], sequence_length=50, seed=0)
    batch = everything(dataset)
    pairs = set(zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True))
    whole = ByteTokenizer().encode_document(text).tolist()
    assert set(zip(whole, whole[1:], strict=False)) <= pairs


def test_a_batch_is_a_function_of_seed_and_step(documents):
    a, b = PackedDataset(documents, 64, seed=1), PackedDataset(documents, 64, seed=1)
    for step in (7, 0, 123456, 7):  # any order, any history
        first, second = a.batch(step, 4), b.batch(step, 4)
        assert all(
            torch.equal(getattr(first, f), getattr(second, f)) for f in ("tokens", "targets", "positions", "ks", "ke")
        )
    other = PackedDataset(documents, 64, seed=2)
    assert not torch.equal(a.batch(0, 4).tokens, other.batch(0, 4).tokens)


def test_an_epoch_visits_every_pack_once_and_epochs_differ(dataset):
    n = dataset.num_packs
    epochs = [torch.cat([dataset.batch(e * n + i, 1).tokens for i in range(n)]) for e in range(2)]
    all_tokens = everything(dataset).tokens.sort().values
    assert all(torch.equal(e.sort().values, all_tokens) for e in epochs)
    assert not torch.equal(*epochs)


def test_the_standard_library_is_found_and_split_by_file():
    corpus = python_stdlib(validation_one_in=20)
    size = sum(map(len, corpus.train)), sum(map(len, corpus.validation))
    assert size[0] > 5e6 and 0.01 < size[1] / sum(size) < 0.2
    assert corpus.digest == python_stdlib(validation_one_in=20).digest
    assert not set(corpus.train) & set(corpus.validation)


def test_a_file_keeps_its_side_when_others_come_and_go(tmp_path):
    names = [f"m{i}.py" for i in range(60)]
    for name in names:
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "t.py").write_text("# a test")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    before = python_stdlib(5, root=tmp_path)
    assert sorted(before.validation) == sorted(f"# {n}".encode() for n in names if is_validation(n, 5))
    assert len(before.train) + len(before.validation) == len(names)
    (tmp_path / "m3.py").unlink()
    after = python_stdlib(5, root=tmp_path)
    assert set(after.validation) <= set(before.validation) and set(after.train) <= set(before.train)
    assert after.digest != before.digest


def test_a_copy_of_a_train_file_is_not_validated_on(tmp_path):
    names = [f"m{i}.py" for i in range(60)]
    for name in names:
        (tmp_path / name).write_text(f"# {name}")
    held_out = [n for n in names if is_validation(n, 5)]
    trained = next(n for n in names if not is_validation(n, 5))
    (tmp_path / held_out[0]).write_text(f"# {trained}")
    corpus = python_stdlib(5, root=tmp_path)
    assert not set(corpus.train) & set(corpus.validation) and len(corpus.validation) == len(held_out) - 1


def test_what_cannot_be_read_as_a_file_is_left_out(tmp_path):
    for i in range(60):
        (tmp_path / f"m{i}.py").write_text(f"# {i}")
    before = python_stdlib(5, root=tmp_path)
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "folder.py").mkdir()
    assert python_stdlib(5, root=tmp_path) == before


def test_an_empty_corpus_says_what_to_install(tmp_path):
    with pytest.raises(CorpusError, match="libpython3-stdlib"):
        python_stdlib(root=tmp_path)


def test_special_tokens_cannot_be_spelled_in_text():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("a <|endoftext|> π")
    assert ids.max() < 256 and tokenizer.decode(ids) == "a <|endoftext|> π"
    document = tokenizer.encode_document("x")
    assert tokenizer.decode(document, skip_special=False) == "[gMASK]<sop>x<|endoftext|>"
    assert tokenizer.decode([97, 255, tokenizer.vocab_size]) == "a\ufffd\ufffd"
    with pytest.raises(ValueError, match="-1 is negative"):
        tokenizer.decode([-1])


@pytest.mark.parametrize("arguments, message", [(([], 8, 0), "empty"), (([b"a"], 1, 0), "sequence_length")])
def test_bad_datasets(arguments, message):
    with pytest.raises(ValueError, match=message):
        PackedDataset(*arguments)
