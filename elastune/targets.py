"""One super-network, many budgets: a sub-network for limits that are named after the training.

The trials of the run's search are asked first; a few more, aimed at the limits, are added to them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastune.choose import targeted
from elastune.errors import BadRecipe
from elastune.files import read_json, write_json
from elastune.run import Run
from elastune.search.base import Trial
from elastune.search.limits import Limit, parse_limits, resolve
from elastune.search_costs import full_costs
from elastune.search_stage import SearchWork
from elastune.sections.search import Cost
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


def find_target(
    run: Run, limits: Sequence[str], *, trials: int = 8, name: str | None = None
) -> Target:
    """Choose the best sub-network within limits, and keep it under a name of its own.

    Args:
        run: whose super-network is trained.
        limits: such as ``["latency<=0.5x", "score>=dense-1"]``.
        trials: most that are added to those of earlier searches, where these come nowhere near.
        name: of the sub-network; made from the limits by default.

    Returns:
        The best within the limits; where there is none, the one that misses them least.

    Raises:
        BadRecipe: limits that cannot be read, or a name that is taken.
    """
    parsed = parse_limits(limits)
    if not parsed:
        raise BadRecipe("a target needs a limit", try_='such as "latency<=0.6x"')
    name = target_name(run, parsed, name)
    cost = _cost_of(parsed, run.recipe.search.cost)
    run.recipe = run.recipe.model_copy(
        update={"search": run.recipe.search.model_copy(update={"cost": cost, "workers": 1})}
    )
    full = full_costs(run, {cost, *(limit.name for limit in parsed)})
    work = SearchWork(run, limits, _parts(parsed, cost, full))
    found = work.search(0)
    if not _is_near(work, found.best_within(work.bounds) if found.trials else None):
        with run.reporter.bar(f"search for {name}", "trials") as bar:
            found = work.search(len(found.trials) + trials, bar=bar)
    best = found.best_within(work.bounds)
    missed = work.missed(best)
    target = Target(name, tuple(map(str, parsed)), best, missed)
    _keep(run, target)
    return target


def sweep(run: Run, cost: str, parts: Sequence[float], *, trials: int = 4) -> list[Target]:
    """Choose a sub-network for each of some parts of the full model's cost.

    Args:
        run: whose super-network is trained.
        cost: name of a cost, such as ``"latency"``.
        parts: between 0 and 1.
        trials: most that are added for each.

    Raises:
        BadRecipe: an unknown cost, or a part that is none.
    """
    for part in parts:
        if not 0 < part <= 1:
            raise BadRecipe(f"a part of the full cost lies between 0 and 1, got {part}")
    return [find_target(run, [f"{cost}<={100 * part:.6g}%"], trials=trials) for part in parts]


def target_name(run: Run, limits: Sequence[Limit], name: str | None) -> str:
    """Return the name of the sub-network for some limits: a folder's name."""
    text = name or "target-" + "-".join(str(limit) for limit in limits)
    text = text.replace("<=", "-").replace(">=", "-").replace("%", "pct")
    text = re.sub(r"[^\w.-]+", "_", text)
    if not re.match(r"\w", text):
        raise BadRecipe(f"the name {name!r} must begin with a letter or digit")
    return text


def _cost_of(limits: Sequence[Limit], usual: Cost) -> Cost:
    """Return the cost that is searched along: one that a limit is on, if the usual one is not."""
    names = [limit.name for limit in limits if limit.name in Cost.__args__]  # type: ignore[attr-defined]
    return usual if usual in names or not names else names[0]  # type: ignore[return-value]


def _parts(limits: Sequence[Limit], cost: str, full: Mapping[str, float]) -> list[float]:
    """Return the bounds on the cost as parts of the full model's."""
    bounds = resolve([limit for limit in limits if limit.name == cost], {"dense": full})
    return [high / full[cost] for _, high in bounds.values() if high < math.inf]


def _is_near(work: SearchWork, best: Trial | None) -> bool:
    """Tell whether a trial keeps the limits and uses what they allow."""
    if best is None or work.missed(best):
        return False
    costs = work.costs(best.config)
    return any(
        costs[name] >= (1 - SLACK) * high
        for name, (_, high) in work.bounds.items()
        if name in costs and high < math.inf
    )


def _keep(run: Run, target: Target) -> None:
    """Write a target beside those that the run has."""
    inputs = run.inputs("train")
    rows = read_json(run.dir.targets)["subnets"] if targeted(run) else {}
    rows[target.name] = {"config": dict(target.config), "limits": list(target.limits)}
    with run.dir.stage("targets", inputs):
        write_json(run.dir.targets, {"schema": 1, "subnets": rows})
