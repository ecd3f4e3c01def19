"""How time grows with the model, the sequence and the number of trials: log-log slopes.

Small random Llamas, so that every size is quick to reach. A slope is that of the least-squares line
through the logarithms of size and time: 1 is linear, below 1 something fixed is shared. Times are
of the processor, the smallest of several rounds in turns over all sizes, so that a busy machine
adds little.

- <what>_by_blocks: over 1, 2, 4 and 8 times the blocks. Goal 1.1.
- <what>_by_tokens: over 1, 2, 4 and 8 times the length of a sequence. Attention is quadratic in it
  by its arithmetic, which no implementation avoids, so that the goal is the slope of the counted
  MACs (macs_by_tokens) and 0.1: <what>_by_tokens_over_macs is the difference.
- search_<algorithm>_by_trials: all overhead of a search of 250, 500 and 1,000 trials over 210 dims,
  whose objective takes no time, kept in a journal file as by default. Goal 1.1.

What: a training step of NLS, an evaluation, Wanda's calibration, `activate`, a configuration's
cost, and the proposals of a search over the model's dims (60 trials).

    python benchmarks/growth.py [--quick] [--only blocks tokens trials]
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import generated
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from search_overhead import overhead, rank_space

from elastune.build_space import lora_space
from elastune.cost import CostModel, model_cost
from elastune.data import pack
from elastune.losses import completion_loss
from elastune.packing import packed_attention
from elastune.search import search
from elastune.sparsify import Sparsity, sparsify_
from elastune.supernet import SuperNetwork

Work = Callable[[], object]
TIMES = (1, 2, 4, 8)
ALGORITHMS = ("random", "hill_climb", "nsga2")


def main() -> None:
    args = _arguments()
    console = Console()
    figures: dict[str, float] = {}
    if "blocks" in args.only:
        sizes = [args.blocks * n for n in TIMES]
        works = {size: _works(size, args.width, args.tokens) for size in sizes}
        figures |= _slopes("blocks", works, args.rounds, console)
    if "tokens" in args.only:
        figures |= _by_tokens(args, console)
    if "trials" in args.only:
        figures |= _by_trials(args.trials, args.rounds, console)
    print(json.dumps({"benchmark": "growth", "figures": figures}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=4, help="of the smallest model")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128, help="of the shortest sequence")
    parser.add_argument("--trials", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    kinds = ["blocks", "tokens", "trials"]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--quick", action="store_true", help="1 round, at most 400 trials")
    args = parser.parse_args()
    if args.quick:
        args.blocks, args.rounds, args.trials = 2, 1, [100, 200, 400]
    return args


def _works(n_blocks: int, width: int, tokens: int, *, n_rows: int = 4) -> dict[str, Work]:
    """Return what is timed, by name, for a model and sequences of a size."""
    net = SuperNetwork(generated.llama(n_blocks, width), _space(n_blocks, width))
    model = net.model
    rng = np.random.default_rng(0)
    configs = [net.space.sample(rng) for _ in range(200)]
    batch = pack(generated.examples(n_rows, tokens))
    ids = generated.rows(n_rows, tokens)
    cost = CostModel(net, tokens)
    # New ones each round: a cost that was asked for is looked up.
    asked = itertools.cycle([[net.space.sample(rng) for _ in configs] for _ in range(8)])
    net.activate(net.space.heuristic())

    def train() -> None:
        with packed_attention(model):
            summed, count = completion_loss(model, batch)
            (summed / count).backward()
        net.zero_grad()

    @torch.inference_mode()
    def evaluate() -> None:
        model(input_ids=ids, use_cache=False)

    plain = generated.llama(n_blocks, width)
    return {
        "training": train,
        "evaluation": evaluate,
        "calibration": lambda: sparsify_(plain, "wanda", Sparsity(0.5), ids),
        "activate": lambda: [net.activate(config) for config in configs],
        "cost": lambda: [cost(config) for config in next(asked)],
        "proposal": lambda: _search(net, cost),
    }


def _space(n_blocks: int, width: int) -> Any:
    return lora_space(generated.llama(n_blocks, width), (32, 24, 16))


def _search(net: SuperNetwork, cost: CostModel) -> None:
    """Search with an objective that takes no time: a weighted sum of the choices."""
    names = [dim.name for dim in net.space.dims]

    def objective(config: Mapping[str, int]) -> dict[str, float]:
        loss = sum(config[name] * (i % 7) for i, name in enumerate(names))
        return {"loss": float(loss), "params": float(sum(config.values()))}

    search(net.space, objective, values=("loss", "params"), algorithm="hill_climb", trials=60)


def _by_tokens(args: argparse.Namespace, console: Console) -> dict[str, float]:
    """Return slopes over the length of one sequence, beside that of the arithmetic."""
    lengths = [args.tokens * n for n in TIMES]
    kept = ("training", "evaluation", "calibration")
    works = {
        length: {
            name: work
            for name, work in _works(args.blocks, args.width, length, n_rows=1).items()
            if name in kept
        }
        for length in lengths
    }
    figures = _slopes("tokens", works, args.rounds, console)
    model = generated.llama(args.blocks, args.width)
    macs = slope(lengths, [model_cost(model, length).macs for length in lengths])
    over = {f"{name}_over_macs": value - macs for name, value in figures.items()}
    return figures | {"macs_by_tokens": macs} | over


def _by_trials(trials: Sequence[int], rounds: int, console: Console) -> dict[str, float]:
    space = rank_space(210)
    works: dict[int, dict[str, Work]] = {
        n: {f"search_{name}": _overhead(space, name, n) for name in ALGORITHMS} for n in trials
    }
    return _slopes("trials", works, min(rounds, 2), console)


def _overhead(space: Any, algorithm: str, trials: int) -> Work:
    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            overhead(space, Path(folder) / "journal", algorithm, trials)

    return work


def _slopes(
    by: str, works: Mapping[int, Mapping[str, Work]], rounds: int, console: Console
) -> dict[str, float]:
    """Time every piece of work at every size, and return name -> slope."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for number in range(rounds + 1):
        for size, of_size in works.items():
            for name, work in of_size.items():
                started = time.process_time()
                work()
                # The first round warms up, but counts where there are few: the smallest is taken.
                if number or rounds < 2:
                    seconds.setdefault((name, size), []).append(time.process_time() - started)
    table = Table(title=f"CPU ms, by {by}")
    table.add_column("what")
    for size in works:
        table.add_column(f"{size}", justify="right")
    table.add_column("slope", justify="right")
    figures = {}
    for name in next(iter(works.values())):
        least = [min(seconds[name, size]) for size in works]
        figures[f"{name}_by_{by}"] = slope(list(works), least)
        cells = [f"{value * 1000:.4g}" for value in least]
        table.add_row(name, *cells, f"{figures[f'{name}_by_{by}']:.2f}")
    console.print(table)
    return figures


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of the least-squares line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


if __name__ == "__main__":
    main()
