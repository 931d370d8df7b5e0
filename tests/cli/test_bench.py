"""``glm5 bench`` as a user meets it. What it measures is never tested, only that it measures and tells."""

import json
import re
import subprocess
import sys
import xml.dom.minidom

import pytest

from glm5.cli.main import main
from tests.cli.test_doctor import glm5


@pytest.fixture
def peers(monkeypatch):
    """benchmarks.peers, as it was afterwards."""
    from benchmarks import peers

    yield peers
    peers.choose([])


def test_limits_come_first_then_the_op_beside_its_peer_and_all_of_it_in_files(tmp_path):
    figures, picture = tmp_path / "new/figures.json", tmp_path / "shares.svg"
    run = glm5("bench", "moe_unpermute", "--quick", "--threads", "1", "--json", str(figures), "--picture", str(picture))
    assert run.returncode == 0, run.stderr
    machine, limits = run.stdout.splitlines()[:2]
    assert machine.startswith("1 threads, torch ")
    assert re.fullmatch(
        r"limits: float32 FMA \d+ GF/s, bf16 products \d+ GF/s, int8 products \d+ GOP/s, reading memory \d+ GB/s", limits
    )
    rows = json.loads(figures.read_text())
    names = [row["name"] for row in rows["results"]]
    assert names and all("moe_unpermute" in name for name in names)  # and no other op of its family
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows["results"])
    assert {key.partition(" ")[0] for key in rows["limits"]} == {"float32", "bf16", "int8", "read"}
    xml.dom.minidom.parseString(picture.read_text())
    assert not list(tmp_path.rglob("*.part"))


def test_a_picture_has_a_bar_for_every_case_with_a_limit():
    from benchmarks import picture
    from benchmarks.harness import Result

    def result(name, share, peer_share):
        return Result(
            name, 1.0, 2.0, 2.0, 1.0, "bf16" if share else None, None, share, "F.linear", "avx512", 0.0, None, None, "",
            peer_share=peer_share,
        )  # fmt: skip

    svg = picture.draw([result("a < b", 0.5, 0.25), result("none", None, None), result("c", 1.0, None)], "two & more")
    root = xml.dom.minidom.parseString(svg)
    texts = [t.firstChild.data for t in root.getElementsByTagName("text")]
    assert {"a < b", "two & more", "50 %, 2.00x F.linear"} <= set(texts) and "none" not in texts
    widths = [float(r.getAttribute("width")) for r in root.getElementsByTagName("rect")]
    assert widths.count(400) == 1 and widths.count(200) == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["no_such_op"], "no benchmark for no_such_op; there are .*moe.*moe_permute"),
        (["moe", "--against", "torch,jax"], "--against does not know jax; it knows torch, torchao, kt, transformers"),
        (["moe", "--picture", "shares.jpg"], "want a name that ends in .svg or .png"),
        (["moe", "--threads", "-1"], "--threads is -1"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(arguments, words, capsys, peers):
    assert main(["bench", *arguments]) == 1
    out, err = capsys.readouterr()
    assert re.search(words, err) and not out


def test_a_png_without_cairosvg(capsys, monkeypatch, peers):
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    assert main(["bench", "moe", "--picture", "shares.png"]) == 1
    assert "a PNG needs cairosvg" in capsys.readouterr().err


def test_no_case_of_that_name(capsys, peers):
    assert main(["bench", "rms_norm", "--quick", "--only", "nothing is called this"]) == 1
    assert "no case of rms_norm has 'nothing is called this' in its name" in capsys.readouterr().err


def test_a_library_that_is_not_here_is_skipped_with_a_word(monkeypatch, peers):
    monkeypatch.setitem(peers.LIBRARIES, "kt", ("no_such_module", "pip install it"))
    peers.choose(["kt"])
    assert peers.library("kt") is None
    assert peers.skipped() == ["kt is skipped: No module named 'no_such_module' (pip install it)"]
    peers.choose(["torch"])  # not asked for: not a word
    assert peers.library("kt") is None and not peers.skipped()
    assert peers.library("torch").__name__ == "torch"


def test_only_the_peers_that_were_asked_for(capsys, peers, tmp_path):
    assert main(["bench", "rms_norm", "--quick", "--against", "torchao", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["results"]
    assert rows and all(row["peer"] is None for row in rows)


def test_python_m_benchmarks_is_the_same():
    pages = [
        subprocess.run([sys.executable, "-m", *command, "--help"], capture_output=True, text=True, check=True).stdout
        for command in (["benchmarks"], ["glm5.cli", "bench"])
    ]
    assert pages[0] == pages[1] and "usage: glm5 bench" in pages[0]
