"""``glm5 run``, ``train`` and ``generate`` as a user meets them."""

import errno
import os

import pytest

from glm5.cli.main import main
from glm5.data import ChatTemplate
from glm5.recipes import load_recipe, recipe_names
from tests.train.test_run import SMALL


def test_dry_run_prints_the_resolved_recipe_and_makes_nothing(tmp_path, capsys):
    assert main(["run", "foundation", "seed=9", "--dry-run", "--runs", str(tmp_path)]) == 0
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    assert load_recipe(printed) == load_recipe("foundation", ["seed=9"])
    assert list(tmp_path.iterdir()) == [printed]


@pytest.mark.parametrize("command", [["run", "foundation"], ["train", "pretrain", "--recipe", "foundation"]])
def test_overrides_may_stand_before_and_after_options(command, tmp_path, capsys):
    assert main([*command, "seed=9", "--runs", str(tmp_path), "threads=1", "--dry-run", "name=other"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert {"seed = 9", "threads = 1", 'name = "other"'} <= set(printed)


@pytest.mark.parametrize("arguments", [["run", "foundation", "--dry-run", "--no-such=1"], ["doctor", "seed=1"]])
def test_an_argument_that_nobody_knows_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert f"{arguments[0]} does not know {arguments[-1]}; see glm5 {arguments[0]} --help" in capsys.readouterr().err


@pytest.mark.parametrize("command, missing", [("run", "recipe"), ("train", "stage")])
def test_help_asks_for_what_is_needed_and_names_the_recipes(command, missing, capsys):
    with pytest.raises(SystemExit):
        main([command])
    assert capsys.readouterr().err.endswith(f"the following arguments are required: {missing}\n")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in recipe_names())


def test_an_interrupted_run_says_how_to_go_on(monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("glm5.cli.run.run", interrupt)
    assert main(["run", "foundation"]) == 130
    assert "interrupted; the same command goes on from the last checkpoint" in capsys.readouterr().err


def test_no_command_shows_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and "Carry out a recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "nonsense"], "no recipe called 'nonsense'; there are foundation, glm-5, small"),
        (["run", "foundation", "stages.pretrain.lr=1"], "foundation.toml: unknown key stages.pretrain.lr; did you mean"),
        (
            ["train", "sft", "--recipe", "foundation"],
            "no stage called 'sft'; its stages are pretrain, midtrain, dsa-warmup, dsa-sparse",
        ),
        (["run", "foundation", "model.overrides.hidden_sizes=3"], "did you mean model.overrides.hidden_size?"),
        (["run", "foundation", "model.overrides.rope_theta=3"], "unknown key model.overrides.rope_theta; did you mean"),
        (["run", "foundation", "model.overrides.rope_parameters=3"], "rope_parameters is 3, want a table"),
        (["run", "foundation", "model.overrides.rms_norm_eps=small"], "rms_norm_eps is 'small', want a number"),
        (["run", "foundation", "model.overrides.vocab_size=256"], "vocab_size is 256, want at least 292"),
        (["run", "foundation", "stages.dsa-sparse.sequence_length=9000"], "stages.dsa-sparse.sequence_length: 9000 tokens"),
        (["run", "foundation", "evaluation.sample_tokens=8190"], "8196 tokens, want at most max_position_embeddings, 8192"),
        (["run", "foundation", "model.overrides.num_nextn_predict_layers=0"], "mtp_depth is 1, want 0"),
        (
            ["run", "foundation", "stages.pretran.steps=3"],
            "stages.pretran: no such stage; a new one needs stages.pretran.kind",
        ),
        (["generate", "--run", "nowhere"], "nowhere is not a run folder"),
        (["generate", "--model", "nowhere"], "nowhere is not a directory"),
        (["generate", "a", "--prompt", "b"], "the prompt was given twice"),
        (["convert", "nowhere", "there"], "nowhere/config.json cannot be read"),
    ],
)
def test_mistakes_end_in_one_clear_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["run", "foundation"], ["train", "pretrain", "--recipe", "foundation"]])
def test_a_folder_that_cannot_be_written_is_named(command, capsys, tmp_path):
    (tmp_path / "runs").write_text("a file is in the way")
    assert main([*command, *SMALL, "--runs", str(tmp_path / "runs")]) == 1
    assert f"glm5 {command[0]}: {tmp_path}/runs/foundation: Not a directory (" in capsys.readouterr().err


def test_a_full_disk_is_named_from_the_command_line(capsys, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main(["run", "foundation", *SMALL, "--runs", str(tmp_path)]) == 1
    message = (
        f"glm5 run: {tmp_path}/foundation/recipe.toml: No space left on device; make room and run the same command again ("
    )
    assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "foundation").iterdir()] == [".lock"]


def test_run_trains_reports_and_generates(tmp_path, capsys):
    assert main(["run", "foundation", *SMALL, "--runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "sparse, after dsa-sparse" in out and "A sample" in out and "report.html" in out and "tokens/s" in out
    assert (tmp_path / "foundation" / "report.html").is_file()
    assert main(["generate", "def f", "--run", str(tmp_path / "foundation"), "--tokens", "5", "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("def f")
    main(["generate", "def f", "--run", str(tmp_path / "foundation"), "--tokens", "5", "--seed", "3"])
    assert capsys.readouterr().out == first
    for form in ("hf", "native"):
        assert main(["convert", str(tmp_path / "foundation"), str(tmp_path / form), "--to", form]) == 0
        assert capsys.readouterr().out == f"{tmp_path / form}\n"
        assert main(["generate", "--prompt", "def f", "--model", str(tmp_path / form), "--tokens", "5", "--seed", "3"]) == 0
        assert capsys.readouterr().out == first
        assert (tmp_path / form / "chat_template.jinja").read_text() == ChatTemplate("glm-5").jinja
    (tmp_path / "foundation" / "evaluation.json").write_text('{"done": [')
    assert main(["run", "foundation", *SMALL, "--runs", str(tmp_path)]) == 1
    assert "evaluation.json is damaged; remove" in capsys.readouterr().err
