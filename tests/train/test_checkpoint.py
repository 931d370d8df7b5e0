"""Checkpoints: whole or not at all, damage found and named, the disk allowed to fill up."""

import errno
import json
import os

import pytest
import torch

from glm5._files import write_atomically
from glm5.train import checkpoint
from glm5.train.checkpoint import CheckpointError, CheckpointStore, Manifest

STAGES = ["pretrain", "dsa-warmup"]


def manifest(step, stage="pretrain"):
    return Manifest(stage, step, recipe="r", model="m", corpus="c", metrics_bytes=10 * step)


def files(step):
    return {"model": {"w": torch.full((3,), float(step)), "b": torch.tensor([1.5]).bfloat16()}, "muon": {}}


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", STAGES)
    for step in (2, 4):
        store.save(manifest(step), files(step))
    return store


def test_what_was_saved_comes_back(store):
    loaded, tensors = store.load_latest()
    assert (loaded.stage, loaded.step, loaded.metrics_bytes) == ("pretrain", 4, 40)
    assert torch.equal(tensors["model"]["w"], files(4)["model"]["w"]) and tensors["model"]["b"].dtype == torch.bfloat16
    assert tensors["muon"] == {}


def test_order_is_by_stage_then_step_and_old_ones_go(store):
    store.save(manifest(10), files(10))
    assert [p.name for p in store.list()] == ["pretrain-000004", "pretrain-000010"]
    store.save(manifest(1, "dsa-warmup"), files(1))
    assert [p.name for p in store.list()] == ["pretrain-000010", "dsa-warmup-000001"]
    assert store.load_latest()[0].stage == "dsa-warmup"


def flip_a_byte(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGE = {
    "flipped": flip_a_byte,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(store, file, damage):
    newest = store.path("pretrain", 4)
    DAMAGE[damage](newest / file)
    with pytest.raises(CheckpointError, match=file):
        store.load(newest)
    said = []
    loaded, tensors = store.load_latest(said.append)
    assert loaded.step == 2 and tensors["model"]["w"][0] == 2
    assert len(said) == 1 and str(newest / file) in said[0] and "pretrain-000002" in said[0]
    store.save(manifest(4), files(4))  # the run gets there again and replaces the damaged one
    assert store.load_latest(said.append)[0].step == 4 and len(said) == 1


def test_nothing_intact_is_an_error_and_nothing_at_all_is_not(store, tmp_path):
    for path in store.list():
        flip_a_byte(path / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors is damaged.*no intact checkpoint is left"):
        store.load_latest()
    assert CheckpointStore(tmp_path / "other", STAGES).load_latest() is None


def test_a_manifest_that_was_edited_is_found_out(store):
    path = store.path("pretrain", 4) / "manifest.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"step": 2}))
    with pytest.raises(CheckpointError, match="damaged"):
        store.load(store.path("pretrain", 4))


@pytest.mark.parametrize("fail_at", range(6))
def test_a_full_disk_says_so_and_harms_nothing(store, monkeypatch, fail_at):
    calls = {"count": 0}
    fsync = os.fsync

    def full(descriptor):
        calls["count"] += 1
        if calls["count"] > fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    before = {p: p.read_bytes() for p in store.folder.rglob("*") if p.is_file()}
    monkeypatch.setattr(os, "fsync", full)
    if fail_at < 4:  # two files, the manifest, the folder; then the rename, and only its flush can fail
        with pytest.raises(
            CheckpointError, match="pretrain-000006: No space left.*pretrain-000004, is untouched; make room"
        ):
            store.save(manifest(6), files(6))
        assert {p: p.read_bytes() for p in store.folder.rglob("*") if p.is_file()} == before
        assert not list(store.folder.glob(".tmp-*"))
    elif fail_at == 4:
        with pytest.raises(CheckpointError):
            store.save(manifest(6), files(6))
    else:
        store.save(manifest(6), files(6))
    monkeypatch.undo()
    assert store.load_latest()[0].step == (4 if fail_at < 4 else 6)


def test_a_write_to_a_real_full_device_is_reported(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_synced(type(tmp_path)("/dev/full"), b"x" * 10)


@pytest.mark.parametrize("stop_after", range(1, 8))
def test_killed_anywhere_in_a_save_the_store_still_opens(store, monkeypatch, stop_after):
    """A kill is an exception that no handler may clean up after: everything after it is skipped."""

    class Killed(BaseException):
        pass

    calls = {"count": 0}

    def counted(function):
        def call(*arguments, **keywords):
            calls["count"] += 1
            if calls["count"] >= stop_after:
                raise Killed
            return function(*arguments, **keywords)

        return call

    monkeypatch.setattr(checkpoint, "write_synced", counted(checkpoint.write_synced))
    monkeypatch.setattr(checkpoint, "sync_folder", counted(checkpoint.sync_folder))
    monkeypatch.setattr(checkpoint.Path, "rename", counted(checkpoint.Path.rename))
    try:
        store.save(manifest(6), files(6))
    except Killed:
        pass
    monkeypatch.undo()
    opened = CheckpointStore(store.folder, STAGES)
    assert not list(opened.folder.glob(".tmp-*"))
    loaded, tensors = opened.load_latest()
    assert loaded.step in (4, 6) and tensors["model"]["w"][0] == loaded.step


def test_a_reader_leaves_a_run_at_work_alone(store):
    leftover = store.folder / ".tmp-pretrain-000006"
    leftover.mkdir()
    assert CheckpointStore(store.folder, STAGES, writable=False).load_latest()[0].step == 4
    assert leftover.exists()


def test_write_atomically_keeps_the_old_text_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "evaluation.json"
    write_atomically(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*evaluation.json"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
