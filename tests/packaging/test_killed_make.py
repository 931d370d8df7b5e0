"""A killed `make build` goes on when it is typed again, and ends with a complete environment."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
NEEDED = "Makefile CMakeLists.txt setup.py pyproject.toml constraints.txt README.md LICENSE MANIFEST.in".split()


def make(folder, **options):
    return subprocess.Popen(["make", "build"], cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL, **options)


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False], ids=["make-and-children", "make-alone"])
def test_build_survives_kills(tmp_path, whole_group):
    for name in NEEDED:
        shutil.copy(CHECKOUT / name, tmp_path)
    for name in ("cmake", "csrc", "python"):
        shutil.copytree(CHECKOUT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))

    # 1 to 25 s apart: in the set-up, while pip unpacks torch, while kernels compile. Where make alone is killed its children
    # work on, and the next make waits for them.
    moments = random.Random(whole_group)
    for _ in range(3):
        process = make(tmp_path)
        time.sleep(moments.uniform(1, 25))
        if whole_group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()

    assert make(tmp_path).wait(timeout=600) == 0
    python = tmp_path / ".venv/bin/python"
    subprocess.run([python, "-m", "pip", "check"], check=True)
    subprocess.run([tmp_path / ".venv/bin/glm5", "doctor"], check=True, stdout=subprocess.DEVNULL)
    code = "import glm5._runtime, glm5.testing, sys; sys.exit(not glm5.testing.check('rms_norm', cases=2).ok)"
    subprocess.run([python, "-c", code], check=True)
    assert not list((tmp_path / "python/glm5").glob(".*.so*")), "a temporary library was left behind"
    assert subprocess.run(["make", "build"], cwd=tmp_path).returncode == 0, "nothing left to do"
