"""The sections below the results; each is empty where the run has nothing for it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import yaml

from elastune.report import figures, maps
from elastune.report.load import RunData
from elastune.report.markup import figure_grid, section
from elastune.report.quantities import one_line
from elastune.report.results import System

MOST_SHOWN = 3  # right and as many wrong answers per file
HEADS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
}


def search(run: RunData, rows: Sequence[System]) -> str:
    """Write the search, the sub-networks layer by layer, and what training drew."""
    drawn = [figures.search_scatter(run), maps.subnet_map(run, rows)]
    return section("Search and sub-networks", figure_grid(drawn))


def training(run: RunData) -> str:
    """Write the training curves and how often each choice was drawn."""
    drawn = [figures.training_curves(run), maps.choice_draws(run)]
    return section("Training", figure_grid(drawn))


def sparsity(run: RunData) -> str:
    """Write the sparsity of the base, layer by layer."""
    return section("Base model", figure_grid([maps.sparsity_map(run)]))


def predictions(run: RunData) -> str:
    """Write a few right and wrong answers of every scored system, folded away."""
    rank = {"best": 0, "heuristic": 1, "largest": 2, "smallest": 3}
    files = sorted(run.predictions.items(), key=lambda item: (rank.get(item[0][0], 9), item[0]))
    rows = (run.metrics or {}).get("rows", ())
    tasks = {re.sub("[:/]", "_", row["task"]): row["task"] for row in rows}  # as files spell them
    return section(
        "Predictions",
        "".join(_answers(name, tasks.get(task, task), rows) for (name, task), rows in files),
    )


def _answers(name: str, task: str, rows: Sequence[Mapping[str, Any]]) -> str:
    right = [row for row in rows if row["correct"]]
    wrong = [row for row in rows if not row["correct"]]
    shown = wrong[:MOST_SHOWN] + right[:MOST_SHOWN]
    head = f"{name} on {task}: {len(right):,} right of {len(rows):,}"
    body = "".join(_answer(row) for row in shown)
    note = f"The first {MOST_SHOWN} wrong and the first {MOST_SHOWN} right answers."
    return f'<details><summary>{escape(head)}</summary><p class="note">{note}</p>{body}</details>'


def _answer(row: Mapping[str, Any]) -> str:
    correct = bool(row["correct"])
    word, style = ("right", "better") if correct else ("wrong", "worse")
    read = row.get("extracted")
    gold = f"{row.get('gold')} (read from the answer: {'nothing' if read is None else read})"
    parts = (
        ("prompt", _clip(row["prompt"], 500, tail=True)),
        ("generated", _clip(row["text"], 800)),
        ("gold", _clip(gold, 300)),
    )
    body = "".join(
        f'<dt>{name}</dt><dd><pre class="wrap">{escape(text)}</pre></dd>' for name, text in parts
    )
    verdict = f'<dt>verdict</dt><dd><span class="{style}">{word}</span></dd>'
    return f'<dl class="prediction">{body}{verdict}</dl>'


def _clip(text: str, limit: int, *, tail: bool = False) -> str:
    text = text.strip("\n")
    if len(text) <= limit:
        return text
    return f"… {text[-limit:]}" if tail else f"{text[:limit]} …"


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
        code = (
            f"{imports}model = {auto}.from_pretrained({folder})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({folder})\n"
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
