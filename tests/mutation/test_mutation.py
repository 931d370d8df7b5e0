"""The conformance kit finds what is wrong with a kernel, and says of what kind it is."""

import os
import subprocess
import sys

import pytest

from glm5 import _native
from tests.mutation import compiled
from tests.mutation.judge import judge
from tests.mutation.wrappers import WRAPPERS


@pytest.mark.unsanitized
@pytest.mark.parametrize("fault", WRAPPERS, ids=lambda f: f"{f.op}: {f.name}")
def test_each_wrapper_is_found_by_the_property_named_for_it(fault):
    _, complaint = judge(fault, fault.function)
    assert not complaint, complaint


def test_every_property_has_a_fault_of_its_own_and_there_are_enough():
    from glm5.testing import PROPERTIES

    faults = [*WRAPPERS, *compiled.FAULTS]
    assert {f.found_by for f in faults} == set(PROPERTIES)
    assert len(faults) >= 25 and len(compiled.FAULTS) >= 15
    assert all(f.why for f in faults if f.also)


def test_the_text_of_every_compiled_fault_is_in_its_file():
    assert not (lost := compiled.missing()), f"edit tests/mutation/compiled.py: it replaces what is no longer there: {lost}"


def test_the_library_that_users_get_knows_no_fault():
    library = _native.library_path.read_bytes()
    assert b"glm5_fault" not in library and b"glm5_choose_fault" not in library


@pytest.mark.slow
def test_each_compiled_fault_is_found_by_the_property_named_for_it():
    subprocess.run([sys.executable, "setup.py", "--quiet", "build_faulty"], check=True, cwd=compiled.ROOT)
    environment = {**os.environ, "GLM5_LIBRARY_DIR": str(compiled.ROOT / "build/faulty/lib")}
    environment.pop("GLM5_CPU_ISA", None)
    judged = subprocess.run(
        [sys.executable, "-m", "tests.mutation.judge"], cwd=compiled.ROOT, env=environment, capture_output=True, text=True
    )
    assert judged.returncode == 0, judged.stdout + judged.stderr
