"""One step of a distilled super-network against one of plain fine-tuning, on the same batches.

Systems take turns on each batch of real SST-2 sentences, so that ratios hold when the machine's
speed drifts. All train every weight of MiniLM-L6 with AdamW:

- plain: forward and backward of the whole model.
- sandwich: largest, one random and smallest sub-network, sliced, with the teacher's logits at hand.
- sandwich, not sliced: the same three passes at full size, as masking would make them.
- sandwich, teacher live: the teacher runs in every step.

The space keeps 100 % to 20 % of the encoder's MACs in equal cuts of all blocks; --high 0.75 begins
at 75 %.

    python benchmarks/sandwich_step.py [--quick] [--steps 20] [--batch-size 32] [--high 1.0]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from data_folder import add_data_option
from rich.console import Console
from rich.table import Table

from elastune.build_structure import structure_space
from elastune.heads import HEADS
from elastune.losses import distillation_loss
from elastune.models import load_model
from elastune.sampling import SandwichSampler
from elastune.supernet import SuperNetwork
from elastune.tasks import get_task

HEAD = HEADS["sequence-classification"]
PARTS = (1.0, 0.75, 0.5, 0.34, 0.2)
Step = Callable[[dict[str, Any], int], None]
Ask = Callable[[dict[str, Any]], torch.Tensor]


def main() -> None:
    args = _arguments()
    model, tokenizer = load_model("minilm-l6", head=HEAD.name, num_labels=2)
    batches = _batches(args, tokenizer)
    systems = _systems(model, args.high, batches)
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(args.steps + 1):
        batch = batches[number % len(batches)]
        for name, step in systems.items():
            started = time.perf_counter()
            step(batch, number)
            if number:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    ratios = {
        name: [own / plain for own, plain in zip(taken, seconds["plain"], strict=True)]
        for name, taken in seconds.items()
    }
    table = Table(title=f"a step, batch {args.batch_size}, in turns ({args.steps} steps)")
    for column in ("system", "s (median)", "times plain (median)", "quartiles"):
        table.add_column(column, justify="left" if column == "system" else "right")
    figures = {}
    for name, taken in seconds.items():
        low, middle, high = statistics.quantiles(ratios[name], n=4)
        table.add_row(
            name, f"{statistics.median(taken):.3f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}"
        )
        figures[name] = {"seconds": statistics.median(taken), "times_plain": middle}
    Console().print(table)
    print(json.dumps({"benchmark": "sandwich_step", "figures": figures}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--high", type=float, default=1.0, choices=PARTS)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.steps = 2 if args.quick else args.steps
    return args


def _batches(args: argparse.Namespace, tokenizer: Any) -> list[dict[str, Any]]:
    """Return batches of like lengths, as training makes them."""
    task = get_task("sst2", data_dir=args.data)
    examples = task.train_examples()[: 16 * args.batch_size]
    items = sorted(HEAD.encode(examples, tokenizer, 128), key=HEAD.length)
    size = args.batch_size
    return [HEAD.collate(items[i : i + size]) for i in range(0, len(items), size)][::-1]


def _systems(model: Any, high: float, batches: list[dict[str, Any]]) -> dict[str, Step]:
    parts = [part for part in PARTS if part <= high]
    heads = [max(2, round(12 * part)) for part in parts]
    space = structure_space(model, heads=heads, ffn=parts, round_to=8)
    teacher = copy.deepcopy(model).eval()

    @torch.no_grad()
    def ask(batch: dict[str, Any]) -> torch.Tensor:
        return HEAD.outputs(teacher, batch)[0]  # type: ignore[no-any-return]

    kept = {id(batch): ask(batch) for batch in batches}

    def remember(batch: dict[str, Any]) -> torch.Tensor:
        return kept[id(batch)]

    def sandwich(ask: Ask, *, sliced: bool = True) -> Step:
        return _sandwich(copy.deepcopy(model), space, ask, sliced=sliced)

    return {
        "plain": _plain(copy.deepcopy(model)),
        "sandwich": sandwich(remember),
        "sandwich, not sliced": sandwich(remember, sliced=False),
        "sandwich, teacher live": sandwich(ask),
    }


def _plain(model: Any) -> Step:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(batch: dict[str, Any], number: int) -> None:
        HEAD.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sandwich(model: Any, space: Any, ask: Ask, *, sliced: bool) -> Step:
    net = SuperNetwork(model, space, train_base=True)
    model.train()
    sampler = SandwichSampler(space, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(batch: dict[str, Any], number: int) -> None:
        target = ask(batch)
        for draw in sampler.draw(number, 0.0):
            net.activate(draw.config if sliced else space.largest())
            (logits,) = HEAD.outputs(model, batch)
            loss = 0.9 * distillation_loss(logits, target, 2.0)
            loss = loss + 0.1 * HEAD.loss_of((logits,), batch)
            (loss * draw.weight).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
