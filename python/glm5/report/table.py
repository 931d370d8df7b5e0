"""The final tables: what each way of choosing keys costs, what is found in long contexts. Input is ``evaluation.json``."""

from dataclasses import dataclass

from glm5.eval.longctx import AVERAGE, table_lines


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
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    lines = [
        "  ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in [head, *cells]
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])
