"""What a search takes, against evaluating the same sub-networks one by one in full.

A search over the ranks of adapters on SmolLM2-135M (32, 24 or 16 on q, k, v, up and down), the loss
of worked solutions to maths problems against parameters. Every configuration that it tries is at
once measured by a plain objective, too, without cache, race, reused hidden states and merged
adapters: both in turns, so that the ratio holds when the machine's speed drifts.

- wall_over_full: the whole search, proposals and storage included, over the plain measurements.
- equivalents_over_trials: the same by counting: whole evaluations of the largest, per trial.
- largest_difference: between the two measurements of what was not dropped, relative.
- best_above_plain: how much worse the search's best is, by the plain objective, than the best of
  all that it tried; in nats.

    python benchmarks/search_cost.py [--quick] [--trials 200] [--examples 64] [--train-steps 32]
        [--algorithm hill_climb] [--shortest]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_folder import add_data_option
from rich.console import Console
from rich.table import Table

from elastune.build_space import lora_space
from elastune.config import TrainConfig
from elastune.cost import CostModel
from elastune.data import encode_all
from elastune.models import load_model
from elastune.objective import ValidationObjective, make_objective
from elastune.sampling import RandomSampler
from elastune.search import ALGORITHMS, Known, Measurement, SearchResult, Trial, search
from elastune.space import SubnetConfig
from elastune.supernet import SuperNetwork
from elastune.tasks import get_task
from elastune.train import train

TARGETS = ("q", "k", "v", "up", "down")
_APART = 2000
"""Examples that are not trained on; validation examples are among them."""
PLAIN: dict[str, Any] = {"cache": False, "reuse": False, "race": False}


class InTurns:
    """Measures each configuration twice: as the search would, and plainly in full."""

    def __init__(self, shared: ValidationObjective, plain: ValidationObjective) -> None:
        self._shared = shared
        self._plain = plain
        self.seconds: list[tuple[float, float]] = []
        self.found: dict[SubnetConfig, tuple[Measurement, float]] = {}

    def __call__(self, config: SubnetConfig) -> Mapping[str, float]:
        return self.measure(config, ()).values

    def measure(self, config: SubnetConfig, rivals: Sequence[Trial]) -> Measurement:
        started = time.perf_counter()
        measured = self._shared.measure(config, rivals)
        middle = time.perf_counter()
        loss = self._plain(config)["loss"]
        self.seconds.append((middle - started, time.perf_counter() - middle))
        self.found[config] = (measured, loss)
        return measured


def main() -> None:
    args = _arguments()
    console = Console()
    net, tokenizer, task, examples = _prepared(args, console)
    count = CostModel(net, 128)
    options: dict[str, Any] = {"kind": "loss", "batch_tokens": args.batch_tokens}
    shared, values = make_objective(net, tokenizer, task, examples, count, **options)
    plain, _ = make_objective(net, tokenizer, task, examples, count, **options, **PLAIN)
    both = InTurns(shared, plain)
    plain(net.space.largest())  # warms up
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = search(
            net.space,
            both,
            values=values,
            algorithm=args.algorithm,
            trials=args.trials,
            storage=Path(folder) / "study.journal",
            seed=args.seed,
            known=Known(values, costs=lambda config: vars(count(config))),
            progress=lambda done, total, trial: _say(console, done, total, trial, both),
        )
    figures = _figures(result, both, time.perf_counter() - started)
    _show(console, figures)
    print(json.dumps({"benchmark": "search_cost", "figures": figures}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--algorithm", choices=sorted(ALGORITHMS), default="hill_climb")
    parser.add_argument("--train-steps", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shortest", action="store_true", help="the shortest of the examples")
    parser.add_argument("--quick", action="store_true", help="6 trials, 8 short examples")
    args = parser.parse_args()
    if args.quick:
        args.trials, args.examples, args.train_steps, args.shortest = 6, 8, 0, True
    return args


def _prepared(args: argparse.Namespace, console: Console) -> tuple[SuperNetwork, Any, Any, Any]:
    """Return a super-network, trained or filled at random, and validation examples."""
    model, tokenizer = load_model("smollm2-135m")
    task = get_task("math_instruct", data_dir=args.data, tokenizer=tokenizer)
    rng = np.random.default_rng(args.seed)
    everything = task.train_examples()
    order = rng.permutation(len(everything))
    examples = [everything[i] for i in order[:_APART]]
    if args.shortest:
        examples.sort(key=lambda example: len(example.prompt + example.completion))
    examples = examples[: args.examples]
    net = SuperNetwork(model, lora_space(model, (32, 24, 16), targets=TARGETS), seed=args.seed)
    if args.train_steps:
        steps = TrainConfig(max_steps=args.train_steps, batch_size=8, max_length=384)
        items = encode_all([everything[i] for i in order[_APART:]], tokenizer, 384)
        console.print(f"training for {args.train_steps} steps")
        with tempfile.TemporaryDirectory() as folder:
            train(net, items, RandomSampler(net.space, args.seed), steps, folder=Path(folder))
    else:
        generator = torch.Generator().manual_seed(args.seed)
        with torch.no_grad():
            for adapter in net.adapters.values():
                adapter.lora_B.normal_(std=0.005, generator=generator)
    return net, tokenizer, task, examples


def _say(console: Console, done: int, total: int, trial: Trial, both: InTurns) -> None:
    own, full = both.seconds[-1]
    state = "dropped" if trial.dropped else "whole"
    loss = trial.values["loss"]
    console.print(f"{done}/{total}: loss {loss:.4f}, {state}, {own:.1f} s against {full:.1f} s")


def _figures(result: SearchResult, both: InTurns, wall: float) -> dict[str, Any]:
    full = sum(seconds for _, seconds in both.seconds)
    whole = [(m.values["loss"], loss) for m, loss in both.found.values() if not m.dropped]
    n = len(both.seconds)
    best = both.found[result.best().config][1]
    return {
        "wall_over_full": (wall - full) / full,
        "search_s": wall - full,
        "full_s": full,
        "trials": n,
        "dropped": n - len(whole),
        "equivalents_over_trials": sum(m.equivalents for m, _ in both.found.values()) / n,
        "largest_difference": max(abs(own - loss) / loss for own, loss in whole),
        "best_above_plain": best - min(loss for _, loss in both.found.values()),
    }


def _show(console: Console, figures: Mapping[str, Any]) -> None:
    table = Table(title="a search against its sub-networks one by one in full")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)


if __name__ == "__main__":
    main()
