"""One super-network, many budgets: a sub-network for limits that are named after the training.

The trials of the run's search are asked first; a few more, aimed at the limits, are added to them.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastune.budgets import budgeted
from elastune.choose import ONLY_SCORED, targeted
from elastune.errors import BadRecipe
from elastune.files import read_json, write_json
from elastune.run import Run
from elastune.search.base import SearchResult, Trial
from elastune.search.limits import Limit, parse_limits, resolve
from elastune.search_costs import LATENCIES, full_costs
from elastune.search_limits import COSTS, check_limits
from elastune.search_stage import SearchWork
from elastune.space import SubnetConfig

SLACK = 0.02
"""Part of a bound on cost that may be left unused before more trials are made."""


@dataclass(frozen=True)
class Target:
    """What was chosen for some limits.

    Attributes:
        name: of the sub-network in the run.
        limits: as text.
        trial: the sub-network, with what was measured on the validation examples.
        missed: name of a value -> (its value, its bound), for limits that nothing found keeps.
    """

    name: str
    limits: tuple[str, ...]
    trial: Trial
    missed: dict[str, tuple[float, float]]

    @property
    def config(self) -> SubnetConfig:
        """The configuration."""
        return self.trial.config

    @property
    def values(self) -> dict[str, float]:
        """All that was measured and counted of it."""
        return {**self.trial.measured, **self.trial.values}

    @property
    def bounded(self) -> str:
        """Name of the value that the first limit is on."""
        return parse_limits(self.limits)[0].name


def find_target(
    run: Run,
    limits: Sequence[str],
    *,
    trials: int = 8,
    name: str | None = None,
    must: bool = False,
) -> Target:
    """Choose the best sub-network within limits, and keep it under a name of its own.

    The trials of all searches of the run are asked first, along whatever cost they were. The same
    limits again choose anew, and add only the trials by which ``trials`` is more than before.

    Args:
        run: whose super-network is trained.
        limits: such as ``["latency<=0.5x", "score>=dense-1"]``.
        trials: most that are added to those of earlier searches, where these come nowhere near.
        name: of the sub-network; made from the limits by default.
        must: refuse limits that nothing keeps, and keep nothing under the name.

    Returns:
        The best within the limits; where there is none, the one that misses them least.

    Raises:
        BadRecipe: limits that cannot be read, or that nothing keeps and must; a name that is taken.
    """
    parsed = parse_limits(limits)
    name = target_name(run, parsed, name)
    work, begun = _work(run, parsed), _searched(run, parsed)
    above = _impossible(work) if must else ""
    if above:
        raise BadRecipe(
            f"no sub-network keeps {' and '.join(map(str, parsed))}: {above}",
            try_="larger limits, or a super-network with smaller choices",
        )
    searched = _look(work, name, trials - begun) + begun
    target = _chosen(work, name)
    if must and target.missed:
        raise BadRecipe(
            _closest(work, target), try_="larger limits, or the same again: it adds more trials"
        )
    _keep(run, [(target, searched)])
    return target


def sweep(run: Run, cost: str, parts: Sequence[float], *, trials: int = 4) -> list[Target]:
    """Choose a sub-network for each of some parts of the full model's cost.

    All are chosen from the trials of all, so that with a part neither the cost nor the quality that
    the trials measured grows. Those that keep their limit are kept under names of their own.

    Args:
        run: whose super-network is trained.
        cost: name of a cost, such as ``"latency"``.
        parts: between 0 and 1.
        trials: most that are added for each.

    Returns:
        One for each part, from the largest; some may miss their limit.

    Raises:
        BadRecipe: an unknown cost, or a part that is none.
    """
    for part in parts:
        if not 0 < part <= 1:
            raise BadRecipe(f"a part of the full cost lies between 0 and 1, got {part}")
    if not parts:
        raise BadRecipe("no part of the full cost to choose for", try_="--parts 0.8,0.6")
    ordered = sorted(set(parts), reverse=True)
    limits = [parse_limits(f"{cost}<={100 * part:.6g}%") for part in ordered]
    names = [target_name(run, limit, None) for limit in limits]
    first = _work(run, limits[0])
    works, searched = [], []
    for limit, part, name in zip(limits, ordered, names, strict=True):
        work, begun = first.within(limit, [part]), _searched(run, limit)
        works.append(work)
        more = 0 if _impossible(work) else trials - begun
        searched.append(_look(work, name, more) + begun)
    found = [_chosen(work, name) for work, name in zip(works, names, strict=True)]
    rows = zip(found, searched, strict=True)
    _keep(run, [(target, spent) for target, spent in rows if not target.missed])
    return found


def target_name(run: Run, limits: Sequence[Limit], name: str | None) -> str:
    """Return the name of the sub-network for some limits: a folder's name.

    Raises:
        BadRecipe: a name that no folder may have, or that something else in the run has.
    """
    text = name or "target-" + "-".join(str(limit) for limit in limits)
    text = text.replace("<=", "-").replace(">=", "-least-").replace("%", "pct")
    text = re.sub(r"[^\w.-]+", "_", text)
    if not re.match(r"\w", text):
        raise BadRecipe(f"the name {name!r} must begin with a letter or digit")
    taken = {"largest", "heuristic", "smallest", "best", *run.recipe.baselines, *budgeted(run)}
    if text in taken or text.startswith((*ONLY_SCORED, "best-")):
        raise BadRecipe(
            f"the name {text!r} is taken by another sub-network of the run", try_="another --name"
        )
    return text


def _cost_of(limits: Sequence[Limit], usual: str) -> str:
    """Return the cost that is searched along: one that a limit is on, if the usual one is not."""
    names = [limit.name for limit in limits if limit.name in COSTS]
    return usual if usual in names or not names else names[0]


def _parts(limits: Sequence[Limit], cost: str, full: Mapping[str, float]) -> list[float]:
    """Return the bounds on the cost as parts of the full model's."""
    bounds = resolve([limit for limit in limits if limit.name == cost], {"dense": full})
    return [high / full[cost] for _, high in bounds.values() if high < math.inf]


def _work(run: Run, limits: Sequence[Limit]) -> SearchWork:
    """Return the search for some limits, along a cost that they are on; the run stays as it is."""
    cfg = run.recipe.search
    cost = _cost_of(limits, cfg.cost)
    ours = copy.copy(run)
    update = {"cost": cost, "workers": 1, "hours": None}
    ours.recipe = run.recipe.model_copy(update={"search": cfg.model_copy(update=update)})
    check_limits(cfg, limits, run.recipe.baselines)
    full = full_costs(run, {cost, *(limit.name for limit in limits)})
    return SearchWork(ours, limits, _parts(limits, cost, full))


def _look(work: SearchWork, name: str, trials: int) -> int:
    """Take over what is known, and add trials where none is near; return how many were asked."""
    found = work.search(0).trials
    there = {trial.config for trial in found}
    missing = [config for config in work.elsewhere if config not in there]
    if missing:
        found = work.search(len(found) + len(missing), missing).trials
    if trials <= 0 or _is_near(work, found):
        return 0
    with work.run.reporter.bar(f"search for {name}", "trials") as bar:
        work.search(len(found) + trials, bar=bar)
    return trials


def _is_near(work: SearchWork, trials: Sequence[Trial]) -> bool:
    """Tell whether a trial keeps the limits and uses what they allow."""
    if all(trial.failed or trial.dropped for trial in trials):
        return False
    best = SearchResult(tuple(trials)).best_within(work.bounds)
    if work.missed(best):
        return False
    costs = work.costs(best.config)
    return any(
        costs[name] >= (1 - SLACK) * high
        for name, (_, high) in work.bounds.items()
        if name in costs and high < math.inf
    )


def _chosen(work: SearchWork, name: str) -> Target:
    """Return the best of all trials within the limits, or the closest to them."""
    best = work.search(0).best_within(work.bounds)
    return Target(name, tuple(map(str, work.limits)), best, work.missed(best))


def _impossible(work: SearchWork) -> str:
    """Tell which bounds on counts even the smallest sub-network is above, if any."""
    least = work.costs(work.net.space.smallest())
    above = [
        f"the smallest sub-network has {name} {least[name]:.10g} where the limit is {high:.10g}"
        for name, (_, high) in work.bounds.items()
        if name not in LATENCIES and name in least and least[name] > high
    ]
    return "; ".join(above)


def _closest(work: SearchWork, target: Target) -> str:
    count = len(work.search(0).trials)
    missed = [
        f"{name} {value:.10g} where the limit is {bound:.10g}"
        for name, (value, bound) in target.missed.items()
    ]
    return (
        f"none of the {count} sub-networks that were tried keeps {' and '.join(target.limits)}; "
        f"the closest, trial {target.trial.number}, has {', '.join(missed)}"
    )


def _rows(run: Run) -> dict[str, Any]:
    """Return what is kept of the targets of the trained super-network, by name."""
    return dict(read_json(run.dir.targets)["subnets"]) if targeted(run) else {}


def _searched(run: Run, limits: Sequence[Limit]) -> int:
    """Return how many trials were added for some limits before."""
    texts = list(map(str, limits))
    rows = _rows(run).values()
    return max((row.get("searched", 0) for row in rows if row["limits"] == texts), default=0)


def _keep(run: Run, found: Sequence[tuple[Target, int]]) -> None:
    """Write targets, and how many trials were added for each, beside those that the run has."""
    rows = _rows(run)
    for target, searched in found:
        rows[target.name] = {
            "config": dict(target.config),
            "limits": list(target.limits),
            "searched": searched,
        }
    if found:
        with run.dir.stage("targets", run.inputs("train"), run.dir.targets):
            write_json(run.dir.targets, {"schema": 1, "subnets": rows})
