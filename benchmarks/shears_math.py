"""Shears on maths: sparse+LoRA against NLS over seeds, on the same steps and examples.

Runs recipes/shears-smollm2-math.yaml once per seed (all systems on all tasks for seed 0, two
systems on one task for others; finished runs are reused), then compares, example by example, the
loss of the gold rationales of GSM8K's test set: far less noisy than accuracy at this size.

    python benchmarks/shears_math.py [--out runs/math] [--seeds 0 1 2] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import numpy as np
from data_folder import add_data_option
from rich.console import Console
from rich.table import Table

from elastune.artifacts import RunDirectory
from elastune.choose import chosen
from elastune.config import TaskConfig, load_recipe
from elastune.console import ConsoleReporter
from elastune.likelihood import example_losses
from elastune.measure import measure
from elastune.methods import shears
from elastune.report import markdown_table, write_report
from elastune.run import Run
from elastune.stages import sparsify, train_baseline, train_supernet
from elastune.tasks import get_task

RECIPE = Path(__file__).parent.parent / "recipes" / "shears-smollm2-math.yaml"
# Further seeds compare two systems alone, on one of the sets and by loss.
FURTHER_TASKS = "evaluate.tasks=[{name: mawps, limit: 60, options: {max_new_tokens: 64}}]"
QUICK = [
    "train.max_steps=2",
    "train.batch_size=2",
    "search.trials=3",
    "search.random=0",
    "data.n_validation=2",
    "sparsify.calibration.n_sequences=4",
    "sparsify.calibration.length=128",
    "evaluate.tasks=[{name: mawps, limit: 2, options: {max_new_tokens: 8}}]",
]


def main() -> None:
    args = _arguments()
    console = Console()
    seeds = args.seeds[:1] if args.quick else args.seeds
    losses: dict[int, dict[str, tuple[float, float, float]]] = {}
    runs = []
    for seed in seeds:
        run = _run(args, seed, console)
        runs.append(run)
        losses[seed] = _gold_losses(run, 2 if args.quick else args.loss_examples)
    console.print(f"\nseed {seeds[0]}, all systems\n")
    console.print(markdown_table(runs[0].dir.metrics()), markup=False, soft_wrap=True)
    table = Table(title="accuracy, mean over the tasks all seeds share; GSM8K gold loss")
    for column in ("seed", "system", "accuracy %", "stderr", "loss", "minus sparse+lora", "stderr"):
        table.add_column(column, justify="right")
    gains = []
    common = set.intersection(*({row["task"] for row in run.dir.metrics()["rows"]} for run in runs))
    for seed, run in zip(seeds, runs, strict=True):
        means = _mean_accuracy(run, common)
        for name, (value, difference, stderr) in losses[seed].items():
            accuracy = [f"{figure:.2f}" for figure in means.get(name, ())] or ["", ""]
            loss = [f"{value:.4f}", f"{difference:+.4f}", f"{stderr:.4f}"]
            table.add_row(str(seed), name, *accuracy, *loss)
        gains.append(means["heuristic"][0] - means["sparse+lora"][0])
    console.print(table)
    figures = {
        "heuristic_minus_lora_points": statistics.mean(gains),
        "heuristic_minus_lora_spread": statistics.stdev(gains) if len(gains) > 1 else None,
        "heuristic_minus_lora_loss": statistics.mean(
            losses[seed]["heuristic"][1] for seed in seeds
        ),
    }
    print(json.dumps({"benchmark": "shears_math", "figures": figures}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/math"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--loss-examples", type=int, default=64)
    parser.add_argument("--set", action="append", default=[], help="override of the recipe")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def _run(args: argparse.Namespace, seed: int, console: Console) -> Run:
    overrides = [f"data.dir={args.data or 'null'}", f"seed={seed}", *args.set]
    names = None
    if seed != 0:
        overrides += ["baselines=[sparse+lora]", FURTHER_TASKS]
        names = ["sparse+lora", "heuristic"]
    if args.quick:
        overrides += [*QUICK, "baselines=[sparse, sparse+lora]"]
    recipe = load_recipe(RECIPE, overrides)
    directory = RunDirectory(args.out / ("quick" if args.quick else f"seed-{seed}"))
    with directory.lock():
        directory.claim(recipe, update=True)
        run = Run(directory, recipe, ConsoleReporter(console))
        if names is None:
            shears(run)
        else:
            sparsify(run)
            train_supernet(run)
            train_baseline(run, "sparse+lora")
            measure(run, names)
        write_report(directory.root)
    return run


def _mean_accuracy(run: Run, tasks: set[str]) -> dict[str, tuple[float, float]]:
    """Return system -> mean accuracy over tasks and its standard error, in points."""
    rows: dict[str, list[tuple[float, float]]] = {}
    for row in run.dir.metrics()["rows"]:
        if row["task"] not in tasks:
            continue
        rows.setdefault(row["name"], []).append((row["score"], row["stderr"]))
    return {
        name: (
            100 * statistics.mean(score for score, _ in found),
            100 * math.hypot(*(error for _, error in found)) / len(found),
        )
        for name, found in rows.items()
    }


def _gold_losses(run: Run, n_examples: int) -> dict[str, tuple[float, float, float]]:
    """Return system -> loss, and its paired difference to sparse+LoRA with standard error."""
    cache = run.dir.root / "gold_losses.json"
    if cache.exists():
        return {name: tuple(row) for name, row in json.loads(cache.read_text()).items()}
    config = TaskConfig(name="gsm8k")
    task = get_task(config.name, data_dir=run.recipe.data.dir, tokenizer=run.tokenizer)
    examples = task.report_examples()[:n_examples]
    measured = {}
    baseline = run.load_baseline("sparse+lora")
    measured["sparse+lora"] = example_losses(baseline.model, run.tokenizer, examples)
    net = run.load_supernet()
    for name, subnet in chosen(run).items():
        if name == "heuristic" or (name != "best" and run.recipe.seed == 0):
            net.activate(subnet)
            measured[name] = example_losses(net.model, run.tokenizer, examples)
    reference, counts = measured["sparse+lora"]
    result = {}
    for name, (sums, _) in measured.items():
        total = counts.sum()
        difference = float((sums - reference).sum() / total)
        # Ratio estimator over examples, which differ in length.
        residual = (sums - reference) - difference * counts
        stderr = float(np.sqrt((residual**2).sum()) / total)
        result[name] = (float(sums.sum() / total), difference, stderr)
    cache.write_text(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
