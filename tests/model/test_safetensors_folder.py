"""A folder of safetensors files: a write that stops leaves the old tensors or the new ones; shards are as large as asked."""

from pathlib import Path

import pytest
import torch

from glm5.model.safetensors_folder import SafetensorsFolder, TensorToWrite, write_safetensors
from tests.model.checkpoints import contents


def number(value: float) -> dict[str, TensorToWrite]:
    return {n: TensorToWrite((4,), torch.float32, lambda v=v: torch.full((4,), v)) for n, v in (("a", value), ("b", -value))}


def stored_number(folder: Path) -> float:
    with SafetensorsFolder(folder) as stored:
        a, b = stored.read("a")[0].item(), stored.read("b")[0].item()
    assert a == -b
    return a


@pytest.mark.parametrize("before", [10**9, 16], ids=["one file", "shards"])
@pytest.mark.parametrize("after", [10**9, 16], ids=["one file", "shards"])
def test_a_write_that_stops_anywhere_leaves_the_old_checkpoint_or_the_new_one(tmp_path, monkeypatch, before, after):
    class Stop(BaseException):
        pass

    seen = set()
    for stop_at in range(12):
        folder = tmp_path / str(stop_at)
        write_safetensors(folder, number(1.0), before)
        count = 0

        def stopping(real, stop_at=stop_at):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count > stop_at:
                    raise Stop
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "unlink"):
                patch.setattr(Path, name, stopping(getattr(Path, name)))
            try:
                write_safetensors(folder, number(2.0), after)
            except Stop:
                pass
        seen.add(stored_number(folder))
        write_safetensors(folder, number(3.0), after)
        assert stored_number(folder) == 3.0
        names = {p.name for p in folder.iterdir() if p.suffix == ".safetensors"}
        assert len(names) == (1 if after > 16 else 2)
    assert seen == {1.0, 2.0}


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    write_safetensors(tmp_path, number(1.0), 10**9)
    before = contents(tmp_path)

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("glm5.model.safetensors_folder.save_file", full)
    with pytest.raises(OSError, match="cannot write .*model.safetensors: .*No space left"):
        write_safetensors(tmp_path, number(2.0), 10**9)
    assert contents(tmp_path) == before


def test_progress_and_shard_sizes(tmp_path):
    told = []
    tensors = {f"t{i}": TensorToWrite((n,), torch.float32, lambda n=n: torch.zeros(n)) for i, n in enumerate([4, 4, 9, 2])}
    write_safetensors(tmp_path, tensors, 32, lambda done, total: told.append((done, total)))
    assert told == [(32, 76), (68, 76), (76, 76)]
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        write_safetensors(tmp_path, tensors, 0)
