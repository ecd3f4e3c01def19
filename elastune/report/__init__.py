"""Run directory -> one self-contained HTML page, and its tables for terminal and Markdown."""

from __future__ import annotations

from elastune.report.html import write_report
from elastune.report.load import RunData, load_run
from elastune.report.runs import differences_table, find_runs, read_run, runs_table
from elastune.report.space_table import ends_table, space_table
from elastune.report.tables import markdown_table, metrics_table, search_table, sparsity_table

__all__ = [
    "RunData",
    "differences_table",
    "ends_table",
    "find_runs",
    "load_run",
    "markdown_table",
    "metrics_table",
    "read_run",
    "runs_table",
    "search_table",
    "space_table",
    "sparsity_table",
    "write_report",
]
