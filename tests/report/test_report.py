"""The report: self-contained, complete, and careful with what runs may hold."""

import json
import re
from xml.etree import ElementTree

import pytest

from glm5.report import summary_rows, text_table, write_report
from glm5.report.chart import line_chart, log_ticks, smoothed, ticks

EVALUATION = {
    "done": ["pretrain"],
    "about": {"topk": 64, "parameters": 2300000, "text": "10.4 MB of Python source"},
    "measured": {
        "pretrain/dense": {"title": "dense, after pretrain", "nats_per_byte": 1.4, "long_rows": 1.38, "kl": 1.25},
        "dsa-sparse/random": {"title": "  with random keys instead", "nats_per_byte": 1.6, "long_rows": None},
    },
    "recalls": [{"at": 0, "indexer": 0.2, "window": 0.3}, {"at": 60, "indexer": 0.8, "window": 0.3}],
    "samples": [{"title": "A sample", "prompt": "def ", "text": "f(x):\n    return x < 3 & y"}],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recipe.toml").write_text('name = "x"\n')
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    rows = [
        {"stage": "pretrain", "step": i, "lm": 5.0 / i, "mtp1": 6.0 / i, "tokens_per_s": 12000 + i} for i in range(1, 40)
    ]
    rows += [{"stage": "pretrain", "step": 39, "validation": 1.4}]
    rows += [{"stage": "dsa-warmup", "step": i, "lm": 1.4, "indexer_kl": 2.0 / i} for i in range(1, 20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"stage": "dsa')
    return tmp_path


def test_a_report_needs_nothing_else_and_shows_everything(folder):
    page = write_report(folder).read_text()
    assert not re.search(r"(src|href)\s*=|@import|url\(|<script", page)
    assert page.count("<svg") == 3  # loss, KL, recall
    for text in (
        "1.4000",
        "1.3800",
        "2,300,000 parameters",
        "pretrain 12,020 tokens/s",
        "return x &lt; 3 &amp; y",
        "random keys",
    ):
        assert text in page, text
    for svg in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(svg)


def test_a_run_that_has_just_begun_has_a_report_too(tmp_path):
    (tmp_path / "recipe.toml").write_text("")
    (tmp_path / "metrics.jsonl").write_text("")
    page = write_report(tmp_path).read_text()
    assert "nothing measured yet" in page and "<table>" not in page


def test_recall_that_was_not_measured_is_left_out(folder):
    nothing = [{"at": at, "indexer": None, "window": None} for at in (0, 60)]
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION | {"recalls": nothing}))
    assert "Recall of the true top-k" not in write_report(folder).read_text()


def test_the_table_lines_up_and_leaves_out_what_was_not_measured():
    table = text_table(summary_rows(EVALUATION), topk=64).splitlines()
    assert len(table) == 4 and ">256 keys" in table[0] and "top-64 recall" in table[0]
    assert len({len(line) for line in table}) == 1
    assert "1.4000" in table[2] and "1.2500" in table[2] and table[3].count("1.6000") == 1


def test_charts_of_odd_data():
    assert "nothing recorded" in line_chart({"a": []}, "x", "y")
    assert "nothing recorded" in line_chart({"a": [(1, float("nan"))], "b": [(1, 0.0)]}, "x", "y", log_y=True)
    for points in ([(3, 2.0)], [(1, 1.0), (2, 1.0)], [(1, 1e-9), (2, 1e9)]):
        ElementTree.fromstring(line_chart({"<&": points}, "x", "y"))


def test_axes_are_labelled_and_steps_are_whole():
    chart = ElementTree.fromstring(line_chart({"a": [(x, x / 3) for x in range(1, 21)]}, "step", "loss (nats)"))
    texts = [t.text for t in chart.findall("text")]
    assert {"step", "loss (nats)", "━ a", "5", "10", "20"} <= set(texts) and not {"2.5", "7.5"} & set(texts)


def test_a_narrow_window_scrolls_what_is_wide(folder):
    page = write_report(folder).read_text()
    assert 'name="viewport"' in page and '<div class="wide"><table>' in page
    assert re.search(r"\.wide, figure \{ overflow-x: auto", page) and re.search(r"svg \{[^}]*min-width", page)


def test_ticks_are_round_and_inside():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(1.31, 1.52) == [1.35, 1.4, 1.45, 1.5]
    assert ticks(2, 2) == [2]


def test_ticks_of_a_logarithmic_axis_are_round_values():
    def shown(low, high):
        return [f"{10**y:.4g}" for y in log_ticks(low, high)]

    assert shown(-0.5, 0.6) == ["0.5", "1", "2"]
    assert shown(-0.75, -0.5) == ["0.2", "0.25", "0.3"]
    assert shown(-9, 9) == ["1e-05", "1", "1e+05"]


def test_a_smoothed_line_keeps_its_steps_and_its_mean_and_loses_its_noise():
    line = [(float(x), 3.0 + (-1) ** x) for x in range(200)]
    calm = smoothed(line)
    assert [x for x, _ in calm] == [x for x, _ in line]
    assert all(abs(y - 3.0) < 0.3 for _, y in calm)


def test_many_points_are_drawn_faint_under_their_mean_and_few_are_marked():
    many = line_chart({"a": [(x, x % 7) for x in range(100)]}, "x", "y")
    assert many.count("<polyline") == 2 and "<circle" not in many
    few = line_chart({"a": [(x, x % 7) for x in range(3)]}, "x", "y")
    assert few.count("<polyline") == 1 and few.count("<circle") == 3


def test_scores_in_long_contexts_are_tables_of_stages_and_lengths(folder):
    score = {"low": 0.0, "high": 1.0, "items": 50}
    longctx = {
        stage: {
            "attention": attention,
            "scores": {
                length: {task: {"share": share} | score for task in ("niah-single", "average")} for length in ("256", "1024")
            },
        }
        for stage, attention, share in (("midtrain", "dense", 0.981), ("dsa-warmup", "sparse", 0.707))
    }
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION | {"longctx": longctx}))
    page = write_report(folder).read_text()
    assert "<tr><th>average</th><th>256</th><th>1024</th></tr><tr><td>midtrain (dense)</td><td>98.1</td>" in page
    assert "<td>+ dsa-warmup (sparse)</td><td>70.7</td><td>70.7</td>" in page
    assert page.count("<h2>Long context</h2>") == 1 and "50 items of each task" in page
    assert "Long context" not in _without_longctx(folder)


def _without_longctx(folder):
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    return write_report(folder).read_text()
