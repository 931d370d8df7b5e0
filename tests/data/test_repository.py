"""Repository samples: what is imported comes before what imports it, every file once, under its path; and commits."""

import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm5.data import repository
from glm5.data.repository import Files, dependency_order, header, samples

NAMES = st.sampled_from("abcdefgh")


@given(st.dictionaries(NAMES, st.sets(NAMES), max_size=8))
def test_every_file_comes_once_and_after_what_it_imports(imports):
    order = dependency_order(imports)
    assert sorted(order) == sorted(imports)
    reach = {path: set(named) & imports.keys() for path, named in imports.items()}
    for _ in imports:
        reach = {path: named | {far for near in named for far in reach[near]} for path, named in reach.items()}
    for path in order:
        for other in imports[path] & imports.keys():
            in_a_circle = path in reach[other]
            assert in_a_circle or order.index(other) < order.index(path)


@given(st.dictionaries(NAMES, st.sets(NAMES), max_size=8), st.randoms())
def test_the_order_does_not_depend_on_how_files_are_listed(imports, random):
    listed = list(imports)
    random.shuffle(listed)
    assert dependency_order({path: imports[path] for path in listed}) == dependency_order(imports)


PACKAGE = {
    "src/glm/__init__.py": "from glm.model import Model\n",
    "src/glm/model.py": "import os\nimport glm.layers.norm\nfrom .layers import attention, mlp\n",
    "src/glm/layers/__init__.py": "",
    "src/glm/layers/norm.py": "# import glm.model would be a circle\n",
    "src/glm/layers/attention.py": "from glm.layers.norm import Norm\nfrom ..config import Config\n",
    "src/glm/layers/mlp.py": "from . import norm\nfrom .attention import (\n    Attention,\n)\n",
    "src/glm/config.py": "x = 'import glm.model'\n",
    "csrc/a.cpp": '#include "lib/a.h"\n#include <vector>\n#include "b.h"\n',
    "csrc/lib/a.h": '#include "../b.h"\n',
    "csrc/b.h": "",
    "web/app.ts": 'import { x } from "./x";\nconst y = require("../csrc/none");\n',
    "web/x/index.ts": "export const x = 1;\n",
}


@pytest.mark.parametrize(
    "path, names",
    [
        ("src/glm/__init__.py", {"src/glm/model.py"}),
        ("src/glm/model.py", {"src/glm/layers/norm.py", "src/glm/layers/attention.py", "src/glm/layers/mlp.py"}),
        ("src/glm/layers/norm.py", set()),
        ("src/glm/layers/attention.py", {"src/glm/layers/norm.py", "src/glm/config.py"}),
        ("src/glm/layers/mlp.py", {"src/glm/layers/norm.py", "src/glm/layers/attention.py"}),
        ("src/glm/config.py", set()),
        ("csrc/a.cpp", {"csrc/lib/a.h", "csrc/b.h"}),
        ("csrc/lib/a.h", {"csrc/b.h"}),
        ("web/app.ts", {"web/x/index.ts"}),
    ],
)
def test_imports_are_found(path, names):
    assert Files(list(PACKAGE)).imports(path, PACKAGE[path].encode()) == names


def load(path):
    return PACKAGE[path].encode()


@given(st.integers(40, 1200))
def test_samples_hold_every_file_that_fits_in_order_within_the_budget(budget):
    paths = list(PACKAGE)
    made = list(samples(paths, load, budget))
    whole = b"\n".join(text for _, text in made if text is not None)
    texts = [p for p in paths if PACKAGE[p]]
    too_long = {path for path, text in made if text is None}
    assert too_long == {p for p in paths if len(load(p)) + len(header(p)) + 1 > budget}
    order = dependency_order({p: Files(paths).imports(p, load(p)) for p in texts if p not in too_long})
    assert whole == b"\n".join(header(p) + load(p) for p in order)
    assert all(text is None or 0 < len(text) <= budget for _, text in made)
    assert all(text is None or text.startswith(header(first)) for first, text in made)


def test_a_header_is_a_comment_of_the_language():
    assert [header(p) for p in ("a.py", "b/c.cpp", "d.sql", "e.txt")] == [
        b"# a.py\n", b"// b/c.cpp\n", b"-- d.sql\n", b"# e.txt\n",
    ]  # fmt: skip


def test_what_is_no_text_is_left_out():
    files = {"a.py": b"caf\xe9\n", "b.py": b"x\0", "c.py": b"", "d.py": b"d = 1"}
    assert list(samples(list(files), files.get, 1000)) == [("d.py", b"# d.py\nd = 1\n")]


# ---- commits ----


@pytest.fixture
def checkout(tmp_path):
    """A repository of three commits; the second answers issue 7 and touches two files."""
    root = tmp_path / "repo"
    root.mkdir()
    environment = os.environ | {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}

    def git(*arguments):
        names = ("-c", "user.name=n", "-c", "user.email=e@example.com", "-c", "init.defaultBranch=main")
        subprocess.run(["git", *names, *arguments], cwd=root, check=True, env=environment, capture_output=True)

    git("init")
    (root / "a.py").write_text("import b\nprint(b.f(1))\n")
    (root / "b.py").write_text("def f(x):\n    return x\n")
    (root / "picture").write_bytes(b"\0\1\2")
    git("add", ".")
    git("commit", "-m", "Begin")
    (root / "a.py").write_text("import b\nprint(b.f(2))\n")
    (root / "b.py").write_text("def f(x):\n    return 2 * x\n")
    git("commit", "-a", "-m", "f doubles\n\nFixes #7, not #8.")
    (root / "picture").write_bytes(b"\0\2")
    (root / "c.py").write_text("c = 1\n")
    git("add", ".")
    git("commit", "-m", "A picture and c")
    return root


def is_python(path):
    return path.endswith(".py")


def test_a_commit_has_its_issue_the_files_before_the_message_and_the_diff(checkout):
    issues = {7: ("f should double", "It does not."), 9: ("other", "")}
    made = [text.decode() for _, text in repository.commits(checkout, 10, is_python, issues, 10_000)]
    assert len(made) == 3
    newest, second, first = made
    assert second.startswith(
        "# issue 7: f should double\nIt does not.\n\n# b.py\ndef f(x):\n    return x\n\n# a.py\nimport b\n"
    )
    assert "\n# message\nf doubles\n\nFixes #7, not #8.\n\n# diff\ndiff --git a/a.py b/a.py\n" in second
    assert "-    return x\n+    return 2 * x\n" in second and "other" not in second
    assert first.startswith("# message\nBegin\n\n# diff\n") and "+import b\n" in first  # there was nothing before
    assert "picture b/picture" not in newest and "+c = 1\n" in newest
    assert len(list(repository.commits(checkout, 1, is_python, {}, 10_000))) == 1


def test_a_commit_within_its_budget(checkout):
    (_, whole) = list(repository.commits(checkout, 2, is_python, {}, 10_000))[1]
    for budget in range(len(whole) + 1):
        (commit, text) = list(repository.commits(checkout, 2, is_python, {}, budget))[1] if budget % 40 == 0 else ("", b"")
        assert text is None or len(text) <= budget
    (_, cut) = list(repository.commits(checkout, 2, is_python, {}, len(whole) - 1))[1]
    assert cut.startswith(b"# b.py\n") and b"\n# a.py\n" not in cut and whole.endswith(cut.partition(b"# message")[2])


def test_bad_issues_and_a_folder_that_is_no_checkout(tmp_path):
    path = tmp_path / "issues.jsonl"
    path.write_text('{"number": 1, "title": "a"}\n{"title": "b"}\n')
    with pytest.raises(ValueError, match=r"issues.jsonl:2: want a JSON object with number, title and body"):
        repository.read_issues(path)
    with pytest.raises(ValueError, match="git log: fatal: not a git repository"):
        list(repository.commits(tmp_path, 1, is_python, {}, 100))
