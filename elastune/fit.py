"""Budget in, model out: a plan carried out, and a verdict on what it reached.

The super-network of the plan's recipe is trained and searched as ever; then a sub-network is chosen
for the targets, written, and measured beside the same model tuned without compression.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from elastune.artifacts import RunDirectory, check_schema
from elastune.budgets import allocate_budgets
from elastune.choose import extract_chosen
from elastune.errors import BadRecipe
from elastune.evaluate import evaluate
from elastune.files import read_json, remove, write_json
from elastune.fit_plan import TARGET_TRIALS, Plan
from elastune.fit_request import Request
from elastune.inputs import fingerprint
from elastune.latency import Conditions, Latency, compare_latency
from elastune.measure import measure
from elastune.methods.baselines import train_baselines
from elastune.models import load_model
from elastune.prepare import make_base
from elastune.run import Run
from elastune.search.base import Trial
from elastune.search.limits import POINT, Limit
from elastune.search_costs import full_costs
from elastune.search_stage import SearchWork, search
from elastune.stages import train_supernet
from elastune.targets import find_target

NAME = "fit"
"""Of the sub-network that is handed over."""
_TOLERANCE = 0.02
"""Part by which a measured latency may miss its target: two measurements differ as much."""
_CHOICES = 4
"""Times that a sub-network is chosen at most: once, and three times by tighter bounds."""


@dataclass(frozen=True)
class Reached:
    """What became of one target.

    Attributes:
        name: of the value.
        target: as it was asked for.
        bound: in the value's own unit; of the score the least that was allowed.
        value: of the sub-network that is handed over.
        part: of the full model's, or of the score how many points were lost.
        met: whether the target is.
    """

    name: str
    target: str
    bound: float
    value: float
    part: float
    met: bool


@dataclass(frozen=True)
class Fitted:
    """The outcome of a fit.

    Attributes:
        checkpoint: folder of the sub-network.
        reached: one row a target; the score is the last.
        reference: row of metrics.json of the model without compression.
        row: of the sub-network.
        why: what stands in the way, where a target was missed.
    """

    checkpoint: Path
    reached: tuple[Reached, ...]
    reference: Mapping[str, Any]
    row: Mapping[str, Any]
    why: tuple[str, ...] = ()

    @property
    def met(self) -> bool:
        """Whether all targets are."""
        return all(row.met for row in self.reached)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "met": self.met,
            "checkpoint": str(self.checkpoint),
            "targets": [asdict(row) for row in self.reached],
            "reference": dict(self.reference),
            "fit": dict(self.row),
            "why": list(self.why),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], checkpoint: Path) -> Fitted:
        """Read back what `to_dict` returned, of a run directory that may have moved."""
        rows = tuple(Reached(**row) for row in data["targets"])
        return cls(checkpoint, rows, data["reference"], data["fit"], tuple(data["why"]))


def kept_plan(directory: RunDirectory, request: Request) -> Plan | None:
    """Return the plan of an earlier fit by the same request; None where there is none.

    Raises:
        BadRecipe: the folder belongs to another request, or to a run that no fit has planned.
    """
    path = directory.fit
    if not path.exists():
        if directory.manifest_file.exists():
            raise BadRecipe(
                f"{directory.root} holds a run that no fit has planned", try_="another --out"
            )
        return None
    data = check_schema(read_json(path), path)
    mine, theirs = request.to_dict(), data["request"]
    if mine != theirs:
        wrong = [
            f"{n} ({theirs.get(n)} there, {mine[n]} here)" for n in mine if mine[n] != theirs.get(n)
        ]
        raise BadRecipe(
            f"{directory.root} holds a fit of another request; they differ in {', '.join(wrong)}",
            try_="another --out",
        )
    return Plan.from_dict(data["plan"], str(path))


def keep_plan(directory: RunDirectory, request: Request, plan: Plan) -> None:
    """Write the plan down: the same request goes on with it instead of measuring anew."""
    data = {"schema": 1, "request": request.to_dict(), "plan": plan.to_dict()}
    write_json(directory.fit, data)


def fit(run: Run, request: Request, reference: str) -> Fitted:
    """Carry out a plan; what is done already is skipped.

    Args:
        run: of the plan's recipe.
        request: what is asked for.
        reference: the system that the drop in score is against.

    Returns:
        What was reached. A target that is missed is no error: the checkpoint is the closest.
    """
    make_base(run)
    train_supernet(run)
    train_baselines(run)
    allocate_budgets(run)
    search(run)
    result = run.dir.fit_result
    inputs = run.inputs("search", request.to_dict())
    folder = run.dir.subnets / NAME
    if run.dir.is_done("fit", inputs) and folder.is_dir():
        return Fitted.from_dict(read_json(result), folder)
    with run.dir.stage("fit", inputs, result):
        found = _chosen_and_measured(run, request, reference)
        write_json(result, {"schema": 1, **found.to_dict()})
    return found


def _chosen_and_measured(run: Run, request: Request, reference: str) -> Fitted:
    higher = run.task(run.recipe.task).higher_is_better
    allowed = request.max_drop * (POINT if higher else 1.0)
    score = _reference_score(run, reference)
    least = score - allowed if higher else score + allowed
    quality = f"score{'>=' if higher else '<='}{least!r}"
    limits, latencies = request.limits, dict[str, Latency]()
    for number in range(_CHOICES):
        trials = TARGET_TRIALS if number == 0 else TARGET_TRIALS // 2
        target = find_target(run, [*map(str, limits), quality], trials=trials, name=NAME)
        extract_chosen(run, {NAME: target.config})
        if not any("latency" in name for name in request.costs):
            break
        latencies = _side_by_side(run)
        tighter = tightened(limits, request.limits, latencies)
        if tighter is None or number == _CHOICES - 1:
            break
        run.reporter.say(f"measured it is slower than predicted: {', '.join(map(str, tighter))}")
        limits = tighter
    measure(run, [reference, NAME])
    remove(run.dir.subnets / NAME)
    extract_chosen(run, {NAME: target.config})  # once more: now its card can tell the figures
    rows = {row["name"]: row for row in run.dir.metrics()["rows"]}
    values = {**target.trial.measured, **target.trial.values}
    full = full_costs(run, request.costs)
    reached = [reached_cost(limit, values, full, latencies) for limit in request.limits]
    reached.append(reached_score(rows[reference], rows[NAME], request.max_drop, higher))
    why = () if all(row.met for row in reached) else _why(run, request, quality, full)
    folder = run.dir.subnets / NAME
    return Fitted(folder, tuple(reached), rows[reference], rows[NAME], why)


def _reference_score(run: Run, name: str) -> float:
    """Score the reference on the validation examples, which the search sees; once."""
    path = run.dir.fit_reference
    cfg = run.recipe
    inputs = fingerprint(run.inputs(name), run.inputs("data"), cfg.evaluate.batch_tokens)
    if not run.dir.is_done("fit reference", inputs):
        model = run.load_baseline(name).model
        with (
            run.dir.stage("fit reference", inputs, path),
            run.reporter.bar(f"score {name}", "examples") as bar,
        ):
            score = evaluate(
                model,
                run.tokenizer,
                run.task(cfg.task),
                run.splits.validation,
                batch_tokens=cfg.evaluate.batch_tokens,
                progress=bar,
            )
            write_json(path, {"schema": 1, "name": name, "score": score.value})
    return float(read_json(path)["score"])


def _side_by_side(run: Run) -> dict[str, Latency]:
    """Measure the full model and the written checkpoint in turns."""
    full = run.load_dense()[0]
    task = run.task_of(run.recipe.task)
    smaller, _ = load_model(
        run.dir.subnets / NAME,
        dtype=run.recipe.dtype,
        device=None if full.device.type == "cpu" else str(full.device),
        head=task.head,
        num_labels=task.num_labels,
    )
    conditions = Conditions(prompt_tokens=run.recipe.evaluate.macs_length, repeats=15)
    return compare_latency({"full": full, NAME: smaller}, conditions)


def measured_part(name: str, latencies: Mapping[str, Latency]) -> float:
    """Return a latency of the sub-network as a part of the full model's, round by round."""
    full, mine = latencies["full"], latencies[NAME]
    is_decode = name == "decode_latency_ms"
    return 1 / (mine.decode_speed_up(full) if is_decode else mine.prefill_speed_up(full))


def measured_ms(name: str, latency: Latency) -> float:
    """Return a measured latency by the name of its cost."""
    is_decode = name == "decode_latency_ms"
    return (latency.decode_ms_per_token or 0.0) if is_decode else latency.prefill_ms


def excess(limit: Limit, latencies: Mapping[str, Latency]) -> float:
    """Return how many times its bound a measured latency is."""
    if limit.part:
        return measured_part(limit.name, latencies) / limit.number
    return measured_ms(limit.name, latencies[NAME]) / limit.number


def tightened(
    limits: Sequence[Limit], asked: Sequence[Limit], latencies: Mapping[str, Latency]
) -> tuple[Limit, ...] | None:
    """Return bounds that make up for a table that predicts too little; None if none does.

    Args:
        limits: by which the measured sub-network was chosen.
        asked: what is to be reached.
        latencies: of "full" and of the sub-network, measured in turns.
    """
    found = []
    for limit, wanted in zip(limits, asked, strict=True):
        times = excess(wanted, latencies) if "latency" in limit.name else 0.0
        is_slow = times > 1 + _TOLERANCE
        found.append(replace(limit, number=limit.number / times) if is_slow else limit)
    return None if found == list(limits) else tuple(found)


def reached_cost(
    limit: Limit,
    values: Mapping[str, float],
    full: Mapping[str, float],
    latencies: Mapping[str, Latency],
) -> Reached:
    """Hold a cost against its target: counted, or as it was measured side by side."""
    name = limit.name
    if name in ("latency_ms", "decode_latency_ms"):
        whole, value = (measured_ms(name, latencies[key]) for key in ("full", NAME))
        part = measured_part(name, latencies)
        met = excess(limit, latencies) <= 1 + _TOLERANCE
    else:
        whole, value = full[name], values[name]
        part = value / whole
        met = value <= (limit.number * whole if limit.part else limit.number)
    bound = limit.number * whole if limit.part else limit.number
    return Reached(name, str(limit), bound, value, part, met)


def reached_score(
    reference: Mapping[str, Any], row: Mapping[str, Any], max_drop: float, higher: bool
) -> Reached:
    """Hold the drop on the report examples against what was allowed."""
    lost = reference["score"] - row["score"] if higher else row["score"] - reference["score"]
    unit = POINT if higher else 1.0
    sign = -1 if higher else 1
    return Reached(
        "score",
        f"{reference['name']} {'-' if higher else '+'} {max_drop:g}",
        reference["score"] + sign * max_drop * unit,
        row["score"],
        lost / unit,
        lost <= max_drop * unit + 1e-12,
    )


def _why(run: Run, request: Request, quality: str, full: Mapping[str, float]) -> tuple[str, ...]:
    """Tell what the trials say of a target that was missed."""
    work = SearchWork(run, [*map(str, request.limits), quality])
    trials = work.search(0).trials
    bounds = {limit.name: limit.bound({"dense": full, "full": full}) for limit in request.limits}
    least = float(quality.partition("=")[2])
    higher = run.task(run.recipe.task).higher_is_better
    return closest(trials, bounds, least, higher, dict(full))


def closest(
    trials: Sequence[Trial],
    bounds: Mapping[str, float],
    least: float,
    higher: bool,
    full: Mapping[str, float],
) -> tuple[str, ...]:
    """Return in words the best score within the costs, and the smallest costs at the score.

    Args:
        trials: of the search; dropped and failed ones are left out.
        bounds: name of a cost -> its bound.
        least: score that is allowed just so.
        higher: whether more of the score is better.
        full: costs of the full model.
    """
    rows = [{**t.measured, **t.values} for t in trials if not (t.failed or t.dropped)]
    rows = [row for row in rows if math.isfinite(row.get("score", math.nan))]
    within = [row for row in rows if all(row[name] <= bound for name, bound in bounds.items())]
    good = [row for row in rows if (row["score"] >= least if higher else row["score"] <= least)]
    both = [row for row in within if row in good]
    if both:
        # Examples that the search has not seen, or a clock, said otherwise.
        return (
            f"on the validation examples {len(both)} of {len(rows)} sub-networks keep all targets "
            "as counted and predicted; what was measured afterwards does not bear it out",
        )
    said = []
    if not within:
        names = " and ".join(f"{n} {min(row[n] for row in rows) / full[n]:.3g}x" for n in bounds)
        said.append(f"no sub-network is small enough: the smallest has {names} of the full model's")
    else:
        best = (max if higher else min)(row["score"] for row in within)
        said.append(
            f"within the cost the best of {len(within)} sub-networks scores {best:.4f} on the "
            f"validation examples, {least:.4f} was the limit"
        )
    if not good:
        said.append(f"none of {len(rows)} sub-networks keeps the score, at any cost")
    else:
        said += [
            f"at that score the smallest {name} is {min(r[name] for r in good) / full[name]:.3g}x"
            for name in bounds
        ]
    return tuple(said)
