"""The final tables: what each way of choosing keys costs, what is found in long contexts. Input is ``evaluation.json`` and
scores as ``glm5.eval.longctx.to_json`` gives them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

AVERAGE = "average"  # the mean of the tasks, among the scores of a length


@dataclass(frozen=True)
class Row:
    """One line of the table; a number that was not measured is None."""

    name: str
    nats_per_byte: float | None = None
    long_rows: float | None = None  # the same over rows that may see more than 4 x top-k keys
    recall: float | None = None  # of the keys with the most attention, over the same rows
    kl: float | None = None


def summary_rows(evaluation: dict) -> list[Row]:
    """Rows of the table, in the order of the run."""
    fields = ("nats_per_byte", "long_rows", "recall", "kl")
    return [Row(each["title"], *map(each.get, fields)) for each in evaluation.get("measured", {}).values()]


def long_context_rows(evaluation: dict) -> list[tuple[str, dict]]:
    """(name, scores) after each stage that was asked: the first by its name, later ones as "+ stage"."""
    found = evaluation.get("longctx", {})
    return [
        (f"{'+ ' if i else ''}{stage} ({each['attention']})", each["scores"])
        for i, (stage, each) in enumerate(found.items())
    ]


def long_context_tables(evaluation: dict) -> list[list[tuple[str, ...]]]:
    """Head and rows of each table: the mean of the tasks first, then task by task; a length a column, percent."""
    rows = long_context_rows(evaluation)
    if not rows:
        return []
    first = rows[0][1]
    tasks = next(iter(first.values()))
    return [table_lines(rows, list(first), task) for task in (AVERAGE, *(task for task in tasks if task != AVERAGE))]


def text_table(rows: list[Row], topk: int) -> str:
    """The table for a terminal."""
    head = ("validation", "nats/byte", f">{4 * topk} keys", f"top-{topk} recall", "indexer KL")
    cells = [
        (
            row.name,
            *(
                "" if value is None else f"{value:{form}}"
                for value, form in ((row.nats_per_byte, ".4f"), (row.long_rows, ".4f"), (row.recall, ".1%"), (row.kl, ".4f"))
            ),
        )
        for row in rows
    ]
    return columns([head, *cells])


def table_lines(rows: Sequence[tuple[str, dict]], lengths: Sequence[str], task: str = AVERAGE) -> list[tuple[str, ...]]:
    """Head and rows of a table in the shape of RULER's: a model a row, a length a column, percent in the cells.

    Args:
        rows: (name, scores).
    """
    lines = [(task, *lengths)]
    for name, scores in rows:
        shown = [scores.get(length, {}).get(task) for length in lengths]
        lines.append((name, *("" if s is None else f"{100 * s['share']:.1f}" for s in shown)))
    return lines


def scores_table(scores: dict, items: int) -> str:
    """One model's scores for a terminal: a task a row, a length a column, with intervals."""
    lengths = list(scores)
    tasks = list(scores[lengths[0]])
    lines = [(f"{items} items each, %", *lengths)]
    for task in tasks:
        each = [scores[length][task] for length in lengths]
        cells = (f"{100 * s['share']:.1f} [{100 * s['low']:.1f}, {100 * s['high']:.1f}]" for s in each)
        lines.append((task, *cells))
    return columns(lines)


def columns(lines: Sequence[tuple[str, ...]]) -> str:
    """The first column to the left, the others to the right, a rule under the head."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([text[0], "─" * len(text[0]), *text[1:]])
