"""The report: one self-contained page, its sections written from top to bottom."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from elastune.files import holding
from elastune.report import exports, overview, search_section, sections
from elastune.report.load import RunData, load_run
from elastune.report.predictions import predictions
from elastune.report.results import System, systems, with_average

# The page may run its own script and style and load nothing from anywhere.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_report(run_dir: Path) -> Path:
    """Write ``RUN/report.html``, one page that needs no network, and return its path.

    Shows what the run directory holds and names what it lacks; the same files give the same page.

    Raises:
        BadArtifact: ``run_dir`` is no run directory, or one of its files is corrupt or foreign.
    """
    run_dir = Path(run_dir)
    with holding(run_dir, try_="run the stages that wrote its files again"):
        page = render(load_run(run_dir))
    target = run_dir / "report.html"
    handle, name = tempfile.mkstemp(dir=run_dir, prefix=".report.html.partial-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        os.chmod(name, 0o644)  # mkstemp makes it private; a report is for handing on
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target


def render(run: RunData) -> str:
    """Write the page of ``run`` as text."""
    rows: list[System] = with_average(systems(run.metrics)) if run.metrics else []
    body = "\n".join(
        part
        for part in (
            overview.heading(run, rows),
            overview.results(run, rows),
            search_section.search(run, rows),
            sections.training(run),
            sections.sparsity(run),
            predictions(run),
            sections.loading(run),
            exports.exports(run),
            sections.provenance(run),
            sections.missing(run),
        )
        if part
    )
    return _page(overview.title(run), body)


def _page(title: str, body: str) -> str:
    here = files("elastune.report")
    style = here.joinpath("style.css").read_text(encoding="utf-8")
    script = "".join(
        here.joinpath(name).read_text(encoding="utf-8") for name in ("script.js", "search.js")
    )
    lines: Iterable[str] = (
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{html.escape(title)}</title>",
        f"<style>\n{style}</style>",
        "</head>",
        "<body>",
        f"<main>\n{body}\n</main>",
        f"<script>\n{script}</script>",
        "</body>",
        "</html>",
    )
    return "\n".join(lines) + "\n"
