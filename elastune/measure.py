"""Score every system of a run on the report examples: the rows of metrics.json."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from elastune.config import TaskConfig
from elastune.cost import Cost, CostModel, model_cost, prefill_latency_ms
from elastune.evaluate import evaluate
from elastune.files import remove, write_text
from elastune.inputs import fingerprint, report_key
from elastune.run import Run
from elastune.space import SubnetConfig
from elastune.supernet import SuperNetwork

SUBNETS = ("largest", "heuristic", "smallest", "best")


@dataclass(frozen=True)
class System:
    """One row of the table: a model, or a super-network with a configuration to activate."""

    name: str
    key: str
    """Hash of all that its scores depend on, tasks apart."""
    load: Callable[[], PreTrainedModel | SuperNetwork]
    """Shared by systems of the same super-network, which is loaded once."""
    config: SubnetConfig | None = None


def systems(run: Run, names: list[str] | None = None) -> list[System]:
    """List what the report compares: the recipe's baselines, then the chosen sub-networks."""
    found = []
    for name in run.recipe.baselines:
        key = run.inputs(name)
        if name == "dense":
            found.append(System(name, key, lambda: run.load_dense()[0]))
        elif name == "sparse":
            found.append(System(name, key, run.load_sparse))
        else:
            found.append(System(name, key, lambda name=name: run.load_baseline(name)))  # type: ignore[misc]
    for name, config in run.chosen().items():
        key = run.inputs("train", config.to_json())
        found.append(System(name, key, run.load_supernet, config))
    return [system for system in found if names is None or system.name in names]


def measure(run: Run, names: list[str] | None = None) -> None:
    """Score all systems on all report tasks, one row at a time, into metrics.json.

    Rows that are there already, made from the same inputs, are kept. Systems that are the same
    sub-network share their figures.
    """
    old = {(row["name"], row["task"]): row for row in run.dir.metrics()["rows"]}
    known: dict[tuple[str, str], dict[str, Any]] = {}
    wanted = systems(run, names)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    stages = {}
    for system in wanted:
        for task in run.recipe.report_tasks:
            stage, place = f"evaluate/{system.name}/{task.label}", (system.name, task.label)
            stages[place] = (stage, _row_key(run, system, task))
            if run.dir.is_done(*stages[place]) and place in old:
                rows[place] = old[place]
                known[system.key, task.label] = old[place]
    for system, model, config, cost in _loaded(run, wanted, lambda s: _missing(s, run, rows)):
        for task in run.recipe.report_tasks:
            place = (system.name, task.label)
            if place in rows:
                continue
            with run.dir.stage(*stages[place]):
                same = known.get((system.key, task.label))
                if same is not None:
                    _share_predictions(run, task, same["name"], system.name)
                row = same or _score(run, system.name, model, task)
                rows[place] = {
                    **row,
                    "name": system.name,
                    **asdict(cost),
                    "config": None if config is None else dict(config),
                }
                known[system.key, task.label] = rows[place]
                keep = [] if names is None else list(old.values())
                run.dir.set_metrics(_ordered(wanted, run, rows, keep))
    whole = _ordered(wanted, run, rows, [] if names is None else list(old.values()))
    if whole != list(old.values()):
        run.dir.set_metrics(whole)


def _row_key(run: Run, system: System, task: TaskConfig) -> str:
    """Hash all that a row depends on."""
    cfg = run.recipe.evaluate
    files = run.dir.sources(run.recipe).get(report_key(task))
    return fingerprint(system.key, task, files, cfg.macs_length, cfg.latency)


def _share_predictions(run: Run, task: TaskConfig, giver: str, taker: str) -> None:
    """Give the answers of one system to another that is the same sub-network."""
    source = run.dir.prediction_file(giver, task.label)
    target = run.dir.prediction_file(taker, task.label)
    remove(target)
    if source.exists():
        write_text(target, source.read_text(encoding="utf-8"))


def _missing(system: System, run: Run, rows: dict[tuple[str, str], Any]) -> bool:
    return any((system.name, task.label) not in rows for task in run.recipe.report_tasks)


def _loaded(
    run: Run, wanted: list[System], is_missing: Callable[[System], bool]
) -> Iterator[tuple[System, PreTrainedModel, SubnetConfig | None, Cost]]:
    """Yield each system that lacks rows with its model ready to run, and its cost."""
    tokens = run.recipe.evaluate.macs_length
    supernet: SuperNetwork | None = None
    for system in filter(is_missing, wanted):
        if system.config is None:
            loaded = system.load()
        else:
            loaded = supernet = supernet or system.load()  # type: ignore[assignment]
        if isinstance(loaded, SuperNetwork):
            config = system.config or loaded.space.largest()
            loaded.activate(config)
            yield system, loaded.model, config, CostModel(loaded, tokens)(config)
        else:
            yield system, loaded, None, model_cost(loaded, tokens)


def _score(run: Run, name: str, model: PreTrainedModel, cfg: TaskConfig) -> dict[str, Any]:
    """Score one model on one task."""
    started = time.monotonic()
    task = run.task(cfg)
    with run.reporter.bar(f"evaluate {name}, {cfg.label}", "examples") as bar:
        score = evaluate(
            model,
            run.tokenizer,
            task,
            run.report_examples(cfg),
            batch_tokens=run.recipe.evaluate.batch_tokens,
            progress=bar,
            predictions=run.dir.prediction_file(name, cfg.label),
        )
    latency = None
    if run.recipe.evaluate.latency:
        latency = round(prefill_latency_ms(model, run.recipe.evaluate.macs_length), 3)
    return {
        "task": cfg.label,
        "metric": score.metric,
        "score": score.value,
        "stderr": score.stderr,
        "n": score.n,
        "latency_ms": latency,
        "seconds": round(time.monotonic() - started, 2),
    }


_FIELDS = [
    "name",
    "task",
    "metric",
    "score",
    "stderr",
    "n",
    "params",
    "nonzero",
    "macs",
    "latency_ms",
    "seconds",
    "config",
]


def _ordered(
    wanted: list[System], run: Run, rows: dict[tuple[str, str], Any], others: list[Any]
) -> list[dict[str, Any]]:
    """Put rows into the order of the systems and tasks, and fields into that of the schema."""
    merged = {(row["name"], row["task"]): row for row in others} | rows
    names = [*run.recipe.baselines, *SUBNETS]
    tasks = [task.label for task in run.recipe.report_tasks]
    places = sorted(
        (place for place in merged if place[0] in names and place[1] in tasks),
        key=lambda place: (names.index(place[0]), tasks.index(place[1])),
    )
    return [{field: merged[place].get(field) for field in _FIELDS} for place in places]
