"""The sections below the results; each is empty where the run has nothing for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

import yaml

from elastune.report import figures, maps, space_map
from elastune.report.load import RunData
from elastune.report.markup import figure_grid, section
from elastune.report.quantities import one_line
from elastune.report.results import System

HEADS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
}


def search(run: RunData, rows: Sequence[System]) -> str:
    """Write the space where it was generated, the search, and the sub-networks by layer."""
    drawn = [*space_map.space_figures(run), figures.search_scatter(run), maps.subnet_map(run, rows)]
    return section("Search and sub-networks", figure_grid(drawn))


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
    folder = json.dumps(str(run.path / "subnets" / name), ensure_ascii=False)
    base_path = str(run.path / "base")
    if run.architecture is None and run.recipe and run.recipe.get("model"):
        base_path = one_line(run.recipe["model"])
    base = json.dumps(base_path, ensure_ascii=False)
    ends = ((end, auto) for end, auto in HEADS.items() if (run.architecture or "").endswith(end))
    auto = next(ends, ("", "AutoModelForCausalLM" if run.architecture is None else "AutoModel"))[1]
    imports = f"from transformers import {auto}, AutoTokenizer\n\n"
    if run.subnets[name] == "peft":
        code = (
            f"from peft import PeftModel\n{imports}"
            f"model = {auto}.from_pretrained({base})\n"
            f"model = PeftModel.from_pretrained(model, {folder})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({base})\n"
        )
    else:
        own_code = ", trust_remote_code=True" if run.subnets[name] == "own-code" else ""
        code = (
            f"{imports}model = {auto}.from_pretrained({folder}{own_code})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({folder}{own_code})\n"
        )
    others = [other for other in run.subnets if other != name]
    note = f"Also extracted: {', '.join(others)}." if others else ""
    markup = f"<pre><code>{escape(code)}</code></pre>"
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
