"""Reports of a run: one HTML file that needs nothing else, and its table as text. Reads what a run folder holds."""

from glm5.report.html import read_metrics, stage_speeds, write_report
from glm5.report.table import Row, columns, long_context_tables, scores_table, summary_rows, text_table

__all__ = [
    "Row",
    "columns",
    "long_context_tables",
    "read_metrics",
    "scores_table",
    "stage_speeds",
    "summary_rows",
    "text_table",
    "write_report",
]
