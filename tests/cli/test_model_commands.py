"""``glm5 convert`` and ``glm5 generate --model`` as a user meets them."""

import json
import os
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
import torch

from glm5 import Glm5Config, Glm5ForCausalLM
from glm5.cli.main import main
from glm5.cli.progress import Bar
from glm5.data import ByteTokenizer


def write_model(folder: Path, layers: int) -> Path:
    """A small model of bytes in a Hugging Face directory."""
    model = Glm5ForCausalLM(Glm5Config.preset("tiny", num_hidden_layers=layers), seed=1)
    model.save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_model(tmp_path / "hf", 2)


def test_every_form_generates_and_what_is_exact_generates_the_same(folder, tmp_path, capsys):
    places = {"hf": folder}
    for source, form in (("hf", "native"), ("native", "fp8"), ("fp8", "hf"), ("native", "hf")):
        place = places[f"{source}-{form}"] = tmp_path / f"{source}-{form}"
        assert main(["convert", str(places.get(source, tmp_path / f"hf-{source}")), str(place), "--to", form]) == 0
        assert capsys.readouterr().out == f"{place}\n"
        places.setdefault(form, place)
    said = {}
    for name, place in places.items():
        assert main(["generate", "--model", str(place), "--prompt", "def f(", "--tokens", "20", "--seed", "3"]) == 0
        said[name] = capsys.readouterr().out
        assert said[name].startswith("def f(") and said[name].endswith("\n")
    assert said["hf"] == said["hf-native"] == said["native-hf"] and said["fp8"] == said["fp8-hf"]


def test_what_is_generated_is_the_models_choice(folder, capsys):
    main(["generate", "ab", "--model", str(folder), "--tokens", "12", "--temperature", "0"])
    tokenizer = ByteTokenizer()
    model = Glm5ForCausalLM.from_pretrained(folder)
    start = [*tokenizer.encode_document("")[:-1], *tokenizer.encode("ab")]
    ids = model.generate(torch.tensor(start), 12, stop_tokens=(tokenizer.eos_id,))
    assert capsys.readouterr().out == tokenizer.decode(ids[1:].tolist()) + "\n"


def test_at_most_as_many_tokens_as_the_model_has_positions_for(folder, capsys):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 9}))
    assert main(["generate", "abcd", "--model", str(folder), "--tokens", "100"]) == 0
    capsys.readouterr()
    assert main(["generate", "abcdefghijk", "--model", str(folder)]) == 1
    assert "the prompt has 13 tokens, want 1 to 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["generate", "a", "--prompt", "b", "--model", "HF"], "the prompt was given twice"),
        (["generate", "--model", "HF", "--tokens", "-1"], "--tokens is -1, want >= 0"),
        (["generate", "--model", "HF", "--temperature", "-1"], "--temperature is -1.0, want a finite number >= 0"),
        (["generate", "--model", "HF/no"], "HF/no is not a directory"),
        (["generate", "--model", "HF/.."], "HF/.. has no tokenizer.json: put the model's there"),
        (["convert", "HF", "HF"], "HF is the source itself, want another directory"),
        (["convert", "HF", "HF/config.json"], "HF/config.json is not a directory"),
        (["convert", "HF/no", "HF/x"], "HF/no/config.json cannot be read: No such file"),
        (["convert", "HF", "HF/x", "--max-shard-gb", "0"], "--max-shard-gb is 0.0, want a number > 0"),
    ],
)
def test_mistakes_end_in_one_line(folder, capsys, arguments, words):
    assert main([text.replace("HF", str(folder)) for text in arguments]) == 1
    told = capsys.readouterr()
    assert words.replace("HF", str(folder)) in told.err and told.err.count("\n") == 1 and told.out == ""


def killed_while_writing(command: list[str], target: Path) -> bool:
    """Runs ``command`` and kills it once a temporary file is in ``target``; whether it was still at work then."""
    child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})
    deadline = time.monotonic() + 60
    while not list(target.glob(".tmp-*")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    return child.wait() == -signal.SIGKILL and bool(list(target.glob(".tmp-*")))


def test_a_killed_convert_does_its_work_when_it_is_run_again(tmp_path):
    for layers in (2, 8, 32):  # a longer work where the kill came too late
        source, target = write_model(tmp_path / f"hf {layers}", layers), tmp_path / f"out {layers}"
        command = [sys.executable, "-m", "glm5.cli", "convert", str(source), str(target), "--max-shard-gb", "1e-4"]
        if killed_while_writing(command, target):
            break
    else:
        pytest.fail("every convert ended before it was killed, or left no temporary file")
    assert main(command[3:]) == 0
    assert not list(target.glob(".tmp-*"))
    want, got = (Glm5ForCausalLM.from_pretrained(place).state_dict() for place in (source, target))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_bar_is_for_terminals():
    class Terminal(StringIO):
        def isatty(self):
            return True

    with Bar("reading", file := StringIO()) as bar:
        bar(1, 2)
    assert file.getvalue() == ""
    with Bar("reading", screen := Terminal()) as bar:
        for done in (1, 1, 2):
            bar(done, 2)
    shown = screen.getvalue().split("\r\033[K")
    assert [text[-5:] for text in shown[1:-1]] == ["  0 %", " 50 %", "100 %"] and shown[-1] == ""
