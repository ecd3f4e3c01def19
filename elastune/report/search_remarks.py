"""What can be said of a search beyond its best score: noise, how losses add up, work saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elastune.report.load import RunData
from elastune.report.quantities import NBSP, duration, is_number
from elastune.report.results import AVERAGE, RANDOM_BEST, Column, System
from elastune.report.trials import Searched
from elastune.report.verdicts import Verdict, compare

RIVALS = ("heuristic", "largest", RANDOM_BEST, "smallest")
"""What the best of a search is held against: what no search is needed for, and luck."""


def remarks(run: RunData, found: Searched, rows: Sequence[System]) -> list[str]:
    """Return the sentences, as plain text; those whose figures are not there are left out."""
    told = [against_rivals(run, rows), limits_kept(found), work_saved(found)]
    told.append(adds_up(found.about.get("additivity")))
    return [sentence for sentence in told if sentence]


def against_rivals(run: RunData, rows: Sequence[System]) -> str:
    """Say of which rivals the best sub-network is within noise, on the report examples.

    Paired where the answers of both are there (`verdicts.compare`).
    """
    named = {row.name: row for row in rows}
    best = named.get("best")
    if best is None:
        return ""
    column = AVERAGE if AVERAGE in best.values else best.first[0]
    groups: dict[str, list[str]] = {}
    for name in RIVALS:
        rival = named.get(name)
        if rival is None or column not in rival.values:
            continue
        if rival.config == best.config:
            groups.setdefault("the same sub-network as", []).append(name)
            continue
        found = compare(best, rival, column, run.predictions)
        words = {"better": "better than", "worse": "worse than"}
        words |= {"within noise": "within noise of", "unknown": "not to be told from"}
        groups.setdefault(words[found.word], []).append(
            f"{name} ({_difference(found, column)}{_cost(best, rival)})"
        )
    if not groups:
        return ""
    where = "on average" if column == AVERAGE else f"on {column.task}"
    parts = [f"{word} {_listed(names)}" for word, names in groups.items()]
    text = f"{where[0].upper()}{where[1:]}, on examples that the search has not seen, "
    text += f"the best sub-network is {'; '.join(parts)}."
    gains = [name for name in groups.get("better than", []) if not name.startswith("smallest")]
    if not gains and any(name in named for name in ("heuristic", RANDOM_BEST)):
        text += " So this run shows no gain in score over choosing without a search."
    return text


def _difference(found: Verdict, column: Column) -> str:
    unit = f"{NBSP}points" if column.percent else ""
    if found.paired is None:
        noise = "" if found.noise is None else f" ± {column.number(found.noise, found.noise)}"
        return f"{column.difference(found.difference)}{noise}{unit}, unpaired"
    size = max(abs(found.paired.low), abs(found.paired.high))
    low, high = (column.difference(end, size) for end in (found.paired.low, found.paired.high))
    gap = column.difference(found.difference, size)
    return f"{gap}{unit}, {found.paired.confidence:.0%} {low} to {high}"


def _cost(best: System, rival: System) -> str:
    """Tell the MACs beside the rival's, where they differ; else the non-zero parameters."""
    for noun, name in (("MACs", "macs"), ("non-zeros", "nonzero")):
        ours, theirs = getattr(best, name), getattr(rival, name)
        if theirs and abs(ours / theirs - 1) >= 0.005:
            return f"; {100 * ours / theirs:.0f}{NBSP}% of its {noun}"
    return ""


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def limits_kept(found: Searched) -> str:
    """Say how many trials keep the limits of the search."""
    limits = [str(limit) for limit in found.about.get("limits") or ()]
    if not limits:
        return ""
    kept = sum(not point.breaks and point.quality is not None for point in found.trials)
    return f"Limits: {' and '.join(limits)}. {kept:,} of {len(found.trials):,} trials keep them."


def work_saved(found: Searched) -> str:
    """Say what the search did, how long it took, and what the race and the reuse saved."""
    about, trials = found.about, found.trials
    works = [p.equivalents for p in trials if p.equivalents is not None]
    total = about.get("equivalents")
    total = sum(works) if not is_number(total) and len(works) == len(trials) else total
    parts = []
    dropped = sum(point.state == "dropped" for point in trials)
    if dropped:
        parts.append(
            f"The race dropped {dropped:,} of {len(trials):,} trials after a part of the examples; "
            "their quality is an estimate, and none of them can be chosen."
        )
    if total is not None and is_number(total):
        share = 1 - total / len(trials)
        saved = f", {share:.0%} less than measuring each in full" if share >= 0.01 else ""
        parts.append(
            f"{len(trials):,} trials took the work of {total:,.1f} whole evaluations{saved}."
        )
    if about.get("algorithm"):
        took = about.get("seconds")
        time = f" in {duration(took)}" if took is not None and is_number(took) else ""
        parts.append(f"Algorithm: {about['algorithm']}{time}.")
    return " ".join(parts)


def adds_up(found: Mapping[str, Any] | None) -> str:
    """Say how well single-choice losses predict those of whole sub-networks."""
    if not found or not is_number(found.get("pearson")):
        return ""
    pearson = found["pearson"]
    word = "add up" if pearson >= 0.9 else "add up roughly" if pearson >= 0.7 else "do not add up"
    facts = [f"Pearson {pearson:.3f}"]
    facts += [f"{key} {found[key]:.3f}" for key in ("spearman",) if is_number(found.get(key))]
    facts += [f"slope {found['slope']:.2f}"] if is_number(found.get("slope")) else []
    facts += [f"{found['n']:,} trials"] if is_number(found.get("n")) else []
    text = f"Single-choice losses {word}: {', '.join(facts)}".replace("spearman", "Spearman")
    if pearson < 0.7:
        return f"{text}. What is chosen by adding them (milp, and the start of auto) is a guess."
    return f"{text}."
