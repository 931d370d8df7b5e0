"""glm5 check: the verdicts, the exit status, and what it says to those who ask for what is not there."""

import pytest

from glm5.cli.main import main

KERNELS = """
import torch
from glm5 import reference

calls = 0

def rms_norm(x, weight, eps=1e-5):
    return reference.rms_norm(x, weight, eps)

def base_two(q, kv, indices, scale, d_v):
    out, lse = reference.sparse_mla(q, kv, indices, scale, d_v)
    return out, lse * 1.4426950408889634

class group:
    rms_norm = staticmethod(rms_norm)
"""


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_kernels.py").write_text(KERNELS)
    (tmp_path / "broken_kernels.py").write_text("import not_there_at_all")


def test_ours_passes(capsys):
    assert main(["check", "rms_norm", "silu_mul", "--examples", "2"]) == 0
    shown = capsys.readouterr().out
    assert "rms_norm: keeps its promises" in shown and "silu_mul: keeps its promises" in shown
    assert "ties            -       does not apply: it chooses nothing" in shown


def test_a_wrong_kernel_fails_and_its_inputs_can_be_drawn_again(kernels, capsys):
    arguments = ["--impl", "my_kernels:base_two", "--dtype", "fp32", "--property", "accuracy", "--examples", "3"]
    assert main(["check", "sparse_mla", *arguments, "--seed", "5"]) == 1
    shown = capsys.readouterr().out
    assert "my_kernels:base_two on cpu, float32" in shown and "sparse_mla: fails accuracy" in shown
    assert "accuracy        FAILED  3 of 3 examples" in shown and "output 1: relative error 0.4" in shown

    import torch

    from glm5.testing import example

    assert "seed 5, float32" in shown and "example('sparse_mla', 'accuracy', torch.float32, seed=5)" in shown
    again, twice = (example("sparse_mla", "accuracy", torch.float32, seed=5) for _ in range(2))
    assert torch.equal(again["q"], twice["q"]) and torch.equal(again["indices"], twice["indices"])


def test_a_name_inside_a_class_is_found(kernels):
    arguments = ["--impl", "my_kernels:group.rms_norm", "--dtype", "float32", "--property", "accuracy"]
    assert main(["check", "rms_norm", *arguments]) == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["no_such_op"], "no spec for op 'no_such_op'; it knows"),
        (["rms_norm", "--property", "speed"], "no property 'speed'; there are accuracy, gradient"),
        (["rms_norm", "--dtype", "float7"], "--dtype is 'float7', want the name of a torch dtype"),
        (["rms_norm", "--dtype", "int8"], "want one that rms_norm is specified in"),
        (["rms_norm", "--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
        (["rms_norm", "--examples", "0"], "examples is 0, want at least 1"),
        (["rms_norm", "--impl", "my_kernels"], "want MODULE:FUNCTION"),
        (["rms_norm", "--impl", "my_kernels:nothing"], "my_kernels has no 'nothing'"),
        (["rms_norm", "--impl", "my_kernels:calls"], "my_kernels:calls is int, want a callable"),
        (["rms_norm", "--impl", "nowhere:f"], "importing nowhere failed: ModuleNotFoundError"),
        (["rms_norm", "--impl", "broken_kernels:f"], "No module named 'not_there_at_all'"),
        (["rms_norm", "silu_mul", "--impl", "my_kernels:rms_norm"], "--impl is one op's, but there are 2"),
    ],
)
def test_what_is_not_there_is_named(kernels, capsys, arguments, words):
    assert main(["check", *arguments]) == 1
    shown = capsys.readouterr()
    assert words in shown.err and not shown.out
