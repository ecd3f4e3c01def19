"""Limits of a search: what they may be on, and what the systems have that they are relative to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

from elastune.errors import BadRecipe, nearest
from elastune.evaluate import evaluate
from elastune.files import read_json, write_json
from elastune.inputs import fingerprint
from elastune.outcomes import HeadLosses, TokenLosses
from elastune.run import Run
from elastune.search.limits import Limit, parse_limits
from elastune.sections.search import Cost, SearchConfig

COSTS: tuple[str, ...] = get_args(Cost)
"""Names of the costs that a search may be along, and that limits may be on."""
QUALITIES = ("score", "loss", "error")
SUBNETS = ("largest", "heuristic", "smallest")
"""Names of sub-networks that limits may be relative to."""


def check_limits(
    cfg: SearchConfig, limits: Sequence[str | Limit], baselines: Sequence[str]
) -> tuple[Limit, ...]:
    """Read limits; see that a search measures what they are on and what they are relative to.

    Args:
        cfg: of the search.
        limits: as text, or as they were read.
        baselines: of the recipe.

    Raises:
        BadRecipe: it does not; a text that is no limit.
    """
    by_score = cfg.objective == "score"
    measured = [*(("score", "error") if by_score else ("loss",)), *COSTS]
    systems = [*dict.fromkeys(["dense", "sparse", *SUBNETS, *baselines])]
    systems = [name for name in systems if name != "alone"]  # which is many
    found: list[Limit] = []
    for one in limits:
        found += [one] if isinstance(one, Limit) else parse_limits(one)
    for limit in found:
        if limit.name not in measured:
            way_out = "search.objective=" + ("loss" if by_score else "score")
            raise BadRecipe(
                f"{limit}: a search by {cfg.objective} does not measure {limit.name}; "
                f"it measures {', '.join(measured)}",
                try_=way_out if limit.name in QUALITIES else None,
            )
        if limit.of is not None and limit.of not in systems:
            raise BadRecipe(
                f"{limit}: nothing is known of {limit.of!r}{nearest(limit.of, systems)}; "
                f"known are {', '.join(systems)}"
            )
    return tuple(found)


def quality_of(run: Run, system: str, quality: str, of_subnet: Callable[[str], float]) -> float:
    """Return the score, loss or error of a system on the validation examples; measured once.

    Args:
        run: keeps what was measured.
        system: name of a baseline, or one of `SUBNETS`.
        quality: one of `QUALITIES`.
        of_subnet: measures the sub-network of a name.
    """
    is_subnet = system in SUBNETS
    batch = run.recipe.evaluate.batch_tokens
    made_of = run.inputs("train" if is_subnet else system)
    inputs = fingerprint(made_of, run.inputs("data"), batch)
    path = run.dir.reference_scores
    known: dict[str, float] = read_json(path)["scores"] if path.exists() else {}
    key = f"{system} {quality}"
    if key not in known or not run.dir.is_done(f"reference {key}", inputs):
        with run.dir.stage(f"reference {key}", inputs):
            known[key] = of_subnet(system) if is_subnet else _of_model(run, system, quality)
            write_json(path, {"schema": 1, "scores": known})
    return known[key]


def _of_model(run: Run, system: str, quality: str) -> float:
    if system in ("dense", "sparse"):
        model: Any = run.load_dense()[0] if system == "dense" else run.load_sparse()
    else:
        model = run.load_baseline(system).model
    task, examples = run.task(run.recipe.task), run.splits.validation
    batch = run.recipe.evaluate.batch_tokens
    if quality == "loss":
        losses = (
            TokenLosses(model, run.tokenizer, examples, batch)
            if task.head == "causal-lm"
            else HeadLosses(model, run.tokenizer, task, examples, batch)
        )
        return float(losses(range(len(examples))).mean())
    score = evaluate(model, run.tokenizer, task, examples, batch_tokens=batch).value
    return 1 - score if quality == "error" and task.higher_is_better else score
