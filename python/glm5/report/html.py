"""``report.html`` of a run: the final table, curves of loss, KL and speed, and what the model writes."""

import json
from html import escape
from pathlib import Path

from glm5._files import write_atomically
from glm5.report.chart import line_chart
from glm5.report.table import Row, long_context_tables, summary_rows

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; white-space: pre; }
.wide, figure { overflow-x: auto; margin: 1rem 0; }
svg { width: 100%; min-width: 32rem; height: auto; font: 11px system-ui, sans-serif; }
svg text:not([fill]) { fill: currentColor; } .grid { stroke: var(--line); stroke-width: .7; }
.empty, figcaption, .note { color: var(--soft); }
pre { background: #8881; padding: .8rem; border-radius: 6px; overflow-x: auto; white-space: pre-wrap; }
"""


def write_report(folder: Path) -> Path:
    """Writes ``report.html`` into the run folder `folder` from its metrics and evaluations, and returns its path."""
    folder = Path(folder)
    evaluation = json.loads((folder / "evaluation.json").read_text()) if (folder / "evaluation.json").exists() else {}
    metrics = read_metrics(folder / "metrics.jsonl")
    recipe = (folder / "recipe.toml").read_text(encoding="utf-8")
    path = folder / "report.html"
    write_atomically(path, _page(folder.name, evaluation, metrics, recipe))
    return path


def _page(name: str, evaluation: dict, metrics: list[dict], recipe: str) -> str:
    about = evaluation.get("about", {})
    topk = about.get("topk", 0)
    facts = [
        f"{about['parameters']:,} parameters" if "parameters" in about else "",
        about.get("text", ""),
        stage_speeds(metrics),
    ]
    body = [
        f"<h1>{escape(name)}</h1><p class=note>{escape('; '.join(f for f in facts if f))}</p>",
        "<h2>Result</h2>",
        _table(summary_rows(evaluation), topk),
    ]
    if "about" in evaluation:
        body.append(
            f"<p class=note>Nats per byte of held-out files: over all rows, and over those that see more than {4 * topk} "
            f"keys, four times top-k. Recall, over the latter: share of the {topk} keys with the most attention that were "
            "selected. KL: nats a row from attention to the indexer, over all keys or, after sparse adaptation, over the "
            "selected ones.</p>"
        )
    body += _long_context(evaluation)
    for title, caption, chart in _charts(metrics, evaluation):
        body.append(f"<h2>{escape(title)}</h2><figure>{chart}<figcaption>{escape(caption)}</figcaption></figure>")
    for sample in evaluation.get("samples", []):
        body.append(
            f"<h2>{escape(sample['title'])}</h2><pre><b>{escape(sample['prompt'])}</b>{escape(sample['text'])}</pre>"
        )
    body.append(f"<h2>Recipe</h2><pre>{escape(recipe)}</pre>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>glm5: {escape(name)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _table(rows: list[Row], topk: int) -> str:
    if not rows:
        return '<p class="empty">nothing measured yet: a stage is evaluated at its end</p>'
    head = ("held-out text", "nats/byte", f">{4 * topk} keys", f"top-{topk} recall", "indexer KL")
    lines = ["<tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr>"]
    for row in rows:
        numbers = ((row.nats_per_byte, ".4f"), (row.long_rows, ".4f"), (row.recall, ".1%"), (row.kl, ".4f"))
        cells = [row.name, *("" if value is None else f"{value:{form}}" for value, form in numbers)]
        lines.append("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _long_context(evaluation: dict) -> list[str]:
    tables = long_context_tables(evaluation)
    if not tables:
        return []
    scores = next(iter(next(iter(evaluation["longctx"].values()))["scores"].values()))
    items = min(score["items"] for score in scores.values())
    head = (
        f"<h2>Long context</h2><p class=note>Percent of what was asked for that greedy answers hold, over documents of so "
        f"many tokens; {items} items of each task.</p>"
    )
    return [head, *(f'<div class="wide"><table>{_table_rows(lines)}</table></div>' for lines in tables)]


def _table_rows(lines: list[tuple[str, ...]]) -> str:
    kinds = ("th", *("td" for _ in lines[1:]))
    rows = ("".join(f"<{k}>{escape(c)}</{k}>" for c in line) for k, line in zip(kinds, lines, strict=True))
    return "".join(f"<tr>{row}</tr>" for row in rows)


def _charts(metrics: list[dict], evaluation: dict):
    """(title, caption, svg) of every curve there is data for."""
    stages = list(dict.fromkeys(row["stage"] for row in metrics))
    by_stage = {s: [row for row in metrics if row["stage"] == s] for s in stages}

    def curve(stage, key):
        return [(row["step"], row[key]) for row in by_stage[stage] if key in row]

    for stage in stages:
        losses = {key: curve(stage, key) for key in ("lm", "mtp1", "mtp2", "mtp3", "validation")}
        losses = {name: line for name, line in losses.items() if line}
        if stage != "dsa-warmup" and losses:
            caption = (
                "Nats a token of training batches (lm; mtpN predicts N tokens further) and nats a byte of held-out text, "
                "which may come in longer packs than a stage trains on. Faint: every batch; bold: running mean."
            )
            yield f"{stage}: loss", caption, line_chart(losses, "step", "loss (nats)")
        divergence = curve(stage, "indexer_kl")
        if divergence:
            caption = (
                "Divergence of the indexer from the attention it should predict, on training batches; logarithmic. "
                "Faint: every batch; bold: running mean."
            )
            yield f"{stage}: indexer KL", caption, line_chart({"KL": divergence}, "step", "KL (nats a row)", log_y=True)
    measured = [e for e in evaluation.get("recalls", []) if e["indexer"] is not None]
    recalls = {key: [(e["at"], e[key]) for e in measured] for key in ("indexer", "window")}
    if recalls["indexer"]:
        caption = (
            "Share of the keys with the most attention that the indexer and a window of the last keys select, on held-out "
            "text, over the steps of both DSA stages."
        )
        yield "Recall of the true top-k", caption, line_chart(recalls, "DSA step", "recall (share)")


def read_metrics(path: Path) -> list[dict]:
    """All complete lines; a line cut short by a kill is left out."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def stage_speeds(metrics: list[dict]) -> str:
    """Median tokens/s of each stage, as a phrase."""
    speeds: dict[str, list[float]] = {}
    for row in metrics:
        if row.get("tokens_per_s"):
            speeds.setdefault(row["stage"], []).append(row["tokens_per_s"])
    return ", ".join(f"{stage} {sorted(s)[len(s) // 2]:,} tokens/s" for stage, s in speeds.items())
