"""The section on exports: what was written for which runtime, and how closely it was proved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from elastune.report.load import RunData
from elastune.report.markup import section
from elastune.report.quantities import DASH

_MB = 2**20
_TITLES = ("export", "sub-network", "MB", "largest difference", "loads with", "folder")


def exports(run: RunData) -> str:
    """Write the exports that are still there, and the lines that load those that have some."""
    rows = standing(run)
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{title}</th>' for title in _TITLES)
    body = "".join(
        f'<tr><th scope="row">{escape(str(row["label"]))}</th>'
        + "".join(f"<td>{cell}</td>" for cell in _cells(row))
        + "</tr>"
        for row in rows
    )
    note = (
        "Each was run in a fresh process by what loads it; the difference is from the outputs of "
        "the sub-network in torch. <code>elastune check</code> proves them again. The lines that "
        "load one are run in its folder."
    )
    table = f'<table class="exports"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return section(
        "Exports", f'<div class="scroll">{table}</div><p class="note">{note}</p>{_codes(rows)}'
    )


def standing(run: RunData) -> list[dict[str, Any]]:
    """Return what the run notes of those exports whose folders are still there."""
    return [row for row in run.exports if (run.path / row["folder"]).is_dir()]


def _cells(row: Mapping[str, Any]) -> list[str]:
    difference = row.get("largest_difference")
    return [
        escape(str(row["subnet"])),
        f"{row['n_bytes'] / _MB:.1f}",
        DASH if difference is None else f"{difference:.1e}",
        escape(str(row["loads_with"])),
        f"<code>{escape(str(row['folder']))}</code>",
    ]


def _codes(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(
        f"<details><summary>Load {escape(str(row['label']))}</summary>"
        f'<pre class="copy"><code>{escape(str(row["code"]))}</code></pre></details>'
        for row in rows
        if row.get("code")
    )
