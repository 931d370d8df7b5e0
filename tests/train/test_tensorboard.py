"""Event files are what TensorBoard reads; speed is counted from what really ran."""

import importlib.util
import math
import struct
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from glm5.report import read_metrics
from glm5.train.counts import Keys, token_flops
from glm5.train.loop import step_flops
from glm5.train.metrics import MetricsLog, machine_peak
from glm5.train.tensorboard import EventFile, crc32c, record
from tests.model import shapes
from tests.train.test_accumulation import Packs, small_model, stage_of_kind
from tests.train.test_run import carry_out, small_recipe


def read_events(folder) -> list[tuple[int, str, float]]:
    """(step, tag, value) of the one event file of a folder, read by another hand than the one that wrote it."""
    (path,) = folder.glob("events.out.tfevents.*")
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body = data[12 : 12 + length]
        assert record(body) == data[: 16 + length]
        events += scalars(body)
        data = data[16 + length :]
    return events


def fields(data: bytes) -> list[tuple[int, object]]:
    found = []
    while data:
        key, data = varint(data)
        kind = key & 7
        if kind == 0:
            value, data = varint(data)
        elif kind == 2:
            length, data = varint(data)
            value, data = data[:length], data[length:]
        else:
            size, form = {1: (8, "<d"), 5: (4, "<f")}[kind]
            value, data = struct.unpack(form, data[:size])[0], data[size:]
        found.append((key >> 3, value))
    return found


def varint(data: bytes) -> tuple[int, bytes]:
    end = next(i for i, byte in enumerate(data) if byte < 128) + 1
    return sum((byte & 127) << 7 * i for i, byte in enumerate(data[:end])), data[end:]


def scalars(event: bytes) -> list[tuple[int, str, float]]:
    said = dict(fields(event))
    values = [dict(fields(value)) for _, value in fields(said.get(5, b""))]
    return [(said[2], value[1].decode(), value[2]) for value in values]


def test_the_checksum_is_castagnolis():
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720
    assert crc32c(bytes(32)) == 0x8A9136AA


@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 1 << 40), st.dictionaries(st.text(max_size=300).filter(str.isprintable), st.floats(width=32))
        ),
        max_size=5,
    )
)
def test_scalars_come_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("events")
    file = EventFile(folder)
    for step, values in rows:
        file.write(step, values)
    file.close()
    want = [(step, tag, value) for step, values in rows for tag, value in values.items()]
    got = read_events(folder)
    assert [e[:2] for e in got] == [e[:2] for e in want]
    assert all(a == b or math.isnan(a) and math.isnan(b) for (*_, a), (*_, b) in zip(got, want, strict=True))


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_a_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 4):
        log.write(stage="pretrain", step=step, lm=1 / step)
    log.close()
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    events = read.Scalars("pretrain/lm")
    assert [(e.step, e.value) for e in events] == [(s, pytest.approx(1 / s)) for s in range(1, 4)]


def test_events_are_the_rows_after_a_resume_too(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate(0)
    log.write(stage="pretrain", step=1, lm=3.0, note="text")
    length = log.sync()
    log.write(stage="pretrain", step=2, lm=2.0)
    log.close()
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate(length)
    log.write(stage="sft", step=2, lm=1.5)
    log.write(about="no stage")
    log.close()
    assert read_events(tmp_path / "tensorboard") == [(1, "pretrain/lm", 3.0), (2, "sft/lm", 1.5)]


def test_wandb_gets_the_rows_or_is_missed_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="asks for wandb = 'mine', but wandb is not installed: pip install wandb"):
        MetricsLog(tmp_path / "metrics.jsonl", "mine")
    seen, begun = [], {}
    run = types.SimpleNamespace(log=seen.append, finish=lambda: seen.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: begun.update(options) or run))
    log = MetricsLog(tmp_path / "metrics.jsonl", "mine")
    log.write(stage="pretrain", step=4, lm=2.0)
    log.close()
    assert begun["project"] == "mine" and seen == [{"pretrain/lm": 2.0, "pretrain/step": 4}, "finished"]


class Products(TorchDispatchMode):
    """Counts 2 m n k of every matrix product that a forward makes."""

    def __init__(self, heads):
        super().__init__()
        self.heads, self.flops = heads, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in ("glm5::linear", "glm5::grouped_linear"):
            x, weight = args[:2]
            self.add(name, x.numel() // x.shape[-1] * x.shape[-1] * weight.shape[-2])
        elif name == "glm5::batched_linear":
            x, weight = args[:2]  # [T, heads, in], [heads, out, in]
            self.add(name, x.numel() * weight.shape[-2])
        elif name == "glm5::token_logprobs":
            hidden, head = args[:2]
            self.add(name, hidden.shape[0] * head.numel())
        elif name == "glm5::mla_attention":
            q, _, v, ks, ke = args[:5]
            self.add(name, int((ke - ks).sum()) * q.shape[1] * (q.shape[2] + v.shape[2]))
        elif name == "glm5::sparse_mla":
            q, _, indices, _, width = args[:5]
            self.add(name, int((indices >= 0).sum()) * q.shape[1] * (q.shape[2] + width))
        return func(*args, **(kwargs or {}))

    def add(self, name, products):
        self.flops[name] = self.flops.get(name, 0) + 2 * products


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_counted_operations_are_those_that_run(form, depth):
    """A forward without the indexer; training takes three times as many."""
    model, batch = shapes.model(vocab_size=320), Packs().batch(1, 3)
    model.attention = form
    selected = (batch.ke - batch.ks).clamp(max=model.config.index_topk)
    keys = Keys(float((batch.ke - batch.ks).double().mean()), float(selected.double().mean()))
    counted = token_flops(model.config, keys, attention=form, mtp_depth=depth)
    tokens = len(batch.tokens)
    with Products(model.config.num_attention_heads) as ran, torch.no_grad():
        model.losses(batch, mtp_depth=depth)
    products = dict(ran.flops)
    attention = products.pop("glm5::mla_attention", 0) + products.pop("glm5::sparse_mla", 0)
    assert 3 * attention == pytest.approx(tokens * counted[f"{form} attention"])
    counts = model.loss_counts(batch, mtp_depth=depth, indexer="none")
    kept = sum([counts["lm"], *counts["mtp"]])
    assert products.pop("glm5::token_logprobs") == 2 * kept * 320 * model.config.hidden_size
    rest = sum(products.values()) - indexer_projections(model, tokens, depth, form)
    assert 3 * rest == pytest.approx(tokens * (counted["projections"] + counted["experts"]))


def indexer_projections(model, tokens, depth, form):
    """They are counted as the indexer's."""
    if form == "dense":
        return 0
    c = model.config
    one = c.index_n_heads * (c.q_lora_rank * c.index_head_dim + c.hidden_size) + c.hidden_size * c.index_head_dim
    return 2 * tokens * one * (c.num_hidden_layers + depth)


def test_metrics_have_speed_and_its_share(tmp_path):
    recipe = small_recipe("stages.pretrain.micro_batches=2")
    carry_out(recipe, tmp_path, last="pretrain")
    rows = [r for r in read_metrics(tmp_path / "foundation" / "metrics.jsonl") if "lm" in r]
    for row in rows:
        assert row["flops_per_s"] > 0 and 0 < row["share_of_peak"] < 1
    ratio = [row["flops_per_s"] / row["share_of_peak"] for row in rows]
    assert max(ratio) == pytest.approx(min(ratio), rel=1e-2)
    tags = {tag for _, tag, _ in read_events(tmp_path / "foundation" / "tensorboard")}
    assert {"pretrain/lm", "pretrain/share_of_peak", "pretrain/gradient_norm", "pretrain/validation"} <= tags


def test_parts_are_as_many_operations_as_the_whole():
    stage = stage_of_kind("pretrain")
    model = small_model(stage)
    whole = step_flops(model, stage, [Packs().batch(0, 4)])
    assert step_flops(model, stage, [Packs().batch(part, 2) for part in range(2)]) == pytest.approx(whole)


def test_the_peak_is_measured_once_where_there_is_one():
    assert machine_peak(torch.float64, 1) == 0.0
    assert machine_peak(torch.bfloat16, 1) == machine_peak(torch.bfloat16, 1) > 1e9
