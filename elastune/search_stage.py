"""The stage that looks for sub-networks of a trained super-network, on the validation examples.

What is reported is measured elsewhere (`elastune.measure`), on examples that no search has seen.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from elastune.allocate import Losses
from elastune.budgets import budgeted, estimated_choices, single_choices
from elastune.files import read_json, write_json
from elastune.inputs import stage_inputs
from elastune.objective import make_objective
from elastune.race import ERROR_RATE, is_worse
from elastune.run import Run
from elastune.search import Known, Measurement, SearchResult, Trial, additivity
from elastune.search import search as search_space
from elastune.search.limits import (
    Limit,
    limits_of_quality,
    resolve,
    violation,
)
from elastune.search.stored import check_storage, stored_trials
from elastune.search_costs import full_costs, search_costs
from elastune.search_limits import COSTS, QUALITIES, check_limits, quality_of
from elastune.search_workers import other_workers
from elastune.space import SearchSpace, SubnetConfig

_PROBES = 16  # examples of single choices where no section structure says how many
_DRAWS = 2000


class SearchWork:
    """One search of a run: what is measured, what is known beforehand, and where trials are kept.

    Args:
        run: whose super-network is trained.
        limits: what the best must keep; by default those of the recipe.
        budgets: bounds on the cost that sub-networks are wanted for, as parts of the full one.

    Raises:
        BadRecipe: a limit on what the search does not measure, or relative to an unknown system.
    """

    def __init__(
        self, run: Run, limits: Sequence[str | Limit] | None = None, budgets: Sequence[float] = ()
    ) -> None:
        self.run = run
        self.cfg = run.recipe.search
        texts = self.cfg.limits if limits is None else limits
        self.limits: tuple[Limit, ...] = check_limits(self.cfg, texts, run.recipe.baselines)
        self.budgets = budgets
        self.net = run.load_supernet()
        self._task = run.task(run.recipe.task)

    def within(self, limits: Sequence[str | Limit], budgets: Sequence[float]) -> SearchWork:
        """Return the same work for other limits on the same values: what is loaded is shared."""
        other = copy.copy(self)
        other.limits = check_limits(self.cfg, limits, self.run.recipe.baselines)
        other.budgets = budgets
        for name in ("known", "bounds"):
            other.__dict__.pop(name, None)
        return other

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
            if limit.name in QUALITIES and limit.of is not None:
                found = quality_of(self.run, limit.of, limit.name, partial(self._named, limit.name))
                references.setdefault(limit.of, {})[limit.name] = found
        return limits_of_quality(
            resolve(self.limits, references),
            self.values[0],
            higher_is_better=self._task.higher_is_better,
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
        return self._study_along(self.cfg.cost)

    def _study_along(self, cost: str) -> str:
        recipe = self.run.recipe
        cfg = recipe.search.model_copy(update={"cost": cost})
        recipe = recipe.model_copy(update={"search": cfg})
        return f"elastune-{stage_inputs(recipe, 'trials', self.run.dir.sources(recipe))}"

    def _named(self, quality: str, name: str) -> float:
        """Measure a named sub-network."""
        return float(self.objective(getattr(self.net.space, name)())[quality])

    @cached_property
    def elsewhere(self) -> dict[SubnetConfig, Measurement]:
        """What searches of this run along other costs have measured, which is not done again.

        What a race dropped there is dropped here only where the same test says so of a trial that
        is no dearer here; it is left out otherwise.
        """
        quality = self.values[0]
        studies = {self._study_along(c): (quality, c) for c in COSTS if c != self.cfg.cost}
        found = stored_trials(self.storage, studies)
        whole = [trial for trial in found if not trial.failed and not trial.dropped]
        kept: dict[SubnetConfig, Measurement] = {}
        for trial in sorted(found, key=lambda trial: trial.dropped):  # whole ones first
            if trial.config in kept or (trial.dropped and not self._is_beaten(trial, whole)):
                continue
            values = {**trial.measured, **trial.values, **self.costs(trial.config)}
            kept[trial.config] = Measurement(values, trial.dropped, trial.outcomes, 0.0)
        return kept

    def _is_beaten(self, trial: Trial, whole: Iterable[Trial]) -> bool:
        """Tell whether a trial is no dearer than one that was dropped, and surely better."""
        if trial.outcomes is None:
            return False
        seen = np.isfinite(trial.outcomes)
        cost = self.costs(trial.config)[self.cfg.cost]
        return any(
            rival.outcomes is not None
            and self.costs(rival.config)[self.cfg.cost] <= cost
            and is_worse((trial.outcomes - rival.outcomes)[seen], ERROR_RATE)
            for rival in whole
        )

    @property
    def storage(self) -> Any:
        """Where trials are kept."""
        return self.cfg.storage or self.run.dir.journal

    def search(self, trials: int, start: Sequence[SubnetConfig] = (), bar: Any = None) -> Any:
        """Go on until there are so many trials; those of earlier searches along this cost count."""
        quality = self.values[0]

        def progress(done: int, total: int, trial: Trial) -> None:
            best.append(trial.values[quality])
            bar(done, total, f"best {quality} {np.nanmin(best):.4f}")

        best: list[float] = []
        return search_space(
            self.net.space,
            _Remembering(self.objective, self.elsewhere) if self.elsewhere else self.objective,
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
        with self.run.reporter.bar("random, to compare with", "trials") as bar:
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
                progress=lambda done, total, _: bar(done, total),
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
    def _losses(self) -> Losses | None:
        recipe, source = self.run.recipe, self.cfg.losses_from
        if source == "estimated":
            cost = self.cfg.cost
            return estimated_choices(
                self.run, self.net, self._probes, cost, lambda c: float(self.costs(c)[cost])
            )
        if source == "nothing" or not recipe.cuts_base:
            return None
        parts = SearchSpace([dim for dim in self.net.space.dims if dim.kind != "rank"])
        return single_choices(self.run, self.net, parts, self._probes)

    @property
    def _probes(self) -> int:
        structure = self.run.recipe.structure
        return structure.probes if structure else _PROBES


class _Remembering:
    """An objective that does not measure again what is known."""

    def __init__(self, objective: Any, known: Mapping[SubnetConfig, Measurement]) -> None:
        self._objective = objective
        self._known = known

    def __call__(self, config: SubnetConfig) -> Mapping[str, float]:
        return self.measure(config, ()).values

    def measure(self, config: SubnetConfig, rivals: Sequence[Trial]) -> Measurement:
        """Return what is known, or measure."""
        found = self._known.get(config)
        return self._objective.measure(config, rivals) if found is None else found


def search(run: Run) -> SearchResult:
    """Score configurations on the validation examples; none where the recipe has no trials."""
    cfg = run.recipe.search
    if cfg.trials == 0:
        return SearchResult(())
    inputs = run.inputs("search")
    if run.dir.is_done("search", inputs):
        return SearchResult.from_dict(read_json(run.dir.trials))
    check_storage(cfg.storage)  # before the recipe is kept
    work = SearchWork(run)
    started = time.monotonic()
    _ = work.known  # prepared before other workers ask for it
    start = [*budgeted(run).values()]
    with run.dir.stage("search", inputs, run.dir.trials):
        with run.reporter.bar(f"search ({cfg.algorithm})", "trials") as bar, other_workers(run):
            result = work.search(cfg.trials, start, bar)
        write_json(run.dir.trials, result.to_dict() | {"about": _about(work, result, started)})
    return result


def search_as_worker(run: Run) -> None:
    """Take part in a search that another process has begun; only the storage is written to."""
    work = SearchWork(run)
    work.search(run.recipe.search.trials, [*budgeted(run).values()])


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
        "missed": work.missed(result.best_within(known.limits)),
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
