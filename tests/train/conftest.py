"""Runs of one test session share the data that they build."""

import pytest

from glm5.data.build import default_folder
from glm5.train import run


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    return tmp_path_factory.mktemp("built")


@pytest.fixture(autouse=True, scope="session")
def shared_data(data_root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "default_folder", lambda recipe, runs: default_folder(recipe, data_root))
        yield
