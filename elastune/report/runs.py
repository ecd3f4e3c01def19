"""Several runs side by side: how far each is, what it took, what its systems reach, what differs.

Only the small files of a run directory are read: recipe, manifest and metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from elastune.errors import BadArtifact, BadRecipe
from elastune.files import read_json
from elastune.report.load import check_metrics
from elastune.report.quantities import DASH, cost_texts, duration
from elastune.report.results import REFERENCES, System, first_columns, systems, with_average
from elastune.yaml_text import parse_yaml

_DEPTH = 2
"""Folders below the one given in which runs are looked for."""
_COSTS = ("params", "nonzero", "macs", "latency_ms")
_WIDE = 4
"""Tasks above which the average alone has a column."""
_SETTINGS = 24
"""Settings that are shown at most of those that differ."""


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Return the run directories among folders, and up to two levels below them, by name.

    Raises:
        BadRecipe: a folder that is not there, or no run at all.
    """
    found: dict[Path, None] = {}
    given = list(folders)
    for folder in given:
        if not folder.is_dir():
            raise BadRecipe(f"no folder at {folder}", try_="elastune runs FOLDER_OF_RUNS")
        levels = ["/".join([*("*" for _ in range(depth)), "recipe.yaml"]) for depth in range(3)]
        for pattern in levels[: _DEPTH + 1]:
            found |= dict.fromkeys(path.parent for path in sorted(folder.glob(pattern)))
    if not found:
        raise BadRecipe(
            f"no run in {', '.join(map(str, given))}: none of the folders has a recipe.yaml",
            try_="elastune run RECIPE",
        )
    return list(found)


def read_run(folder: Path) -> dict[str, Any]:
    """Return what is told of one run, as plain data.

    Keys: ``run`` (its folder), ``method``, ``model``, ``task``, ``state`` (``done``, ``at STAGE``,
    ``not begun``, or what is wrong with its files), ``seconds`` of its stages, ``finished`` (of the
    last one, local time), ``systems`` (rows of metrics.json), ``recipe`` (dotted setting -> value).
    """
    row: dict[str, Any] = {"run": str(folder), "systems": [], "recipe": {}, "seconds": 0.0}
    try:
        recipe = parse_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"))
        row["recipe"] = dict(_flat(recipe))
        row |= {name: recipe.get(name) for name in ("method", "model")}
        row["task"] = row["recipe"].get("task.name", recipe.get("task"))
        stages = _stages(folder)
        row["seconds"] = sum(stage.get("seconds", 0.0) for stage in stages.values())
        row["finished"] = max((stage.get("finished", "") for stage in stages.values()), default="")
        if (folder / "metrics.json").exists():
            metrics = read_json(folder / "metrics.json")
            check_metrics(metrics, str(folder / "metrics.json"))
            row["systems"] = metrics["rows"]
        row["state"] = _state(stages, row["systems"])
    except Exception as error:  # one damaged run must not hide the others
        row["state"] = f"unreadable: {error}"
    return row


def _stages(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("stages"), dict):
        raise BadArtifact(
            f"{path} has no stages", try_="the manifest.json of a run; run the recipe again"
        )
    return dict(manifest["stages"])


def _state(stages: Mapping[str, Mapping[str, Any]], rows: Sequence[Any]) -> str:
    begun = [name for name, stage in stages.items() if stage.get("status") != "done"]
    if begun:
        return f"at {begun[-1]}"
    if not stages:
        return "not begun"
    return "done" if rows else f"after {list(stages)[-1]}"


def _flat(value: Any, place: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the settings of a recipe by dotted name; lists are values."""
    if not isinstance(value, dict):
        yield place, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{place}.{key}" if place else str(key))


def differing(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the settings in which runs differ: name -> the value in each, None where it lacks."""
    names = dict.fromkeys(name for run in runs for name in run["recipe"])
    values = {name: [run["recipe"].get(name) for run in runs] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def shown_systems(run: Mapping[str, Any], only: Sequence[str] | None) -> list[System]:
    """Return the systems of a run to show: those asked for, or a reference and what was chosen."""
    if not run["systems"]:
        return []
    rows = with_average(systems({"schema": 1, "rows": run["systems"]}))
    if only:
        return [row for row in rows if row.name in only]
    names = {row.name for row in rows}
    reference = next((name for name in REFERENCES if name in names), None)
    chosen = {"fit", "best"} & names or {n for n in names if n.startswith("best-")}
    wanted = chosen | {reference}
    return [row for row in rows if row.name in wanted] or rows


def runs_table(runs: Sequence[Mapping[str, Any]], only: Sequence[str] | None = None) -> Table:
    """Make a terminal table: a row for each system of each run, the run's facts beside them."""
    shown = [(run, shown_systems(run, only)) for run in runs]
    every = [system for _, some in shown for system in some]
    columns = first_columns(every)
    if len(columns) > _WIDE:
        columns = [column for column in columns if column.task == "average"] or columns[:_WIDE]
    costs = [c for c in _COSTS if any(getattr(system, c) is not None for system in every)]
    made = {cost: cost_texts(cost, [getattr(s, cost) for s in every]) for cost in costs}
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    # Where a terminal is too narrow it is the folder's name that is broken, not a number.
    table.add_column("run", overflow="fold", min_width=16)
    table.add_column("system", no_wrap=True)
    for column in columns:
        title = "\n".join([column.task.replace(":", ":\n"), column.title])
        table.add_column(Text(title), justify="right", no_wrap=True)
    for cost, (prefix, _) in made.items():
        title = cost.replace("_ms", "\n(ms)") + (f"\n({prefix})" if prefix else "")
        table.add_column(Text(title), justify="right", no_wrap=True)
    place = 0
    for run, some in shown:
        systems_: Sequence[System | None] = some or [None]
        facts = [run["run"], f"{run['state']}, {duration(run['seconds'])}"]
        facts = facts if len(systems_) > 1 else ["\n".join(facts)]
        facts += [""] * (len(systems_) - len(facts))
        for system, fact in zip(systems_, facts, strict=True):
            cells = [fact, system.name if system else DASH]
            if system is not None:
                values = [system.values.get(column) for column in columns]
                cells += [
                    DASH if value is None else column.full_text(value)
                    for column, value in zip(columns, values, strict=True)
                ]
                cells += [texts[place] for _, texts in made.values()]
                place += 1
            table.add_row(*map(Text, cells))
    return table


def differences_table(runs: Sequence[Mapping[str, Any]]) -> Table | None:
    """Make a terminal table of the settings that differ; None where there is nothing to compare."""
    found = differing(runs)
    if len(runs) < 2 or not found:
        return None
    names = list(found)[:_SETTINGS]
    more = f", the first {_SETTINGS} of {len(found)}" if len(found) > _SETTINGS else ""
    table = Table(title=Text(f"settings that differ{more}"), box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("setting", no_wrap=True)
    for run in runs:
        table.add_column(Text(Path(run["run"]).name), overflow="fold")
    for name in names:
        table.add_row(name, *(Text(DASH if v is None else str(v)) for v in found[name]))
    return table
