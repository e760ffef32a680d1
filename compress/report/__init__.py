"""What is made of results: comparisons and verdicts, pages, tables, plots, cards. The records of results know nothing of it."""

from compress.report.notebook import as_html
from compress.results.report import Report, read_report

__all__ = ["Report", "read_report"]

Report._repr_html_ = as_html  # type: ignore[attr-defined]  # what a notebook shows
