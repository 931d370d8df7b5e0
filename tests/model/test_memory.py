"""Weights stream: what reading, writing and converting a checkpoint hold at once, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm5 import Glm5Config, Glm5ForCausalLM

SHARD = 8_000_000
SLACK = 6_000_000  # of the allocator
SHAPE = dict(
    hidden_size=256,
    intermediate_size=1024,
    moe_intermediate_size=256,
    n_routed_experts=32,
    num_nextn_predict_layers=0,
    vocab_size=2048,
)

MEASURE = """
import re, sys
from pathlib import Path
from glm5 import Glm5ForCausalLM
from glm5.model.conversion import convert_checkpoint

small, source, target, what = sys.argv[1:]

def measured(work):
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is the present
    before = highest()
    work()
    print(highest() - before)

def highest():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def load(folder):
    return Glm5ForCausalLM.from_pretrained(folder)

load(small).save_pretrained(target + "-small")  # what is imported late is there
convert_checkpoint(small, target + "-small", "fp8")
if what == "load":
    measured(lambda: load(source))
elif what == "save":
    model = load(source)
    measured(lambda: model.save_pretrained(target, max_shard_bytes=8_000_000))
else:
    measured(lambda: convert_checkpoint(source, target, what, max_shard_bytes=8_000_000))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(a small directory, one of 18 shards, its bytes)."""
    folder = tmp_path_factory.mktemp("memory")
    Glm5ForCausalLM(Glm5Config.preset("tiny")).save_pretrained(folder / "small")
    model = Glm5ForCausalLM(Glm5Config.preset("tiny", **SHAPE, num_hidden_layers=6))
    model.save_pretrained(folder / "large", max_shard_bytes=SHARD)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert len(list((folder / "large").glob("*.safetensors"))) > 15 and size > 12 * SHARD
    return folder / "small", folder / "large", size


FUSED = 4 * 32 * 2 * 256 * 256  # the largest tensor of the native form


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs: Linux's /proc/self/clear_refs")
@pytest.mark.parametrize(
    "what, model, beside",
    [("load", 1, SHARD), ("save", 0, SHARD), ("hf", 0, 2 * SHARD), ("fp8", 0, 2 * SHARD), ("native", 0, FUSED + SHARD)],
)
def test_weights_stream(tmp_path, checkpoint, what, model, beside):
    small, large, size = checkpoint
    command = [sys.executable, "-c", MEASURE, str(small), str(large), str(tmp_path / "out"), what]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back, with no holes to hold it
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert 0.9 * model * size <= peak <= model * size + beside + SLACK
