"""Which recipe a fit begins from: published settings, and a search space around its targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from elastune.fit_request import Facts, Request

Method = Literal["eftnas", "lonas", "shears"]

REFERENCES: Mapping[str, str] = {
    "eftnas": "dense+full",
    "lonas": "dense+lora",
    "shears": "dense+lora",
}
"""Method -> the model without compression, trained as long, that a drop is against."""

_FLOOR = 0.1
"""Least part of the blocks that a space reaches down to."""
_OVERHEAD = 0.9
"""Part of a latency that falls with MACs; the rest (launching, norms, reading) stays."""
_SEEN = 60_000
"""Examples that a training is to see in all: small sets are seen more often."""


def base_recipe(
    method: Method, request: Request, facts: Facts, parts: Mapping[str, float]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the settings of a recipe, and what the user should know of them.

    Args:
        method: of the recipe.
        request: what is asked for.
        facts: of model, task and device.
        parts: name of a cost -> the part of the full model's that is allowed.
    """
    cost = next(iter(parts))
    is_slow = facts.task_kind == "generation"
    n_validation = max(1, min(200 if is_slow else 1000, facts.n_train // 8))
    data: dict[str, Any] = {
        "method": method,
        "model": request.model,
        "task": {"name": request.task},
        "data": {"dir": request.data, "n_validation": n_validation, "leaks": "drop"},
        "search": {
            "algorithm": "auto",
            "trials": 24 if is_slow else 40,
            "objective": "score",
            "cost": cost,
            "front": 0,
            "random": 0,
        },
        "evaluate": {
            "macs_length": min(facts.length, 256),
            "latency": any("latency" in name for name in parts),
        },
        "baselines": [REFERENCES[method]],
    }
    own = {"eftnas": _eftnas, "lonas": _lonas, "shears": _shears}[method]
    notes = own(data, facts, parts)
    if data["evaluate"]["latency"]:
        tokens = data["evaluate"]["macs_length"]
        notes = (f"latency is of one text of {tokens} tokens (evaluate.macs_length)", *notes)
    return data, notes


def _eftnas(data: dict[str, Any], facts: Facts, parts: Mapping[str, float]) -> tuple[str, ...]:
    by_params = set(parts) <= {"params", "nonzero"}
    part, notes = _part_of_blocks(facts, parts)
    is_timed = any("latency" in name for name in parts)
    points = [1.0, (1 + part) / 2, part, part * (0.7 if is_timed else 5 / 6)]
    points = [round(max(point, _FLOOR), 3) for point in points]
    heads, channels = facts.units
    # Between two thresholds lies one unit at least, and that much a point may miss.
    grain = 1 / (facts.blocks * max(1, min(heads, channels)))
    data["start"] = "dense+full"
    data["importance"] = {"method": "fisher", "examples": 1024, "rounds": 16}
    data["structure"] = {
        "generate": {
            "cost": "params" if by_params else "macs",
            "points": sorted(set(points), reverse=True),
            "tolerance": round(min(0.3, max(0.02, 1.5 * grain)), 3),
        },
        "round_to": 8 if channels >= 512 else 1,
    }
    data["train"] = {
        "epochs": _epochs(facts),
        "batch_size": 32,
        "full_learning_rate": 1e-4 if facts.hidden <= 512 else 3e-5,
        "schedule": "linear",
        "warmup": 0.06,
        "weight_decay": 0.01,
        "max_length": facts.length,
        "distill": {"teacher": "dense+full", "weight": 0.9, "temperature": 2},
        "checkpoint_every": 200,
    }
    return notes


def _lonas(data: dict[str, Any], facts: Facts, parts: Mapping[str, float]) -> tuple[str, ...]:
    part, notes = _part_of_blocks(facts, parts)
    # The smallest sub-network is to be well below the target, so that there is a choice at it.
    floor = max(_FLOOR, 0.75 * part)
    ffn = [1.0, (1 + floor) / 2, floor]
    if floor < 0.6:
        ffn = [1.0, (2 + floor) / 3, (1 + 2 * floor) / 3, floor]
    structure: dict[str, Any] = {
        "ffn": [round(size, 3) for size in ffn],
        "order": "wanda",
        "round_to": 32 if facts.units[1] >= 512 else 8,
        "calibration": {
            "source": "task",
            "n_sequences": 32,
            "length": max(2, min(facts.length, 256)),
        },
    }
    if not facts.fixed_heads and facts.units[0] > 1:
        structure["heads"] = [1.0, round(max(floor, 0.5), 3)]
    # Late blocks in the middle matter least; each halves what random draws see of the others.
    count = facts.blocks // 6 if part < 0.8 else 0
    start = facts.blocks // 2
    if count:
        step = max(1, (facts.blocks - 1 - start) // count)
        structure["depth"] = [start + step * number for number in range(count)]
    data["structure"] = structure
    data["adapter"] = _adapter(facts)
    data["train"] = _adapter_training(facts)
    return notes


def _shears(data: dict[str, Any], facts: Facts, parts: Mapping[str, float]) -> tuple[str, ...]:
    data["adapter"] = _adapter(facts)
    data["train"] = _adapter_training(facts)
    full, part = facts.full["nonzero"], min(1.0, parts["nonzero"])
    # Adapters are weights, too: what the largest add is cut from the base.
    adapter = data["adapter"]["ranks"][0] * facts.per_rank
    ratio = ((1 - part) * full + adapter) / facts.sparse_weights
    notes: tuple[str, ...] = ()
    if ratio > 0.9:
        notes = (
            f"the target needs {ratio:.0%} of the blocks' weights to be zero; 90 % is as far as "
            "this goes, so that it will be missed",
        )
    data["sparsify"] = {
        "method": "wanda",
        "ratio": round(min(0.9, ratio) + 5e-4, 3),
        "calibration": {"source": "task", "n_sequences": 64, "length": max(2, facts.length)},
    }
    return notes


def _adapter(facts: Facts) -> dict[str, Any]:
    largest = max(4, min(32, facts.hidden // 8))
    return {"ranks": [largest, largest * 3 // 4, largest // 2], "alpha": 2 * largest}


def _adapter_training(facts: Facts) -> dict[str, Any]:
    return {
        "epochs": min(3.0, _epochs(facts)),
        "batch_size": 16,
        "learning_rate": 3e-4,
        "max_length": facts.length,
        "checkpoint_every": 100,
    }


def _epochs(facts: Facts) -> float:
    return float(min(10, max(3, round(_SEEN / max(1, facts.n_train)))))


def _part_of_blocks(facts: Facts, parts: Mapping[str, float]) -> tuple[float, tuple[str, ...]]:
    """Return the part of the blocks' cost that all targets leave, and what cannot be reached."""
    found, notes = 0.95, []
    for name, part in parts.items():
        if "latency" in name:
            need = 1 - (1 - part) / _OVERHEAD
        else:
            need = 1 - (1 - part) * facts.full[name] / (sum(facts.halves[name]) or 1.0)
        if need < _FLOOR:
            outside = 1 - sum(facts.halves.get(name, (0.0, 0.0))) / facts.full[name]
            rest = "" if "latency" in name else f" ({outside:.0%} of it is outside of the blocks)"
            notes.append(
                f"{name} of {part:.3g}x asks for less than {_FLOOR:.0%} of the blocks{rest}: it "
                "will probably be missed"
            )
        found = min(found, need)
    return max(_FLOOR, found), tuple(notes)
