"""docs/bring-your-own-kernel.md: its files, its code and its commands do what the page shows."""

import re
import sys
from pathlib import Path

import pytest

from glm5.cli.main import main

PAGE = (Path(__file__).parents[1] / "docs/bring-your-own-kernel.md").read_text()
FILES = re.findall(r"```python (\S+)\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = re.findall(r"```console\n\$ glm5 (.*?)\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name, code in FILES:
        (tmp_path / name).write_text(code)
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.mark.parametrize("command, shown", COMMANDS, ids=[command for command, _ in COMMANDS])
def test_its_commands_print_what_it_shows(files, capsys, command, shown):
    status = main(command.split())
    assert status == (1 if "FAILED" in shown else 0)
    # Which values a tie falls on, and so how many examples fail, is torch.topk's affair; everything else is the page's.
    printed, page = (re.sub(r"\d+", "#", text).splitlines() for text in (capsys.readouterr().out, shown))
    expected = [line for line in page if line.strip() != "..."]
    kept = [line for line in printed if line in expected]
    assert [line for line in expected if line not in printed] == []
    assert list(dict.fromkeys(kept)) == list(dict.fromkeys(expected))


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
def test_its_python_runs(files, code):
    exec(compile(code, "bring-your-own-kernel.md", "exec"), {})


def test_it_counts_right_and_names_every_property():
    from glm5.testing import PROPERTIES
    from tests.mutation.compiled import FAULTS
    from tests.mutation.wrappers import WRAPPERS

    words = " ".join(PAGE.split())
    assert f"in which {len(FAULTS)} faults are planted" in words and f"says. {len(WRAPPERS)} more, in Python" in words
    assert re.findall(r"^\| `(\w+)`", PAGE, flags=re.MULTILINE) == list(PROPERTIES)
