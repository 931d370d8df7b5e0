"""Metrics survive a cut; schedules are functions of the step; progress shows speed."""

import errno
import io
import os

import pytest

from glm5.recipes import StageRecipe
from glm5.report import read_metrics
from glm5.train.metrics import MetricsLog, Progress
from glm5.train.schedule import lr_factor


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(step=1)
    length = log.sync()
    log.write(step=2)
    log._file.write(b'{"step": 3, "lo')  # the kill
    log.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    log = MetricsLog(path)
    log.truncate(length)
    log.write(step=2)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    with pytest.raises(ValueError, match="shorter than the checkpoint says"):
        log.truncate(10_000)


def test_a_full_disk_names_the_file(monkeypatch):
    log = MetricsLog("/dev/full")
    with pytest.raises(ValueError, match="cannot write /dev/full: No space left on device.*make room"):
        log.write(step=1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="cannot write /dev/full: No space left on device.*make room"):
        log.sync()
    log.close()  # the line that failed is not tried again: an error here would hide the first one


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_rise_to_one_and_end_at_their_end(schedule):
    stage = StageRecipe(kind="pretrain", steps=50, warmup_steps=10, final_lr=0.1, schedule=schedule)
    factors = [lr_factor(step, stage) for step in range(50)]
    assert factors[9] == 1.0 and abs(factors[-1] - 0.1) < 1e-12
    assert factors[:10] == sorted(factors[:10]) and factors[9:] == sorted(factors[9:], reverse=True)


def test_a_constant_schedule_is_constant():
    stage = StageRecipe(kind="dsa-sparse", steps=5, schedule="constant")
    assert {lr_factor(step, stage) for step in range(5)} == {1.0}


def test_progress_shows_losses_and_speed():
    out = io.StringIO()
    progress = Progress("pretrain", 4, out)
    progress.update(0, 100)
    for step in range(1, 5):
        speed = progress.update(step, 100, lm=2.0)
    assert speed > 0 and "4/4  lm 2.000" in out.getvalue() and "tokens/s" in out.getvalue()
