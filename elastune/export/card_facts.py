"""What a model card says beside sizes and loading: recipe, budget, figures, and where from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult

from elastune.errors import BadArtifact, nearest
from elastune.export.base_facts import BaseFacts, base_facts
from elastune.files import read_json
from elastune.report.load import check_metrics
from elastune.report.results import ALONE, BASELINES

Row = Mapping[str, Any]


@dataclass(frozen=True)
class CardFacts:
    """What is known of how an export came about; every part may be missing.

    Attributes:
        base: the model it was made from.
        recipe: what was done, a name and a value each.
        budget: what it had to keep, such as ``block_macs<=50%``.
        system: its name among ``rows``.
        rows: rows of ``metrics.json``: its own, and those of the systems it is compared with.
        tags: more tags for the hub.
    """

    base: BaseFacts | None = None
    recipe: Mapping[str, str] = field(default_factory=dict)
    budget: str | None = None
    system: str | None = None
    rows: Sequence[Row] = ()
    tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        names = {row["name"] for row in self.rows}
        if self.rows:
            check_metrics({"rows": list(self.rows)}, "the card's rows")
        if self.rows and self.system not in names:
            raise BadArtifact(
                f"no row has the name {self.system!r}{nearest(str(self.system), names)}; rows are "
                f"of {', '.join(sorted(names))}",
                try_="elastune evaluate RUN",
            )

    @property
    def own_rows(self) -> list[Row]:
        """The rows of the system that the card is of."""
        return [row for row in self.rows if row["name"] == self.system]


def run_facts(run: str | Path, system: str) -> CardFacts:
    """Gather the facts of a system of a run: from its recipe and metrics.

    Args:
        run: a run directory.
        system: the name of a sub-network or baseline, such as ``best`` or ``sparse+lora``.

    Raises:
        BadArtifact: no run directory, or one whose files cannot be read. A system that was not
            scored has no figures, and is no error.
    """
    root = Path(run)
    try:
        recipe = yaml.safe_load((root / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise BadArtifact(
            f"{root} is not a run directory: its recipe.yaml cannot be read ({error})",
            try_="give the directory that `elastune run` wrote",
        ) from error
    file = root / "metrics.json"
    rows = read_json(file)["rows"] if file.is_file() else []
    compared = [row for row in rows if row["name"] == system or is_baseline(row["name"])]
    is_scored = any(row["name"] == system for row in rows)
    return CardFacts(
        base=base_facts(recipe["model"]) if recipe.get("model") else None,
        recipe=summary(recipe),
        budget=budget_of(recipe, system, _targets(root)),
        system=system,
        rows=compared if is_scored else (),
        tags=[str(recipe["method"])] if recipe.get("method") else [],
    )


def is_baseline(name: str) -> bool:
    """Tell whether a system of a run is there to be compared with."""
    return name in BASELINES or name.startswith(ALONE)


def summary(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Return what a recipe does in a few lines: name -> value."""

    def part(name: str) -> Mapping[str, Any]:
        found = recipe.get(name)
        return found if isinstance(found, Mapping) else {}

    sparsify, adapter, train, search = map(part, ("sparsify", "adapter", "train", "search"))
    task = recipe.get("task")
    found = {
        "method": recipe.get("method"),
        "trained on": task.get("name") if isinstance(task, Mapping) else task,
        "sparsified": _joined(
            sparsify.get("method"), _percent(sparsify.get("ratio")), sparsify.get("pattern")
        ),
        "adapter ranks": adapter.get("ranks"),
        "training": _joined(
            f"{train['epochs']:g} epochs" if train.get("epochs") else None,
            f"at most {train['max_steps']} steps" if train.get("max_steps") else None,
            f"batches of {train['batch_size']}" if train.get("batch_size") else None,
            f"learning rate {train['learning_rate']:g}" if train.get("learning_rate") else None,
        ),
        "search": _joined(
            search.get("algorithm"), f"{search['trials']} trials" if search.get("trials") else None
        ),
        "seed": recipe.get("seed"),
    }
    return {name: _plain(value) for name, value in found.items() if value not in (None, "", [], {})}


def budget_of(
    recipe: Mapping[str, Any], system: str, targets: Mapping[str, Sequence[str]] | None = None
) -> str | None:
    """Return what a system had to keep: a budget or target by its name, or the search's limits.

    Args:
        recipe: as ``recipe.yaml`` holds it.
        system: its name.
        targets: name of a system that was searched for by itself -> its limits.
    """
    if targets and system in targets:
        return ", ".join(map(str, targets[system]))
    structure, search = recipe.get("structure"), recipe.get("search")
    budgets = (structure.get("budgets") if isinstance(structure, Mapping) else None) or ()
    for budget in budgets:
        if system.endswith(f"-{100 * budget:.6g}"):
            return f"{100 * budget:.6g} % of the full model's MACs inside the blocks"
    limits = search.get("limits") if isinstance(search, Mapping) else None
    return ", ".join(map(str, limits)) if limits and system.startswith("best") else None


def eval_results(facts: CardFacts, pipeline_tag: str) -> list[EvalResult]:
    """Return the system's figures as the hub's model index has them.

    A metric's standard error follows it as a metric of its own, ``<metric>_stderr``: the index has
    no field for it. Figures that are not finite are left out.
    """
    found = []
    for row in facts.own_rows:
        for part in (row, *(row.get("other_metrics") or ())):
            figures = {part["metric"]: part["score"], f"{part['metric']}_stderr": part["stderr"]}
            for metric, value in figures.items():
                if value is None or not math.isfinite(value):
                    continue
                found.append(
                    EvalResult(
                        task_type=pipeline_tag,
                        dataset_type=row["task"],
                        dataset_name=row["task"],
                        metric_type=metric,
                        metric_value=value,
                        dataset_args={"n": row["n"]},
                    )
                )
    return found


def _targets(root: Path) -> dict[str, Sequence[str]]:
    file = root / "search" / "targets.json"
    found = read_json(file).get("subnets", {}) if file.is_file() else {}
    return {name: row["limits"] for name, row in found.items()}


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)


def _percent(ratio: Any) -> str | None:
    return f"{100 * ratio:g} %" if isinstance(ratio, int | float) and ratio else None


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_plain(inner)}" for name, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
