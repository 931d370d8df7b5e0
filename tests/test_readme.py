"""What the README shows works as it stands there."""

import re
from pathlib import Path

import pytest

from glm5 import Glm5Config, Glm5ForCausalLM

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", README + (ROOT / "docs/transformers.md").read_text(), flags=re.DOTALL)
)
def test_its_python_runs(code, tmp_path, monkeypatch):
    if "transformers import Glm" in code:
        pytest.importorskip("transformers.models.glm_moe_dsa", reason="needs: pip install -c constraints.txt transformers")
    if '"directory"' in code:
        config = Glm5Config.preset("tiny", num_hidden_layers=2, num_nextn_predict_layers=0)
        Glm5ForCausalLM(config).save_pretrained(tmp_path / "directory")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_its_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][\w-]*)", README)) <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link
