"""How well a latency table, measured once, predicts sub-networks: error and rank correlation.

Each choice of heads, width and depth is measured once for all equal blocks; then random
sub-networks are measured in turns with the full size, and predictions compared with them. In
processor time where --clock says so: on a machine that other programs use, with one thread.

    python benchmarks/latency_table.py [--quick] [--n 16] [--clock wall] [--save FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from elastune.build_structure import structure_space
from elastune.latency import Conditions
from elastune.latency_table import LatencyTable, table_error
from elastune.models import load_model
from elastune.supernet import SuperNetwork


def main() -> None:
    args = _arguments()
    model, _ = load_model(args.model)
    space = structure_space(
        model, ffn=[1.0, 0.875, 0.75, 0.625, 0.5], heads=[1.0, 2 / 3, 1 / 3], depth="all"
    )
    net = SuperNetwork(model, space)
    conditions = Conditions(1, args.tokens, args.new_tokens, args.repeats, 1)
    started = time.perf_counter()
    table = LatencyTable.measure(net, conditions, clock=args.clock)
    seconds = time.perf_counter() - started
    if args.save:
        table.save(args.save)
    rng = np.random.default_rng(0)
    configs = [space.sample(rng) for _ in range(args.n)]
    error = table_error(table, net, configs)
    predictions = []
    for config in configs * 20:
        clock = time.process_time()
        table.predict(config)
        predictions.append((time.process_time() - clock) * 1e6)
    figures = {
        "n": error.n,
        "measure_s": seconds,
        "predict_us": statistics.median(predictions),
    }
    shown = Table(title=f"{args.model}, {args.clock} time, {torch.get_num_threads()} threads")
    for column in ("", "full size ms", "median error", "largest error", "Spearman"):
        shown.add_column(column, justify="right")
    for name, found, full in (
        ("prefill", error.prefill, table.largest[0]),
        ("decode", error.decode, table.largest[1]),
    ):
        if found is None:
            continue
        numbers = (f"{found.median:.1%}", f"{found.maximum:.1%}", f"{found.spearman:.3f}")
        shown.add_row(name, f"{full:.1f}", *numbers)
        figures |= {f"{name}_{key}": value for key, value in found._asdict().items()}
    console = Console()
    console.print(shown)
    console.print(
        f"{error.n} random sub-networks; table measured in {seconds:.0f} s, a prediction takes "
        f"{figures['predict_us']:.0f} microseconds"
    )
    print(json.dumps({"benchmark": "latency_table", "figures": figures}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=128, help="of the prompt")
    parser.add_argument("--new-tokens", type=int, default=8, help="decoded after it")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--n", type=int, default=16, help="sub-networks to compare with")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--save", type=Path, help="keep the table in this file")
    parser.add_argument("--quick", action="store_true", help="64 tokens, 3 rounds, 4 sub-networks")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.new_tokens, args.repeats, args.n = 64, 6, 3, 4
    return args


if __name__ == "__main__":
    main()
