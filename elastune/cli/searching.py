"""Commands that choose sub-networks, and write them."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elastune.cli import completion
from elastune.cli.frame import (
    Json,
    Out,
    RunFolder,
    Set,
    Source,
    Update,
    opened,
    reported,
    show,
)
from elastune.errors import BadRecipe
from elastune.files import read_json

if TYPE_CHECKING:
    from rich.table import Table

    from elastune.run import Run
    from elastune.targets import Target

_CHOSEN = ("largest", "heuristic", "smallest", "best")


def search(
    source: Source,
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="auto, nsga2, rnsga2, milp, tpe, hill_climb, random, exhaustive, heuristic.",
            autocompletion=completion.algorithms,
        ),
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Configurations to score in all.")] = None,
    limit: Annotated[
        list[str] | None, typer.Option(help='What the best must keep, such as "latency<=60%".')
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that search together.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Database that several machines share; else a journal.")
    ] = None,
    out: Out = None,
    set_: Set = None,
    update: Update = False,
    json_: Json = False,
) -> None:
    """Score sub-networks on the validation examples and choose the best; goes on if it is asked."""
    given = {
        "algorithm": algorithm,
        "trials": trials,
        "limits": json.dumps(limit) if limit else None,
        "workers": workers,
        "storage": storage,
    }
    own = [f"search.{name}={value}" for name, value in given.items() if value is not None]
    # Other settings of the search change no other stage: its trials are gone on from.
    goes_on = bool(own) and source.is_dir() and not set_
    with reported(), opened(source, out, [*(set_ or []), *own], update or goes_on) as work:
        from elastune.budgets import allocate_budgets
        from elastune.choose import chosen
        from elastune.report import search_table
        from elastune.search_stage import search as search_run

        allocate_budgets(work)
        result = search_run(work)
        if not result.trials:
            show({"best": None} if json_ else "search.trials is 0: nothing was searched")
            return
        data = read_json(work.dir.trials)
        config = dict(chosen(work)["best"])  # within the limits, where the front's best may not be
        best = next(trial for trial in data["trials"] if trial["config"] == config)
        missed = data["about"]["missed"]
        if json_:
            values = {name: best[name] for name in ("values", "measured")}
            show({"best": config, **values, "missed": missed})
            return
        show(search_table(data))
        for line in _told(missed):
            show(f"missed: {line}")


def work(source: RunFolder) -> None:
    """Take part in a search that `elastune search RUN` has begun, as one more process."""
    with reported():
        from elastune.artifacts import RunDirectory
        from elastune.cli.frame import be_quiet
        from elastune.progress import Reporter
        from elastune.run import Run
        from elastune.search_stage import search_as_worker

        be_quiet()
        # The search ends it so when it is done: what it measures is given up, not taken for dead.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        directory = RunDirectory(source)
        search_as_worker(Run(directory, directory.recipe(), Reporter()))


def sweep(
    source: Source,
    cost: Annotated[
        str,
        typer.Option(
            help="params, nonzero, macs, block_macs, decode_macs, latency or decode_latency.",
            autocompletion=completion.costs,
        ),
    ] = "macs",
    parts: Annotated[
        str, typer.Option(help="Parts of the full model's cost.")
    ] = "0.9,0.8,0.7,0.6,0.5",
    trials: Annotated[int, typer.Option(help="Most trials that are added for each.")] = 4,
    json_: Json = False,
) -> None:
    """Choose a sub-network for each of a row of budgets, and score them: no training."""
    with reported(), opened(source, None, None, False) as work:
        from elastune.measure import measure
        from elastune.report import write_report
        from elastune.search_costs import full_costs
        from elastune.targets import sweep as sweep_run

        found = sweep_run(work, cost, _numbers(parts), trials=trials)
        measure(work, [target.name for target in found if not target.missed])
        page, metrics = write_report(work.dir.root), work.dir.metrics()
        name = found[0].bounded
        rows = [_sweep_row(target, name, full_costs(work, {name})[name]) for target in found]
        if json_:
            show({"report": str(page), "cost": name, "sweep": rows, **metrics})
            return
        show(_sweep_table(rows, name, metrics["rows"]))
        for row in rows:
            for line in _told(row["missed"]):
                show(f"{row['limit']} is not met: {line}")
        show(f"report: {page}")


def _sweep_row(target: Target, cost: str, full: float) -> dict[str, Any]:
    value = target.values[cost]
    return {
        "name": target.name,
        "limit": ", ".join(target.limits),
        "config": dict(target.config),
        "value": value,
        "part": value / full,
        "validation": dict(target.trial.values),
        "missed": _as_lists(target.missed),
    }


def _sweep_table(
    rows: Sequence[Mapping[str, Any]], cost: str, metrics: Sequence[Mapping[str, Any]]
) -> Table:
    """Make a table: each budget, what was found for it, its cost, and its scores."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from elastune.report.quantities import DASH

    names = {row["name"] for row in rows}
    scores = {(row["name"], row["task"]): row for row in metrics if row["name"] in names}
    tasks = [*dict.fromkeys(task for _, task in scores)]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption="± is one standard error")
    quality = next(iter(rows[0]["validation"]))
    for title in ("limit", cost, "of full", f"validation {quality}", *tasks):
        table.add_column(title, justify="left" if title == "limit" else "right")
    for row in rows:
        mine = (scores.get((row["name"], task)) for task in tasks)
        table.add_row(
            row["limit"],
            f"{row['value']:,.6g}",
            f"{100 * row['part']:.1f} %",
            f"{row['validation'][quality]:.4f}",
            *(DASH if one is None else _score_text(one) for one in mine),
            style="dim" if row["missed"] else None,
        )
    return table


def _score_text(row: Mapping[str, Any]) -> str:
    error = row["stderr"]
    return f"{row['score']:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _told(missed: Mapping[str, Sequence[float]]) -> list[str]:
    """Return in words the limits that the closest sub-network misses."""
    return [
        f"{name} is {value:.6g}, the limit {bound:.6g}; nothing found comes closer"
        for name, (value, bound) in missed.items()
    ]


def _as_lists(missed: Mapping[str, tuple[float, float]]) -> dict[str, list[float]]:
    return {name: list(pair) for name, pair in missed.items()}


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise BadRecipe(f"--parts {text!r} must be numbers such as 0.8,0.6,0.5") from None


def extract(
    source: Source,
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config",
            "-c",
            help="largest, heuristic, smallest, best, or JSON of dim -> choice.",
            autocompletion=completion.subnets,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Folder under RUN/subnets for a JSON configuration.")
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Of models: auto, hf, hf-padded, hf-hetero.",
            autocompletion=completion.saved_formats,
        ),
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option("--uniform", help="The nearest with blocks alike, for stock classes."),
    ] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(help='Limits, such as "latency<=0.5x": choose the best within them.'),
    ] = None,
    trials: Annotated[int, typer.Option(help="Most trials that a target adds.")] = 8,
    json_: Json = False,
) -> None:
    """Write sub-networks under RUN/subnets: stock PEFT adapters, or smaller models."""
    with reported(), opened(source, None, None, False) as work:
        from elastune.choose import ONLY_SCORED, chosen, extract_chosen, named_config
        from elastune.space import SearchSpace

        if target:
            _extract_target(work, target, name, trials, format_, uniform, json_)
            return
        known = chosen(work)
        space = SearchSpace.from_dict(json.loads(work.dir.space.read_text()))
        wanted = {}
        for text in config or [n for n in known if not n.startswith(ONLY_SCORED)]:
            folder = _folder_name(name) if text.lstrip().startswith("{") else text
            if folder in wanted:
                raise BadRecipe(f"two configurations for subnets/{folder}", try_="one at a time")
            wanted[folder] = known.get(text) or named_config(space, text)
        written = extract_chosen(work, wanted, format=format_, uniform=uniform)
        folders = [str(folder) for folder in written]
        show({"subnets": folders} if json_ else "\n".join(folders))


def _extract_target(
    work: Run,
    limits: list[str],
    name: str | None,
    trials: int,
    format_: str | None,
    uniform: bool,
    as_json: bool,
) -> None:
    from elastune.choose import extract_chosen
    from elastune.targets import find_target

    found = find_target(work, limits, trials=trials, name=name, must=True)
    folders = [
        str(folder)
        for folder in extract_chosen(
            work, {found.name: found.config}, format=format_, uniform=uniform
        )
    ]
    if as_json:
        show({"subnets": folders, "config": dict(found.config), "values": found.values})
        return
    show("\n".join(folders))


def _folder_name(name: str | None) -> str:
    """Return the folder under RUN/subnets of a configuration given as JSON."""
    name = name or "custom"
    if not re.fullmatch(r"\w[\w.-]*", name) or name in _CHOSEN:
        raise BadRecipe(
            f"--name {name!r} must be letters, digits, '.', '_' and '-', and not one of "
            f"{', '.join(_CHOSEN)}"
        )
    return name
