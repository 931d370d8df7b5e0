"""A killed `make build` or `make run` goes on when it is typed again, and ends as if nothing had happened."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glm5.recipes import load_recipe
from glm5.recipes.load import to_toml
from tests.train.test_run import STAGES, final_state

CHECKOUT = Path(__file__).parents[2]
NEEDED = "Makefile CMakeLists.txt setup.py pyproject.toml constraints.txt README.md LICENSE MANIFEST.in".split()
PATIENCE = 900  # seconds for any one command; a build takes about one minute on two cores


@pytest.fixture
def clone(tmp_path):
    """A folder with what a fresh clone has."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in NEEDED:
        shutil.copy(CHECKOUT / name, folder)
    for name in ("cmake", "csrc", "python"):
        shutil.copytree(CHECKOUT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    return folder


@pytest.fixture
def make(clone):
    """Starts make in the clone, as if nobody had called make before; what is still at work in the end is killed."""
    started = []

    def start(*arguments):
        mine = ("MAKE", "MFLAGS", "PYTHONPATH", "PIP_CONSTRAINT", "VIRTUAL_ENV", "GLM5_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
        command = ["make", f"PYTHON={sys._base_executable}", *arguments]
        with open(clone.parent / "make.log", "ab") as log:
            log.write(f"--- {' '.join(command)}\n".encode())
            started.append(
                subprocess.Popen(command, cwd=clone, env=environment, stdout=log, stderr=log, start_new_session=True)
            )
        return started[-1]

    yield start
    for process in started:
        kill(process)


def kill(process):
    """make and all its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def finish(process, clone):
    try:
        status = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        status = f"still at work after {PATIENCE} s"
    assert status == 0, f"{status}\n{log(clone)}"


def log(clone):
    return (clone.parent / "make.log").read_text(errors="replace")[-3000:]


@pytest.mark.slow
def test_build_goes_on_when_make_alone_is_killed(clone, make):
    # 1 to 25 s apart: in the set-up, while pip unpacks torch, while kernels compile. Its children work on, and the next make
    # waits for them.
    moments = random.Random(2026)
    for _ in range(3):
        process = make("build")
        time.sleep(moments.uniform(1, 25))
        process.kill()
        process.wait()

    finish(make("build"), clone)
    python = clone / ".venv/bin/python"
    subprocess.run([python, "-m", "pip", "check"], check=True)
    subprocess.run([clone / ".venv/bin/glm5", "doctor"], check=True, stdout=subprocess.DEVNULL)
    code = "import glm5._runtime, glm5.testing, sys; sys.exit(not glm5.testing.check('rms_norm', examples=2).ok)"
    subprocess.run([python, "-c", code], check=True)
    assert not list((clone / "python/glm5").glob(".*.so*")), "a temporary library was left behind"
    finish(make("build"), clone)


STEPS = 6
TINY_RUN = [
    "model.overrides.index_topk=16",
    *(
        f"stages.{stage}.{key}"
        for stage in STAGES
        for key in (f"steps={STEPS}", "sequence_length=128", "packs_per_step=2", "checkpoint_every=2", "validate_every=3")
    ),
    *(f"evaluation.{key}" for key in ("sequence_length=128", "packs=4", "sample_tokens=8")),
]

# What has just begun when this path appears, and within how many seconds after that the kill comes.
MOMENTS = [
    ("environment", ".venv/pyvenv.cfg", 1),
    ("build tools", ".venv/lib/*/site-packages/ninja*", 1),
    ("configuration", "build/cpython-*/CMakeCache.txt", 0.1),
    ("torch is unpacked, kernels are compiled", ".venv/lib/*/site-packages/torch", 6),
    ("kernels are compiled", "build/cpython-*/CMakeFiles/glm5_*/csrc/*/*.o", 8),
    ("bindings are compiled", "build/cpython-*/CMakeFiles/glm5_ops.dir/csrc/*/binding.cpp.o", 1),
    ("libraries are linked", "build/cpython-*/lib/libglm5_ops.so", 0),
    ("glm5 is installed", ".venv/lib/*/site-packages/glm5-*.dist-info", 0),
    ("the run's folder", "runs/*/recipe.toml", 1),
]
for stage in STAGES:
    checkpoints = "runs/*/checkpoints"
    MOMENTS += [
        (f"{stage}: a checkpoint is written", f"{checkpoints}/.tmp-{stage}-*", 0.02),
        (f"{stage}: it trains", f"{checkpoints}/{stage}-00000?", 0.1),
        (f"{stage}: its last checkpoint is written", f"{checkpoints}/.tmp-{stage}-{STEPS:06d}", 0.02),
        (f"{stage}: hand-over", f"{checkpoints}/{stage}-{STEPS:06d}", 0.2),
    ]
MOMENTS += [
    ("evaluations are written", "runs/*/evaluation.json", 0),
    ("the report is written", "runs/*/.tmp-report.html", 0),
]


def kill_at(process, clone, path, delay):
    """Kills `process` and its children `delay` seconds after `path` is made anew. False: it ended before."""
    began = time.time() - 0.01  # file times come from a coarser clock
    while process.poll() is None and time.time() - began < PATIENCE:
        for found in clone.glob(path):
            try:
                new = found.stat().st_ctime > began
            except FileNotFoundError:  # a temporary name
                continue
            if new:
                if delay:
                    time.sleep(delay)
                over = process.poll() is not None
                kill(process)
                return not over
        time.sleep(0.0002)
    return False


@pytest.mark.slow
def test_run_killed_in_every_phase_ends_with_the_same_bits(clone, make, tmp_path):
    recipe = tmp_path / "killed.toml"
    recipe.write_text(to_toml(load_recipe("foundation", ["name=killed", *TINY_RUN])))
    random_delay = random.Random(2026)
    missed = []
    for what, path, longest in MOMENTS:
        delay = random_delay.uniform(0, longest)
        # The report is written anew whenever a finished run is asked for, in an instant: more than one may be needed.
        if not any(kill_at(make("run", f"RECIPE={recipe}"), clone, path, delay) for _ in range(4)):
            missed.append(what)
    process = make("run", f"RECIPE={recipe}")  # make alone: its child works on, and the next make waits for it
    while process.poll() is None and "resuming" not in log(clone).rpartition("---")[2]:
        time.sleep(0.01)
    process.kill()
    finish(make("run", f"RECIPE={recipe}"), clone)
    ended = final_state(clone / "runs/killed")
    assert (clone / "runs/killed/report.html").read_text().rstrip().endswith("</html>")
    assert not missed, f"never killed while: {missed}\n{log(clone)}"

    # The same recipe without a kill, with the libraries of another build: this checkout's own.
    script = "import sys; from glm5.cli.main import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", script, "run", str(recipe), "--runs", str(tmp_path / "runs")]
    subprocess.run(command, env=environment, check=True, timeout=PATIENCE, stdout=subprocess.DEVNULL)
    assert ended == final_state(tmp_path / "runs/killed")
