"""The stage that looks for sub-networks of a trained super-network, on the validation examples.

What is reported is measured elsewhere (`elastune.measure`), on examples that no search has seen.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np

from elastune.budgets import budgeted, single_choices
from elastune.evaluate import evaluate
from elastune.files import read_json, write_json
from elastune.objective import make_objective
from elastune.run import Run
from elastune.search import Known, SearchResult, Trial, additivity
from elastune.search import search as search_space
from elastune.search.limits import (
    Limit,
    limits_of_quality,
    parse_limits,
    resolve,
    violation,
)
from elastune.search_costs import full_costs, search_costs
from elastune.space import SearchSpace, SubnetConfig

_WITH_LOSSES = ("auto", "milp")
_PROBES = 16  # examples of single choices where no section structure says how many
"""Algorithms that begin from single-choice losses."""
_DRAWS = 2000


class SearchWork:
    """One search of a run: what is measured, what is known beforehand, and where trials are kept.

    Args:
        run: whose super-network is trained.
        limits: what the best must keep; by default those of the recipe.
        budgets: bounds on the cost that sub-networks are wanted for, as parts of the full one.
    """

    def __init__(
        self, run: Run, limits: Sequence[str] | None = None, budgets: Sequence[float] = ()
    ) -> None:
        self.run = run
        self.cfg = run.recipe.search
        texts = self.cfg.limits if limits is None else limits
        self.limits: tuple[Limit, ...] = parse_limits(texts) if texts else ()
        self.budgets = budgets
        self.net = run.load_supernet()
        self._task = run.task(run.recipe.task)

    @cached_property
    def known(self) -> Known:
        """What algorithms are told beforehand; measured where it is not on disk yet."""
        full = full_costs(self.run, self._cost_names)
        by_hand = self.run.recipe.structure.budgets if self.run.recipe.structure else []
        parts = [*self.budgets, *(by_hand if self.cfg.cost == "block_macs" else [])]
        return Known(
            values=self.values,
            costs=self.costs,
            losses=self._losses,
            budgets=tuple(part * full[self.cfg.cost] for part in parts),
            limits=self.bounds,
            population=self.cfg.population,
            reference_points=tuple(map(tuple, self.cfg.reference_points)),  # type: ignore[arg-type]
        )

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the objectives."""
        return self._made[1]

    @cached_property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """The limits in the units of the trials' values."""
        references = {"dense": dict(full_costs(self.run, self._cost_names))}
        for limit in self.limits:
            if limit.name == "score" and limit.of is not None:
                references.setdefault(limit.of, {})["score"] = self._score_of(limit.of)
        found = resolve(self.limits, references)
        return limits_of_quality(
            found, self.values[0], higher_is_better=self._task.higher_is_better
        )

    def missed(self, trial: Trial) -> dict[str, tuple[float, float]]:
        """Return the limits that a trial misses: name -> (its value, the bound)."""
        found = {}
        values = {**self.costs(trial.config), **trial.measured, **trial.values}
        for name, (low, high) in self.bounds.items():
            if name in values and violation(values, {name: (low, high)}) > 0:
                found[name] = (values[name], high if values[name] > high else low)
        return found

    @cached_property
    def objective(self) -> Any:
        """Measures a configuration on the validation examples."""
        return self._made[0]

    @property
    def study(self) -> str:
        """Name of the trials in their storage: the same figures, the same trials."""
        return f"elastune-{self.run.inputs('trials')}"

    @property
    def storage(self) -> Any:
        """Where trials are kept."""
        return self.cfg.storage or self.run.dir.journal

    def search(self, trials: int, start: Sequence[SubnetConfig] = (), bar: Any = None) -> Any:
        """Go on until there are so many trials; those of earlier searches count."""
        quality = self.values[0]

        def progress(done: int, total: int, trial: Trial) -> None:
            best.append(trial.values[quality])
            bar(done, total, f"best {quality} {np.nanmin(best):.4f}")

        best: list[float] = []
        return search_space(
            self.net.space,
            self.objective,
            values=self.values,
            algorithm=self.cfg.algorithm,
            trials=trials,
            storage=self.storage,
            study=self.study,
            seed=self.run.recipe.seed,
            start=start,
            known=self.known,
            progress=progress if bar is not None else None,
            seconds=None if self.cfg.hours is None else 3600 * self.cfg.hours,
        )

    def search_at_random(self) -> SearchResult:
        """Measure a few random sub-networks within the limits: what luck alone would find."""
        rng = np.random.default_rng((self.run.recipe.seed, self.cfg.random))
        bounds = self.known.limits
        drawn: dict[SubnetConfig, None] = {}
        for _ in range(_DRAWS):
            if len(drawn) >= min(self.cfg.random, self.net.space.size):
                break
            config = self.net.space.sample(rng)
            costs = self.costs(config)
            if all(low <= costs.get(n, low) <= high for n, (low, high) in bounds.items()):
                drawn[config] = None
        if not drawn:
            return SearchResult(())
        return search_space(
            self.net.space,
            lambda config: self.objective(config),  # without a race
            values=self.values,
            algorithm="random",
            trials=len(drawn),
            storage=self.storage,
            study=f"{self.study}-random",
            seed=self.run.recipe.seed,
            start=[*drawn],
        )

    @property
    def _cost_names(self) -> set[str]:
        return {self.cfg.cost, *(limit.name for limit in self.limits)}

    @cached_property
    def costs(self) -> Any:
        """Configuration -> every cost, by name."""
        return search_costs(self.run, self.net, self._cost_names)

    @cached_property
    def _made(self) -> tuple[Any, tuple[str, ...]]:
        return make_objective(
            self.net,
            self.run.tokenizer,
            self._task,
            self.run.splits.validation,
            self.costs,
            kind=self.cfg.objective,
            against=self.cfg.cost,
            batch_tokens=self.run.recipe.evaluate.batch_tokens,
            race=self.cfg.race,
            reuse=self.cfg.reuse,
        )

    @cached_property
    def _losses(self) -> dict[str, dict[int, float]] | None:
        recipe = self.run.recipe
        if not recipe.cuts_base or self.cfg.algorithm not in _WITH_LOSSES:
            return None
        parts = SearchSpace([dim for dim in self.net.space.dims if dim.kind != "rank"])
        probes = recipe.structure.probes if recipe.structure else _PROBES
        return single_choices(self.run, self.net, parts, probes)

    def _score_of(self, name: str) -> float:
        """Score a system on the validation examples."""
        inputs = self.run.inputs("reference scores", name)
        stage = f"reference score/{name}"
        path = self.run.dir.reference_scores
        known: dict[str, float] = read_json(path)["scores"] if path.exists() else {}
        if not self.run.dir.is_done(stage, inputs):
            model = self._system(name)
            with self.run.dir.stage(stage, inputs):
                score = evaluate(
                    model,
                    self.run.tokenizer,
                    self._task,
                    self.run.splits.validation,
                    batch_tokens=self.run.recipe.evaluate.batch_tokens,
                )
                known[name] = score.value
                write_json(path, {"schema": 1, "scores": known})
        return known[name]

    def _system(self, name: str) -> Any:
        if name in ("largest", "heuristic", "smallest"):
            self.net.activate(getattr(self.net.space, name)())
            return self.net.model
        if name == "dense":
            return self.run.load_dense()[0]
        return self.run.load_baseline(name).model


def search(run: Run) -> SearchResult:
    """Score configurations on the validation examples; none where the recipe has no trials."""
    cfg = run.recipe.search
    if cfg.trials == 0:
        return SearchResult(())
    inputs = run.inputs("search")
    if run.dir.is_done("search", inputs):
        return SearchResult.from_dict(read_json(run.dir.trials))
    work = SearchWork(run)
    started = time.monotonic()
    _ = work.known  # prepared before other workers ask for it
    start = [*budgeted(run).values()]
    with (
        run.dir.stage("search", inputs, run.dir.trials),
        run.reporter.bar(f"search ({cfg.algorithm})", "trials") as bar,
        _other_workers(run),
    ):
        result = work.search(cfg.trials, start, bar)
        write_json(run.dir.trials, result.to_dict() | {"about": _about(work, result, started)})
    return result


def search_as_worker(run: Run) -> None:
    """Take part in a search that another process has begun; only the storage is written to."""
    work = SearchWork(run)
    work.search(run.recipe.search.trials, [*budgeted(run).values()])


@contextmanager
def _other_workers(run: Run) -> Iterator[None]:
    """Start the other processes of a search, and see that none outlives it."""
    count = run.recipe.search.workers
    threads = max(1, (os.cpu_count() or 1) // count)
    command = [sys.executable, "-m", "elastune", "work", str(run.dir.root)]
    workers = []
    for number in range(1, count):
        own = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": _device(number)}
        workers.append(subprocess.Popen(command, env={**os.environ, **own}))
    try:
        yield
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()


def _device(number: int) -> str:
    """Return the GPU of a worker: each its own as long as there are enough."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        visible = ",".join(map(str, range(torch.cuda.device_count())))
    names = [name for name in visible.split(",") if name]
    return names[number % len(names)] if names else ""


def _about(work: SearchWork, result: SearchResult, started: float) -> dict[str, Any]:
    """Return what the report tells of a search, and the random sub-networks it is held against."""
    known = work.known
    chance = work.search_at_random()
    return {
        "algorithm": work.cfg.algorithm,
        "seconds": round(time.monotonic() - started, 2),
        "equivalents": round(sum(trial.equivalents for trial in result.trials), 3),
        "examples": len(work.run.splits.validation),
        "limits": [str(limit) for limit in work.limits],
        "bounds": {name: _finite(pair) for name, pair in known.limits.items()},
        "additivity": _additivity(work, result),
        "random": chance.to_dict()["trials"],
    }


def _additivity(work: SearchWork, result: SearchResult) -> dict[str, float | None] | None:
    """Return how well single-choice losses told those of whole sub-networks."""
    losses = work.known.losses
    if not losses:
        return None
    found = additivity(work.net.space, losses, result.trials)._asdict()
    return dict(zip(found, _finite(found.values()), strict=True))


def _finite(values: Iterable[float]) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in values]
