"""Reports of a run: one HTML file that needs nothing else, and its table as text. Reads what a run folder holds."""

from glm5.report.html import read_metrics, stage_speeds, write_report
from glm5.report.table import Row, long_context_tables, summary_rows, text_table

__all__ = ["Row", "long_context_tables", "read_metrics", "stage_speeds", "summary_rows", "text_table", "write_report"]
