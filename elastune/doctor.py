"""What this machine and environment can do: the facts a bug report needs."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.table import Table

_PACKAGES = (
    *("torch", "transformers", "accelerate", "peft", "safetensors", "optuna", "numpy"),
    *("bitsandbytes", "datasets", "gguf", "lm-eval", "reasoning-gym", "tensorboard", "trackio"),
)
_EXTRAS = {
    "bitsandbytes": "4bit",
    "datasets": "data",
    "gguf": "gguf",
    "lm-eval": "lm-eval",
    "reasoning-gym": "reasoning",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
}


def examine() -> dict[str, Any]:
    """Return versions, devices, memory, built-in models and tasks."""
    import torch

    from elastune.models.builtin import BUILTIN
    from elastune.models.families import known_model_types
    from elastune.tasks import TASKS

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "elastune": version("elastune"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpus": gpus,
        "bf16": bool(gpus) and torch.cuda.is_bf16_supported(),
        "built_in_models": list(BUILTIN),
        "model_types": list(known_model_types()),
        "tasks": list(TASKS),
        "exports": _exports(),
    }


def doctor_table(facts: dict[str, Any]) -> Table:
    """Return the facts as a table for the terminal."""
    table = Table(show_header=False, title="elastune doctor")
    for key in ("elastune", "python"):
        table.add_row(key, facts[key])
    for name, found in facts["packages"].items():
        way = f"missing: pip install 'elastune[{_EXTRAS[name]}]'" if name in _EXTRAS else "missing"
        table.add_row(name, found or way)
    table.add_row("cpus", f"{facts['cpus']} ({facts['threads']} threads used)")
    table.add_row(
        "memory", "unknown" if facts["memory_gib"] is None else f"{facts['memory_gib']} GiB"
    )
    table.add_row(
        "gpus", ", ".join(facts["gpus"]) or "none; training and evaluation run on the CPU"
    )
    table.add_row("built-in models", ", ".join(facts["built_in_models"]))
    table.add_row("model types", ", ".join(facts["model_types"]))
    working = [name for name, missing in facts["exports"].items() if missing is None]
    table.add_row("exports", ", ".join(working))
    for name, missing in facts["exports"].items():
        if missing is not None:
            table.add_row(f"export {name}", f"missing: {missing}")
    table.add_row("tasks", ", ".join(facts["tasks"]))
    return table


def _exports() -> dict[str, str | None]:
    """Return what each format lacks here, as the command that installs it; None for nothing."""
    from elastune.export.registry import EXPORT_FORMATS, missing_packages

    return {
        name: made.install if missing_packages(made) else None
        for name, made in EXPORT_FORMATS.items()
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None
