"""glm5 doctor, and the dispatcher it hangs on."""

import os
import subprocess
import sys

import pytest

from glm5.cli import main as dispatcher
from glm5.cli.doctor import op_kernels


def glm5(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "glm5.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment},
    )


def test_every_op_has_a_cpu_kernel_and_a_fake_one():
    table = op_kernels()
    assert "rms_norm" in table
    lacking = [(op, kind) for op, kernels in table.items() for kind in ("CPU", "fake") if not kernels[kind]]
    assert not lacking


def test_doctor_names_versions_sets_and_ops():
    report = glm5("doctor", GLM5_CPU_ISA="portable")
    assert report.returncode == 0, report.stderr
    for words in ("torch ", "threads ", "in use    portable  (GLM5_CPU_ISA is portable)", "rms_norm_backward"):
        assert words in report.stdout


def test_doctor_says_what_becomes_of_large_outputs_memory():
    assert (
        "memory    of large outputs is given back at once (GLM5_KEEP_MEMORY is 0)"
        in glm5("doctor", GLM5_KEEP_MEMORY="0").stdout
    )


def test_doctor_says_what_is_wrong_with_the_instruction_set():
    report = glm5("doctor", GLM5_CPU_ISA="mmx")
    assert report.returncode == 1
    assert "got 'mmx', want one of portable, avx2, avx512, amx" in report.stdout


@pytest.mark.parametrize("error", [ValueError("recipe: no such key"), OSError("disk full")])
def test_a_mistake_ends_in_one_line(monkeypatch, capsys, error):
    def fail(args):
        raise error

    monkeypatch.setattr("glm5.cli.doctor.run", fail)
    assert dispatcher.main(["doctor"]) == 1
    assert capsys.readouterr().err.startswith(f"glm5 doctor: {error}")
    monkeypatch.setenv("GLM5_TRACEBACK", "1")
    with pytest.raises(type(error)):
        dispatcher.main(["doctor"])


def test_an_unknown_command_lists_the_known_ones():
    report = glm5("juggle")
    assert report.returncode == 2
    assert "juggle" in report.stderr and "doctor" in report.stderr


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"set -o pipefail; {sys.executable} -m glm5.cli doctor | head -1"
    report = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert (report.returncode, report.stderr) == (0, "")
