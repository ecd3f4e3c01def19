"""Single-choice losses estimated from one backward pass, against measured ones, and what each buys.

SmolLM2-135M whose feed-forward widths and heads are elastic, sorted by Wanda, not trained, or the
super-network of a run directory. Losses of every choice alone on some examples: measured one by one
(hidden states used again), estimated from a forward and a backward pass over the same ones, each in
another sub-network ("estimated") or all in the largest one ("largest").

- pearson, spearman: of losses estimated in the largest and measured ones, over all choices.
- work_<how>: in whole evaluations of these examples.
- cpu_estimated_over_measured: processor time.
- <how>_<percent>: increase of the loss over the largest, on more examples, of the sub-network that
  a knapsack over the losses finds for a part of the blocks' MACs; "equal" takes losses in
  proportion to what is cut.

    python benchmarks/choice_losses.py [RUN] [--quick] [--probes 16] [--examples 48] [--shortest]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from data_folder import add_data_option
from rich.console import Console
from rich.table import Table
from search_front import COST, Beginning, Subject, estimated, measured, of_run, untrained

from elastune.allocate import Knapsack, Losses
from elastune.errors import InvalidSpace

PARTS = (0.95, 0.9, 0.85, 0.8, 0.75)


def main() -> None:
    args = _arguments()
    subject = of_run(args) if args.run else untrained(args)
    # The shortest come first, and the first are the probes.
    subject.examples = random.Random(0).sample(subject.examples, len(subject.examples))
    console = Console(width=110)
    subject.cheap()(subject.net.space.largest())  # warms up
    found: dict[str, Beginning] = {}
    work: dict[str, float] = {}
    seconds: dict[str, float] = {}
    ways: dict[str, Callable[[Subject, str], Beginning]] = {
        "estimated": estimated,
        "largest": partial(estimated, everywhere=False),
        "measured": measured,
    }
    for name, make in ways.items():
        started = time.process_time()
        found[name] = make(subject, "cheap")
        seconds[name] = time.process_time() - started
        work[name] = found[name].work * len(subject.examples) / subject.probes
    figures: dict[str, Any] = _agreement(found["largest"].losses, found["measured"].losses)
    figures |= {f"work_{name}": value for name, value in work.items()}
    figures["cpu_estimated_over_measured"] = seconds["estimated"] / seconds["measured"]
    figures |= _fronts(subject, found | {"equal": Beginning(_proportional(subject), 0.0)}, console)
    for name in ("pearson", "spearman", "cpu_estimated_over_measured"):
        console.print(f"{name}: {figures[name]:.3f}")
    console.print(", ".join(f"{name}: {value:.1f} evaluations" for name, value in work.items()))
    print(json.dumps({"benchmark": "choice_losses", "figures": figures}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("run", type=Path, nargs="?", help="run directory of a super-network")
    parser.add_argument("--probes", type=int, default=16, help="examples of single choices")
    parser.add_argument("--examples", type=int, default=48, help="what sub-networks are scored on")
    parser.add_argument("--shortest", action="store_true", help="the shortest of a run's examples")
    parser.add_argument("--quick", action="store_true", help="widths alone, 4 examples, 8 in all")
    args = parser.parse_args()
    if args.quick:
        args.probes, args.examples = 4, 8
    return args


def _agreement(estimate: Losses, measurement: Losses) -> dict[str, float]:
    """Compare the losses of all choices that both have, but for the largest."""
    from scipy.stats import pearsonr, spearmanr

    pairs = np.array(
        [
            (estimate[name][choice], loss)
            for name, of_dim in measurement.items()
            for choice, loss in of_dim.items()
            if name in estimate and choice != max(of_dim)
        ]
    )
    return {
        "pearson": float(pearsonr(*pairs.T)[0]),
        "spearman": float(spearmanr(*pairs.T)[0]),
        "choices": len(pairs),
    }


def _proportional(subject: Subject) -> Losses:
    """Return losses in proportion to the part of a dim that is cut."""
    return {
        dim.name: {choice: 1 - choice / dim.choices[0] for choice in dim.choices}
        for dim in subject.net.space.dims
        if dim.kind != "rank"
    }


def _fronts(subject: Subject, found: Mapping[str, Beginning], console: Console) -> dict[str, float]:
    """Score what a knapsack over each of the losses finds for some budgets."""
    space, objective = subject.net.space, subject.cheap()
    knapsack = Knapsack(space, lambda config: float(subject.costs(config)[COST]))
    base = objective(space.largest())["loss"]
    table = Table(title=f"loss beyond the largest's ({base:.4f}), by part of the blocks' MACs")
    for column in ("losses", *(f"{part:.0%}" for part in PARTS)):
        table.add_column(column, justify="left" if column == "losses" else "right")
    figures: dict[str, float] = {}
    for name, begin in found.items():
        cells = []
        for part in PARTS:
            try:
                budget = part * knapsack.base_cost
                config = knapsack.allocate(begin.losses, budget)
            except InvalidSpace:
                cells.append("too small")
                continue
            lost = objective(config)["loss"] - base
            figures[f"{name}_{part:.0%}".rstrip("%")] = lost
            cells.append(f"{lost:+.3f}")
        table.add_row(name, *cells)
    console.print(table)
    return figures


if __name__ == "__main__":
    main()
