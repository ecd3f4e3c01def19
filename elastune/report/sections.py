"""The sections below the results; each is empty where the run has nothing for it."""

from __future__ import annotations

from html import escape

import yaml

from elastune.report import figures, maps
from elastune.report.load import RunData
from elastune.report.loading import load_code
from elastune.report.markup import figure_grid, section


def training(run: RunData) -> str:
    """Write the training curves and how often each choice was drawn."""
    drawn = [figures.training_curves(run), maps.choice_draws(run)]
    return section("Training", figure_grid(drawn))


def sparsity(run: RunData) -> str:
    """Write the sparsity of the base, layer by layer."""
    return section("Base model", figure_grid([maps.sparsity_map(run)]))


def loading(run: RunData) -> str:
    """Write the lines of Python that load the chosen sub-network."""
    if not run.subnets:
        return ""
    name = "best" if "best" in run.subnets else next(iter(run.subnets))
    others = [other for other in run.subnets if other != name]
    note = ""
    if run.subnets[name] == "own-code":
        note = "After import elastune it loads without trust_remote_code. "
    if others:
        note += f"Also extracted: {', '.join(others)}."
    markup = f'<pre class="copy"><code>{escape(load_code(run, name))}</code></pre>'
    return section(
        "Load the result", markup + (f'<p class="note">{escape(note)}</p>' if note else "")
    )


def provenance(run: RunData) -> str:
    """Write stage times, versions, environment and the recipe."""
    markup = figure_grid([figures.stage_times(run)])
    versions = (run.manifest or {}).get("versions")
    environment = (run.metrics or {}).get("environment")
    for name, value in (
        ("Versions", versions),
        ("Environment of the evaluation", environment),
        ("Recipe as resolved", run.recipe),
    ):
        if value:
            text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
            markup += (
                f"<details><summary>{name}</summary>"
                f'<pre class="wrap">{escape(text)}</pre></details>'
            )
    return section("How it was made", markup)


def missing(run: RunData) -> str:
    """Name the files that the run directory lacks."""
    if not run.missing:
        return ""
    names = ", ".join(f"<code>{escape(name)}</code>" for name in run.missing)
    return section(
        "Not in this report", f"<p>The run directory has no {names}: their parts are left out.</p>"
    )
