"""What each part of EFTNAS gives: importance, generated spaces, distillation. Seeds and budgets.

Every variant is a run of recipes/eftnas-minilm-glue.yaml with a change, begun from the same
fine-tuned model, which is also the teacher; finished runs are reused. Scores are of the report
examples, one super-network a row, one sub-network a column.

    python benchmarks/eftnas.py [--task sst2] [--n-train 8000] [--epochs 2] [--seeds 0 1 2]
                                [--teacher FOLDER] [--out runs/eftnas] [--quick]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from data_folder import add_data_option
from rich.console import Console
from rich.table import Table

from elastune.artifacts import RunDirectory
from elastune.config import load_recipe
from elastune.console import ConsoleReporter
from elastune.methods import METHODS
from elastune.run import Run

RECIPES = Path(__file__).parent.parent / "recipes"
BUDGETS = (0.75, 0.5, 0.33, 0.2)
EQUAL = [
    "structure.generate=null",
    "structure.heads=[1.0, 0.75, 0.5, 0.33, 0.17]",
    "structure.ffn=[1.0, 0.75, 0.5, 0.33, 0.2]",
    "structure.budgets=[0.75, 0.5, 0.34, 0.2]",
    "structure.allocation=uniform",
]
VARIANTS: dict[str, list[str]] = {
    "equal widths, natural order": [*EQUAL, "structure.order=natural", "importance=null"],
    "equal widths, fisher order": [*EQUAL],
    "generated, magnitude": ["importance.method=magnitude", "structure.generate.per_cost=false"],
    "generated, taylor": ["importance.method=taylor", "structure.generate.per_cost=false"],
    "generated, movement": [
        "importance.method=movement",
        # The published pull of all scores is for thousands of steps; in hundreds it drowns them.
        "importance.movement={epochs: 2, learning_rate: 1.0e-4, regularisation: 0.0}",
        "structure.generate.per_cost=false",
    ],
    "generated, fisher": [],
    "generated, knapsack": ["structure.generate.by=knapsack"],
    "generated, fisher, no distillation": ["train.distill=null"],
}
QUICK = ["train.max_steps=4", "data.n_train=128", "data.n_validation=32", "importance.examples=32"]


def main() -> None:
    args = _arguments()
    console = Console()
    teacher = args.teacher or _teacher(args, console)
    wanted = [name for name in VARIANTS if not args.only or name in args.only]
    scores: dict[str, dict[str, list[float]]] = {}
    seconds: dict[str, dict[str, float]] = {}
    for seed in args.seeds:
        for name in wanted:
            run = _run(args, name, seed, teacher, console)
            for row in run.dir.metrics()["rows"]:
                if row["config"] is not None and "-" in row["name"]:
                    budget = row["name"].partition("-")[2].replace("34", "33")
                    scores.setdefault(name, {}).setdefault(budget, []).append(row["score"])
            stages = run.dir.manifest()["stages"]
            seconds[name] = {
                stage: stages[stage]["seconds"] for stage in stages if "/" not in stage
            }
            _show(scores, console)
    figures = {"scores": scores, "seconds": seconds}
    print(json.dumps({"benchmark": "eftnas", "figures": figures}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--n-train", type=int, default=8000)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher", type=Path, help="a fine-tuned checkpoint; else one is trained")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="some of the variants")
    parser.add_argument("--out", type=Path, default=Path("runs/eftnas"))
    parser.add_argument("--set", action="append", default=[], help="override of the recipe")
    parser.add_argument("--quick", action="store_true", help="two variants, hardly trained")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.set, args.out = args.seeds[:1], [*args.set, *QUICK], args.out / "quick"
        args.only = args.only or ["equal widths, natural order", "generated, fisher"]
    return args


def _teacher(args: argparse.Namespace, console: Console) -> Path:
    """Fine-tune the model on the task."""
    overrides = [f"task={args.task}", f"data.dir={args.data or 'null'}"]
    overrides += ["data.n_validation=1000", "train.epochs=3"]
    overrides += QUICK[:3] if args.quick else []
    run = _do(args.out / "teacher", "finetune-glue.yaml", overrides, console)
    return run.dir.baseline("dense+full") / "model"


def _run(args: argparse.Namespace, name: str, seed: int, teacher: Path, console: Console) -> Run:
    overrides = [
        f"task={args.task}",
        f"data.dir={args.data or 'null'}",
        f"data.n_train={args.n_train}",
        f"train.epochs={args.epochs}",
        f"model={teacher}",
        f"train.distill.teacher={teacher}",
        "start=model",
        f"train.seed={seed}",  # the examples stay the same
        "search.trials=0",
        "baselines=[]",
        "evaluate.latency=false",
        *args.set,
        *VARIANTS[name],  # last: what a variant leaves out stays out
    ]
    folder = name.replace(", ", "-").replace(" ", "_")
    return _do(args.out / f"{folder}-{seed}", "eftnas-minilm-glue.yaml", overrides, console)


def _do(folder: Path, recipe_name: str, overrides: Sequence[str], console: Console) -> Run:
    recipe = load_recipe(RECIPES / recipe_name, overrides)
    directory = RunDirectory(folder)
    with directory.lock():
        directory.claim(recipe, update=True)
        run = Run(directory, recipe, ConsoleReporter(console))
        METHODS[recipe.method](run)
    return run


def _show(scores: dict[str, dict[str, list[float]]], console: Console) -> None:
    budgets = [f"{100 * budget:g}" for budget in BUDGETS]
    table = Table(title="score by part of the encoder's MACs, mean ± standard deviation over seeds")
    for column in ("variant", *(f"{budget} %" for budget in budgets), "seeds"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, row in scores.items():
        table.add_row(name, *(_text(row.get(b, [])) for b in budgets), str(_count(row)))
    console.print(table)


def _text(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _count(row: dict[str, Any]) -> int:
    return max(map(len, row.values()), default=0)


if __name__ == "__main__":
    main()
