"""The final table: what each way of choosing keys costs, in nats per byte. Input is ``evaluation.json``."""

from dataclasses import dataclass


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
