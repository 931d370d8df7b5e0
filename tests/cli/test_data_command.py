"""``glm5 data`` as a user meets it."""

from glm5.cli.main import main


def test_build_show_and_build_again(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    for i in range(40):
        (tmp_path / "src" / f"f{i}.py").write_text(f"value = {i}\n" * 5)
    (tmp_path / "src" / "empty.py").touch()
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nvalidation_one_in = 9\n'
        '[sources.src]\nkind = "folder"\npath = "src"\ndomain = "code"\nlicence = "MIT"\n'
    )
    command = ["data", "build", "mine.toml", "dedup.near=0", "--out", "out", "validation_one_in=4"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "code/validation" in out and "MIT" in out and "empty 1" in out and out.endswith("\nout\n")
    assert main(command) == 0
    assert capsys.readouterr().out == out.replace("\nout\n", "\nout was there already\n")
    assert main(["data", "show", "out", "--verify"]) == 0
    assert out.startswith(capsys.readouterr().out)

    assert main(["data", "build", "mine.toml"]) == 0  # where a run looks for it
    assert list((tmp_path / "runs" / "data").glob("mine-*/manifest.json"))


def test_mistakes_are_told_in_a_line(tmp_path, capsys):
    assert main(["data", "show", str(tmp_path)]) == 1
    assert main(["data", "build", "python-stdlb"]) == 1
    err = capsys.readouterr().err
    assert "is not a data folder" in err and "no data recipe called 'python-stdlb'" in err and "Traceback" not in err
