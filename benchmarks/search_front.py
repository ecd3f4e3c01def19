"""What a Pareto front costs: hypervolume against the work spent on evaluations, by algorithm.

Each algorithm searches the same trained super-network for the loss on validation examples against
the blocks' MACs, once plainly (every configuration on all examples, nothing reused) and once as
`elastune search` does it (races, hidden states and merged adapters used again). Work is counted in
whole evaluations of the largest sub-network on all examples; single-choice losses that an algorithm
asks for are counted, too. A front holds what was measured on all examples, never an estimate.

- cost_to_match_nsga2: work until `auto` (cheap) has the hypervolume that plain nsga2 ends with, as
  a part of all of nsga2's; median over seeds, null where it never has. For the others by name.

`milp` and `auto` begin with single-choice losses estimated from a backward pass, counted as three
evaluations of the probes, or with --losses measured one by one.

The super-network is that of a run directory, or else, for anyone, SmolLM2-135M whose feed-forward
widths and heads are elastic, sorted by Wanda and not trained.

    python benchmarks/search_front.py [RUN] [--quick] [--trials 200] [--examples 256] [--probes 16]
        [--losses measured] [--seeds 0 1 2] [--searches nsga2/plain auto/cheap] [--shortest]
        [--out FOLDER]

With --out each finished search is kept there, a killed benchmark goes on, and front.svg is drawn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import moocore
import numpy as np
from data_folder import add_data_option
from rich.console import Console
from rich.status import Status
from rich.table import Table

from elastune.allocate import Losses, single_choice_losses
from elastune.artifacts import RunDirectory
from elastune.budgets import cost_model
from elastune.build_structure import structure_space
from elastune.calibration_text import calibration_texts
from elastune.cost import CostModel
from elastune.data import calibration_rows
from elastune.estimate_losses import estimate_choice_losses
from elastune.heads import HEADS
from elastune.importance.structure import structure_scores
from elastune.models import load_model
from elastune.objective import ValidationObjective, make_objective
from elastune.progress import Reporter
from elastune.reorder import reorder_
from elastune.run import Run
from elastune.search import ALGORITHMS, Known, Measurement, Trial, search
from elastune.space import SearchSpace, SubnetConfig
from elastune.supernet import SuperNetwork
from elastune.tasks import get_task

COST = "block_macs"
VALUES = ("loss", COST)
WITH_LOSSES = ("auto", "milp")
MODES = ("cheap", "plain")  # in this order plain searches find measured what cheap ones tried


@dataclass
class Subject:
    """What is searched, and what measures it."""

    net: SuperNetwork
    tokenizer: Any
    task: Any
    examples: Sequence[Any]
    probes: int
    costs: Callable[[SubnetConfig], Mapping[str, float]]
    batch_tokens: int = 4096

    def plain(self, n: int | None = None) -> Plain:
        """Return a plain objective over the first ``n`` examples."""
        return Plain(self._measuring(n, race=False), self.costs(self.net.space.largest())[COST])

    def cheap(self, n: int | None = None) -> ValidationObjective:
        """Return an objective as searches have it, over the first ``n`` examples."""
        return self._measuring(n, race=True)

    def _measuring(self, n: int | None, *, race: bool) -> ValidationObjective:
        return make_objective(
            self.net,
            self.tokenizer,
            self.task,
            self.examples[:n],
            self.costs,
            kind="loss",
            against=COST,
            batch_tokens=self.batch_tokens,
            race=race,
        )[0]


class Plain:
    """Measures without races, and counts what that takes where nothing is used again.

    Hidden states are used again all the same, and each configuration is measured once for all
    searches: neither changes a loss by more than rounding, and the work is known anyway.
    """

    def __init__(self, objective: ValidationObjective, largest: float) -> None:
        self._objective = objective
        self._largest = largest
        self._known: dict[SubnetConfig, Measurement] = {}

    def __call__(self, config: SubnetConfig) -> Mapping[str, float]:
        return self.measure(config, ()).values

    def measure(self, config: SubnetConfig, rivals: Sequence[Trial]) -> Measurement:
        if config not in self._known:
            self.learn(config, self._objective.measure(config, ()))
        return self._known[config]

    def learn(self, config: SubnetConfig, found: Measurement) -> None:
        """Take what was measured on all examples, in whatever way, as measured plainly."""
        work = found.values[COST] / self._largest
        self._known[config] = replace(found, equivalents=work)


@dataclass
class Taught:
    """A cheap objective; a plain one learns what it measures on all examples."""

    cheap: ValidationObjective
    plain: Plain

    def __call__(self, config: SubnetConfig) -> Mapping[str, float]:
        return self.measure(config, ()).values

    def measure(self, config: SubnetConfig, rivals: Sequence[Trial]) -> Measurement:
        found = self.cheap.measure(config, rivals)
        if not found.dropped:
            self.plain.learn(config, found)
        return found


def main() -> None:
    args = _arguments()
    console = Console(width=110)
    subject = of_run(args) if args.run else untrained(args)
    console.print(f"{subject.net.space}, {len(subject.examples)} examples")
    subject.cheap()(subject.net.space.largest())  # warms up
    kept = _Kept(args.out, _conditions(args))
    losses: dict[str, Beginning] = {}
    make = estimated if args.losses == "estimated" else measured
    plain = subject.plain()
    for seed in args.seeds:
        for search_name in args.searches:
            key = f"{search_name}/{seed}"
            if key in kept.rows:
                continue
            algorithm, mode = search_name.split("/")
            started = time.perf_counter()
            if algorithm in WITH_LOSSES and mode not in losses:
                losses[mode] = make(subject, mode)
            objective = plain if mode == "plain" else Taught(subject.cheap(), plain)
            begin = losses[mode] if algorithm in WITH_LOSSES else None
            with console.status(key) as status:
                told = partial(_tell, status, key)
                row = _search(subject, objective, algorithm, seed, begin, args.trials, told)
            kept.add(key, row)
            console.print(
                f"{key}: {sum(t[2] for t in row['trials']) + row['before']:.1f} evaluations, "
                f"{sum(t[3] for t in row['trials'])} dropped, "
                f"{time.perf_counter() - started:.0f} s"
            )
    figures = _figures(kept.rows, args)
    _show(console, kept.rows, figures)
    if args.out is not None:
        _draw(kept.rows, args, args.out / "front.svg")
    print(json.dumps({"benchmark": "search_front", "figures": figures}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument(
        "run", type=Path, nargs="?", help="run directory of a trained super-network"
    )
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--probes", type=int, default=16, help="examples of single-choice losses")
    parser.add_argument("--losses", choices=("estimated", "measured"), default="estimated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    known = [f"{name}/{mode}" for name in ("random", "nsga2", "milp", "auto") for mode in MODES]
    every = [f"{name}/{mode}" for name in sorted(ALGORITHMS) for mode in MODES]
    parser.add_argument("--searches", nargs="+", choices=every, metavar="NAME/MODE", default=known)
    parser.add_argument("--shortest", action="store_true", help="the shortest of a run's examples")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="widths alone, 12 trials, 8 examples, two searches"
    )
    args = parser.parse_args()
    if args.quick:
        args.trials, args.examples, args.seeds, args.probes = 12, 8, [0], 4
        args.searches = ["nsga2/plain", "auto/cheap"]
    return args


def of_run(args: argparse.Namespace) -> Subject:
    directory = RunDirectory(args.run)
    run = Run(directory, directory.recipe(), Reporter())
    net = run.load_supernet()
    count = cost_model(run, net)
    task = run.task(run.recipe.task)
    examples = list(run.splits.validation)
    if args.shortest:
        examples.sort(key=lambda e: len(e.prompt + e.completion))
    examples = examples[: args.examples]
    return Subject(net, run.tokenizer, task, examples, args.probes, lambda c: vars(count(c)))


def untrained(args: argparse.Namespace) -> Subject:
    model, tokenizer = load_model("smollm2-135m")
    texts = calibration_texts("c4", args.data)
    rows = calibration_rows(texts, tokenizer, n_sequences=8, length=128, seed=0)
    reorder_(model, structure_scores(model, rows, method="wanda"))
    sizes: dict[str, Any] = {"ffn": [1.0, 0.9, 0.8, 0.7], "heads": [1.0, 0.67]}
    if args.quick:
        sizes = {"ffn": [1.0, 0.7]}
    net = SuperNetwork(model, structure_space(model, **sizes, round_to=32))
    task = get_task("math_instruct", data_dir=args.data, tokenizer=tokenizer)
    examples = sorted(task.train_examples(), key=lambda e: len(e.prompt + e.completion))
    chosen = examples[: args.examples]
    count = CostModel(net, 128)
    return Subject(net, tokenizer, task, chosen, args.probes, lambda c: vars(count(c)))


class Beginning(NamedTuple):
    """What a search is told beforehand, and the whole evaluations that it took."""

    losses: Losses
    work: float


def estimated(subject: Subject, mode: str, *, everywhere: bool = True) -> Beginning:
    """Estimate single-choice losses, each example in another sub-network or all in the largest."""
    head = HEADS[subject.task.head]
    length = getattr(subject.task, "max_length", 1024)
    items = head.encode(subject.examples[: subject.probes], subject.tokenizer, length)
    losses = estimate_choice_losses(
        subject.net,
        [head.collate([item]) for item in items],
        head,
        cost_of=(lambda config: float(subject.costs(config)[COST])) if everywhere else None,
    )
    # A backward pass costs two forward passes.
    return Beginning(losses, 3 * len(items) / len(subject.examples))


def measured(subject: Subject, mode: str) -> Beginning:
    """Measure single-choice losses one by one."""
    objective = subject.plain(subject.probes) if mode == "plain" else subject.cheap(subject.probes)
    largest = subject.net.space.largest()
    parts = SearchSpace([dim for dim in subject.net.space.dims if dim.kind != "rank"])
    work = 0.0

    def loss(config: SubnetConfig) -> float:
        nonlocal work
        found = objective.measure(SubnetConfig({**largest, **config}), ())
        work += found.equivalents
        return found.values["loss"]

    losses = single_choice_losses(loss, parts)
    share = min(subject.probes, len(subject.examples)) / len(subject.examples)
    return Beginning(losses, work * share)


def _search(
    subject: Subject,
    objective: Any,
    algorithm: str,
    seed: int,
    begin: Beginning | None,
    trials: int,
    told: Callable[[int, int, Trial], None],
) -> dict[str, Any]:
    """Search once; return the work before it, and loss, cost, work and fate of each trial."""
    found = search(
        subject.net.space,
        objective,
        values=VALUES,
        algorithm=algorithm,
        trials=trials,
        seed=seed,
        known=Known(VALUES, subject.costs, begin.losses if begin else None),
        progress=told,
    )
    rows = [[t.values["loss"], t.values[COST], t.equivalents, t.dropped] for t in found.trials]
    return {"before": begin.work if begin else 0.0, "trials": rows}


def _tell(status: Status, key: str, done: int, total: int, _: Trial) -> None:
    status.update(f"{key}: {done}/{total} trials")


class _Kept:
    """Searches that are done, in a file where there is a folder; all under the same conditions."""

    def __init__(self, folder: Path | None, conditions: Mapping[str, Any]) -> None:
        self._path = None if folder is None else folder / "searches.jsonl"
        self.rows: dict[str, dict[str, Any]] = {}
        if self._path is None:
            return
        if not self._path.exists():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(conditions) + "\n")
        first, *rows = map(json.loads, self._path.read_text().splitlines())
        if first != conditions:
            raise SystemExit(f"{self._path} is of {first}, and this is {conditions}: another --out")
        self.rows = {row["search"]: row for row in rows}

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = {"search": key, **row}
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(self.rows[key]) + "\n")


def _conditions(args: argparse.Namespace) -> dict[str, Any]:
    """Return what searches must share to be compared."""
    subject = "smollm2-135m" if args.run is None else str(args.run.resolve())
    names = ("trials", "examples", "probes", "losses", "shortest")
    return {"run": subject} | {name: getattr(args, name) for name in names}


def _curves(rows: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return for each search its work so far and its hypervolume, after each trial.

    Both values are put on a scale from 0, the least that any search saw, to 1, the most, which is
    the reference point.
    """
    seen = np.array([t[:2] for row in rows.values() for t in row["trials"] if not t[3]])
    low, high = seen.min(axis=0), seen.max(axis=0)
    curves = {}
    for key, row in rows.items():
        points, work, curve = [], row["before"], []
        for loss, cost, equivalents, dropped in row["trials"]:
            work += equivalents
            if not dropped:
                points.append((np.array([loss, cost]) - low) / (high - low))
            curve.append((work, moocore.hypervolume(np.array(points), ref=[1.0, 1.0])))
        curves[key] = np.array(curve)
    return curves


def _figures(rows: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    curves = _curves(rows)
    figures: dict[str, Any] = {"cost_to_match_nsga2": None}
    for search_name in args.searches:
        own = [curves[f"{search_name}/{seed}"] for seed in args.seeds]
        name = search_name.replace("/", "_")
        figures[f"hypervolume_{name}"] = statistics.median(curve[-1, 1] for curve in own)
        figures[f"evaluations_{name}"] = statistics.median(curve[-1, 0] for curve in own)
        if "nsga2/plain" in args.searches:
            figures[f"to_match_{name}"] = _to_match(curves, own, args.seeds)
    figures["cost_to_match_nsga2"] = figures.get("to_match_auto_cheap")
    return figures


def _to_match(
    curves: Mapping[str, np.ndarray], own: Sequence[np.ndarray], seeds: Sequence[int]
) -> float | None:
    """Return the part of plain nsga2's work after which its last hypervolume is reached."""
    parts = []
    for seed, curve in zip(seeds, own, strict=True):
        work, aim = curves[f"nsga2/plain/{seed}"][-1]
        reached = np.flatnonzero(curve[:, 1] >= aim)
        parts.append(curve[reached[0], 0] / work if len(reached) else float("inf"))
    middle = statistics.median(parts)
    return float(middle) if np.isfinite(middle) else None


def _show(console: Console, rows: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    table = Table(title="fronts, and what they cost (medians over seeds)")
    for column in ("search", "hypervolume", "evaluations", "of nsga2's to match it"):
        table.add_column(column, justify="left" if column == "search" else "right")
    for name in (n.removeprefix("evaluations_") for n in figures if n.startswith("evaluations_")):
        part = figures.get(f"to_match_{name}")
        table.add_row(
            name.replace("_", ", "),
            f"{figures[f'hypervolume_{name}']:.4f}",
            f"{figures[f'evaluations_{name}']:.1f}",
            "never" if part is None else f"{part:.1%}",
        )
    console.print(table)


def _draw(rows: Mapping[str, Any], args: argparse.Namespace, path: Path) -> None:
    """Draw the median hypervolume over the work, a line a search."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    curves = _curves(rows)
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    most = max(curve[-1, 0] for curve in curves.values())
    works = np.geomspace(0.5, most, 200)
    algorithms = list(dict.fromkeys(name.split("/")[0] for name in args.searches))
    for search_name in args.searches:
        algorithm, mode = search_name.split("/")
        own = [curves[f"{search_name}/{seed}"] for seed in args.seeds]
        steps = [[c[c[:, 0] <= w, 1].max(initial=0.0) for w in works] for c in own]
        ends = max(curve[-1, 0] for curve in own)
        middle = np.where(works <= ends, np.median(steps, axis=0), np.nan)
        style = {"plain": "--", "cheap": "-"}[mode]
        color = f"C{algorithms.index(algorithm)}"
        axes.plot(works, middle, style, color=color, label=f"{algorithm}, {mode}")
    axes.set(xscale="log", xlabel="whole evaluations", ylabel="hypervolume")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
