"""Score every system of a run on the report examples: the rows of metrics.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from elastune.alone import alone, alone_inputs, load_alone
from elastune.choose import chosen
from elastune.config import TaskConfig
from elastune.cost import Cost, CostModel, model_cost
from elastune.evaluate import evaluate
from elastune.files import remove, write_text
from elastune.inputs import fingerprint, report_key
from elastune.latency import Conditions, measure_latency
from elastune.run import Run
from elastune.space import SubnetConfig
from elastune.subnetwork import extract_model
from elastune.supernet import SuperNetwork
from elastune.tasks.base import Score
from elastune.whole_model import WholeModel


@dataclass(frozen=True)
class System:
    """One row of the table: a model, or a super-network with a configuration to activate."""

    name: str
    key: str
    """Hash of all that its scores depend on, tasks apart."""
    load: Callable[[], PreTrainedModel | WholeModel | SuperNetwork]
    """Shared by systems of the same super-network, which is loaded once."""
    config: SubnetConfig | None = None


def systems(run: Run, names: list[str] | None = None) -> list[System]:
    """List what the report compares: the recipe's baselines, then the chosen sub-networks."""
    found = []
    for name in run.recipe.baselines:
        if name == "alone":
            continue
        key = run.inputs(name)
        if name == "dense":
            found.append(System(name, key, lambda: run.load_dense()[0]))
        elif name == "sparse":
            found.append(System(name, key, run.load_sparse))
        else:
            found.append(System(name, key, lambda name=name: run.load_baseline(name)))  # type: ignore[misc]
    for name, config in alone(run).items():
        own = partial(load_alone, run, name, config)
        found.append(System(name, alone_inputs(run, config), own))
    for name, config in chosen(run).items():
        key = run.inputs("train", config.to_json())
        found.append(System(name, key, run.load_supernet, config))
    return [system for system in found if names is None or system.name in names]


@dataclass(frozen=True)
class Measurement:
    """One column of the table: what a system is scored on."""

    label: str
    """What the rows call it."""
    options: Any
    """All that its outcome depends on besides the system; plain data."""
    score: Callable[[str, PreTrainedModel, str], dict[str, Any]]
    """System's name, its model and the row's key -> the row's score, metric and so on."""
    recorded: bool = False
    """Whether rows keep the options, so that a later command knows them: no recipe names it."""

    def key(self, run: Run, system: System) -> str:
        """Hash all that a row depends on."""
        cfg = run.recipe.evaluate
        return fingerprint(system.key, self.options, cfg.macs_length, cfg.latency)


def report_measurements(run: Run) -> list[Measurement]:
    """List the recipe's report tasks."""

    def measurement(task: TaskConfig) -> Measurement:
        files = run.dir.sources(run.recipe).get(report_key(task))
        options = [task.model_dump(mode="json"), files]
        return Measurement(task.label, options, lambda *args: _score_task(run, task, *args))

    return [measurement(task) for task in run.recipe.report_tasks]


def measure(run: Run, names: list[str] | None = None, more: Sequence[Measurement] = ()) -> None:
    """Score all systems on all report tasks, one row at a time, into metrics.json.

    Rows that are there already, made from the same inputs, are kept. Systems that are the same
    sub-network share their figures. A row that a kill interrupted goes on from its examples.

    Args:
        names: only these systems.
        more: measurements besides the recipe's report tasks.
    """
    table = _Table(run, systems(run, names), [*report_measurements(run), *more], names is None)
    for system, model, config, cost in _loaded(run, table.wanted, table.lacks):
        for measurement in table.missing(system):
            same = table.twin(system, measurement)
            key = measurement.key(run, system)
            answers = run.dir.prediction_file(system.name, measurement.label)
            with run.dir.stage(_stage(system.name, measurement.label), key, answers):
                if same is not None:
                    _share_predictions(run, measurement.label, same["name"], system.name)
                row = same or _timed(run, system.name, model, measurement, key)
                row |= {"name": system.name, "task": measurement.label, **asdict(cost)}
                row["options"] = measurement.options if measurement.recorded else None
                row["config"] = None if config is None else dict(config)
                table.add(system, row)
    table.save()


class _Table:
    """The rows of metrics.json as they come, and which of them are still missing."""

    def __init__(
        self, run: Run, wanted: list[System], measurements: list[Measurement], whole: bool
    ) -> None:
        self.run = run
        self.wanted = wanted
        self.measurements = measurements
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        self._old = run.dir.metrics()["rows"]
        self._rows: dict[tuple[str, str], dict[str, Any]] = {}
        known_systems = {s.name: s for s in (wanted if whole else systems(run))}
        here = {m.label: m for m in measurements}
        for row in self._old:
            system = known_systems.get(row["name"])
            if system is None:
                continue
            measurement = here.get(row["task"]) or _recorded(row)
            if measurement is None:
                continue
            key = measurement.key(run, system)
            if run.dir.is_done(_stage(system.name, measurement.label), key):
                self._rows[system.name, row["task"]] = row
                self._known[system.key, row["task"]] = row

    def missing(self, system: System) -> list[Measurement]:
        """Return what a system is not yet scored on."""
        return [m for m in self.measurements if (system.name, m.label) not in self._rows]

    def lacks(self, system: System) -> bool:
        """Tell whether a system is to be scored on anything."""
        return bool(self.missing(system))

    def twin(self, system: System, measurement: Measurement) -> dict[str, Any] | None:
        """Return the row of a system that is the same network."""
        row = self._known.get((system.key, measurement.label))
        return None if row is None else dict(row)

    def add(self, system: System, row: dict[str, Any]) -> None:
        """Keep a row, on disk too."""
        self._rows[system.name, row["task"]] = row
        self._known[system.key, row["task"]] = row
        self.save()

    def save(self) -> None:
        """Write the rows in the order of systems and tasks, if they changed."""
        names = [system.name for system in systems(self.run)]
        labels = [task.label for task in self.run.recipe.report_tasks]
        labels += [task for _, task in self._rows if task not in labels]
        places = sorted(
            self._rows, key=lambda place: (names.index(place[0]), labels.index(place[1]))
        )
        rows = [{field: self._rows[p].get(field) for field in _FIELDS} for p in places]
        if rows != self._old:
            self.run.dir.set_metrics(rows)
            self._old = rows


def _stage(system: str, label: str) -> str:
    return f"evaluate/{system}/{label}"


def _recorded(row: dict[str, Any]) -> Measurement | None:
    """Return the measurement that an earlier command made a row by, if the row tells it."""
    if row.get("options") is None:
        return None
    return Measurement(row["task"], row["options"], lambda *_: {}, recorded=True)


def _share_predictions(run: Run, label: str, giver: str, taker: str) -> None:
    """Give the answers of one system to another that is the same sub-network."""
    source = run.dir.prediction_file(giver, label)
    target = run.dir.prediction_file(taker, label)
    remove(target)
    if source.exists():
        write_text(target, source.read_text(encoding="utf-8"))


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
        if isinstance(loaded, WholeModel):
            loaded = loaded.model
        if isinstance(loaded, SuperNetwork):
            config = system.config or loaded.space.largest()
            if run.recipe.merges and (run.recipe.cuts_base or loaded.keep != "nothing"):
                # Then all systems are alike: a baseline's LoRA is added to its weights, too.
                model = extract_model(loaded, config).model
                yield system, model, config, model_cost(model, tokens)
                continue
            loaded.activate(config)
            yield system, loaded.model, config, CostModel(loaded, tokens)(config)
        else:
            yield system, loaded, None, model_cost(loaded, tokens)


def _timed(
    run: Run, name: str, model: PreTrainedModel, measurement: Measurement, key: str
) -> dict[str, Any]:
    """Score one model on one task, with its latency if the recipe asks for it."""
    latency: dict[str, float | None] = {"latency_ms": None, "decode_latency_ms": None}
    if run.recipe.evaluate.latency:
        found = measure_latency(model, Conditions(prompt_tokens=run.recipe.evaluate.macs_length))
        decode = found.decode_ms_per_token
        latency["latency_ms"] = round(found.prefill_ms, 3)
        latency["decode_latency_ms"] = None if decode is None else round(decode, 3)
    return measurement.score(name, model, key) | latency


def _score_task(
    run: Run, cfg: TaskConfig, name: str, model: PreTrainedModel, key: str
) -> dict[str, Any]:
    """Score one model on one report task."""
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
            key=key,
        )
    return score_row(score) | {"notes": task.notes or None}


def score_row(score: Score) -> dict[str, Any]:
    """Return the fields of a row that a score fills."""
    return {
        "metric": score.metric,
        "score": score.value,
        "stderr": score.stderr,
        "n": score.n,
        "other_metrics": [
            {"metric": m.metric, "score": m.value, "stderr": m.stderr, "n": m.n}
            for m in score.others
        ],
        "seconds": round(score.seconds, 2),
    }


_FIELDS = [
    "name",
    "task",
    "metric",
    "score",
    "stderr",
    "n",
    "other_metrics",
    "params",
    "nonzero",
    "macs",
    "latency_ms",
    "decode_latency_ms",
    "seconds",
    "config",
    "notes",
    "options",
]
