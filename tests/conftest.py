"""Shared fixtures: one thread, every instruction set this processor has, fixed seeds."""

import os

import hypothesis
import pytest
import torch

from glm5 import _native

hypothesis.settings.register_profile("default", deadline=None, max_examples=20, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("few", hypothesis.settings.get_profile("default"), max_examples=3)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# With a busy neighbour two threads can be ten times slower than one.
torch.set_num_threads(1)


@pytest.fixture(params=_native.available_isas())
def isa(request):
    """Runs the test once on each instruction set."""
    with _native.using_cpu_isa(request.param):
        yield request.param
