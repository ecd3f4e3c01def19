"""What adapters that keep zeros (SparsePEFT) or the INT4 grid cost to train, and what they learn.

Systems take turns on each batch of real maths examples, each with its own super-network of the same
seed and draws, so that ratios hold when the machine's speed drifts: NLS adapters that keep nothing
(Shears), and those that keep zeros or the grid, with exact gradients or from a part of the tokens.
After the steps the loss on held-out examples is that of the middle sub-network, merged where it can
be: what training was for.

    python benchmarks/masked_step.py [--quick] [--steps 40] [--batch-size 8] [--seeds 0]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from data_folder import add_data_option
from rich.console import Console
from rich.table import Table

from elastune.build_space import lora_space
from elastune.calibration_text import calibration_texts
from elastune.data import calibration_rows, encode_all, pack
from elastune.likelihood import mean_loss
from elastune.losses import completion_loss
from elastune.models import load_model
from elastune.packing import packed_attention
from elastune.quantise import quantise_
from elastune.sampling import RandomSampler
from elastune.sparsify import Sparsity, sparsify_
from elastune.subnetwork import extract_model
from elastune.supernet import SuperNetwork
from elastune.tasks import get_task

RANKS = (32, 24, 16)
SYSTEMS: dict[str, tuple[Any, float]] = {
    "nothing": ("nothing", 1.0),
    "zeros, exact": ("zeros", 1.0),
    "zeros, 1/2": ("zeros", 0.5),
    "zeros, 1/4": ("zeros", 0.25),
    "zeros, 1/8": ("zeros", 0.125),
    "int4, exact": ("int4", 1.0),
    "int4, 1/4": ("int4", 0.25),
}
QUICK = ("nothing", "zeros, exact", "zeros, 1/4")


class System:
    """A super-network with its optimizer."""

    def __init__(self, args: argparse.Namespace, name: str, base: Any, grids: Any, seed: int):
        keep, share = SYSTEMS[name]
        self.model, _ = load_model(args.model)
        self.model.load_state_dict(base["int4" if keep == "int4" else "sparse"])
        space = lora_space(self.model, RANKS)
        self.net = SuperNetwork(
            self.model,
            space,
            alpha=2 * RANKS[0],
            seed=seed,
            keep=keep,
            token_share=share,
            grids=grids if keep == "int4" else None,
        ).train()
        self.sampler = RandomSampler(space, seed=seed)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.net.parameters() if p.requires_grad], lr=args.learning_rate
        )

    def step(self, batch: Any, number: int) -> float:
        self.net.activate(self.sampler.draw(number, 0.0)[0].config)
        with packed_attention(self.model):
            summed, count = completion_loss(self.model, pack(batch))
            loss = summed / count
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def validation_loss(self, examples: Any, tokenizer: Any) -> float:
        self.net.eval()
        config = self.net.space.heuristic()
        with self.net.active(config):
            found = mean_loss(self.model, tokenizer, examples).loss
        if self.net.keep != "nothing":
            merged = extract_model(self.net, config).model
            merged_loss = mean_loss(merged, tokenizer, examples).loss
            assert abs(merged_loss - found) < 1e-4, (merged_loss, found)
        return found


def main() -> None:
    args = _arguments()
    console = Console()
    model, tokenizer = load_model(args.model)
    n_rows, length = (4, 128) if args.quick else (32, 512)
    rows = calibration_rows(
        calibration_texts("c4", args.data), tokenizer, n_sequences=n_rows, length=length, seed=0
    )
    sparsify_(model, "wanda", Sparsity.parse(0.5, None), rows)
    base = {"sparse": {n: t.clone() for n, t in model.state_dict().items()}}
    grids = quantise_(model, group_size=64)
    base["int4"] = {n: t.clone() for n, t in model.state_dict().items()}
    examples = get_task("gsm8k", data_dir=args.data).train_examples()
    held_out, examples = examples[: args.validation], examples[args.validation :]
    n = args.batch_size
    encoded = encode_all(examples[: n * args.steps], tokenizer, 512)
    losses: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in args.seeds:
        systems = {name: System(args, name, base, grids, seed) for name in args.only}
        for number in range(args.steps):
            batch = encoded[number * n : (number + 1) * n]
            times = {}
            for name, system in systems.items():
                started = time.process_time()
                loss = system.step(batch, number)
                times[name] = time.process_time() - started
                if number % 10 == 9:
                    console.print(f"seed {seed}, step {number + 1}, {name}: {loss:.3f}")
            if number:
                for name, value in times.items():
                    seconds.setdefault(name, []).append(value)
                    ratios.setdefault(name, []).append(value / times[args.only[0]])
        for name, system in systems.items():
            losses.setdefault(name, []).append(system.validation_loss(held_out, tokenizer))
            console.print(f"seed {seed}, {name}: validation loss {losses[name][-1]:.4f}")
    table = Table(title=f"{args.model}, {args.steps} steps of {n} examples")
    for column in (
        "keeps, tokens",
        "CPU s a step",
        "over the first",
        "min..max",
        "validation loss",
    ):
        table.add_column(column, justify="right")
    for name, found in ratios.items():
        table.add_row(
            name,
            f"{statistics.median(seconds[name]):.2f}",
            f"{statistics.median(found):.3f}",
            f"{min(found):.2f}..{max(found):.2f}",
            " ".join(f"{loss:.4f}" for loss in losses[name]),
        )
    console.print(table)
    figures = {
        "ratio": {name: statistics.median(found) for name, found in ratios.items()},
        "validation_loss": losses,
    }
    print(json.dumps({"benchmark": "masked_step", "figures": figures}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--validation", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=list(SYSTEMS), default=None)
    parser.add_argument("--quick", action="store_true", help="2 steps of 2 examples, 3 systems")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch_size, args.validation = 2, 2, 4
    args.only = args.only or (list(QUICK) if args.quick else list(SYSTEMS))
    return args


if __name__ == "__main__":
    main()
