"""Every script in examples/ runs, and says what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_and_back():
    pytest.importorskip("transformers.models.glm_moe_dsa", reason="needs: pip install -c constraints.txt transformers")
    out = run("transformers_and_back.py")
    differences = [float(part.split()[0]) for part in out.split("largest difference ")[1:]]
    assert len(differences) == 2 and max(differences) < 1e-4
    losses = [float(line.split(": ")[1].split()[0]) for line in out.splitlines() if line.startswith("step ")]
    assert losses[-1] < losses[0] - 0.5
    assert "generated the same 30 tokens: True" in out


def test_sparse_attention_module():
    out = run("sparse_attention_module.py")
    assert all(float(line.rsplit(" ", 1)[1]) < 1e-5 for line in out.splitlines() if "differ by" in line)
    losses = [float(line.rsplit(" ", 1)[1]) for line in out.splitlines() if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]


def test_every_example_is_tested():
    text = Path(__file__).read_text()
    assert all(f'"{path.name}"' in text for path in EXAMPLES.glob("*.py"))
