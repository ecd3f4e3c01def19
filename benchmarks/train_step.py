"""One training step of NLS against stock PEFT LoRA of the largest rank, on the same batches.

Three systems take turns on each batch of real maths examples of mixed lengths, so that ratios hold
when the machine's speed drifts:

- peft: `get_peft_model`, padded batch, the model's own loss.
- nls: a new sub-adapter of ranks 32/24/16 each step, packed batch.
- floor: frozen base alone, forward and input gradient over the same packed tokens and labels; no
  adapter can be trained for less. What a step costs above it is the overhead.

Both optimizers are fused AdamW, which is what transformers' Trainer takes. Peak memory is each
system's own process: a step that makes the optimizer's state and one on the longest batch, the
largest resident set.

    python benchmarks/train_step.py [--quick] [--steps 12] [--batch-size 8]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from data_folder import add_data_option
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from elastune.build_space import lora_space
from elastune.data import Encoded, encode_all, pack
from elastune.losses import completion_loss, head_loss
from elastune.models import load_model
from elastune.models.load import checkpoint_folder
from elastune.packing import packed_attention
from elastune.sampling import RandomSampler
from elastune.supernet import SuperNetwork
from elastune.tasks import get_task

RANKS = (32, 24, 16)
PEFT_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "down_proj"]
Step = Callable[[Sequence[Encoded], int], float]


def main() -> None:
    args = _arguments()
    if args.only:
        _report_own_memory(args)
        return
    console = Console()
    memory = {name: _memory_of(name, args) for name in ("peft", "nls")}
    batches, pad = _batches(args)
    steps = {name: make(args.model, pad) for name, make in SYSTEMS.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(args.steps + 1):
        batch = batches[number % len(batches)]
        losses = {}
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            losses[name] = step(batch, number)
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        if number == 0:  # same weights, so the same loss; the first step is a warm-up
            spread = max(losses.values()) - min(losses.values())
            console.print(f"loss of the first batch agrees to {spread:.1e}")
    figures = _ratios(times)
    for label, clock in (("", "wall"), ("_cpu", "CPU")):
        low, middle, high = (figures[f"overhead{label}{end}"] for end in ("_min", "", "_max"))
        console.print(f"above the floor, {clock}: {middle:+.1%} ({low:+.1%} .. {high:+.1%})")
    figures["memory_over_peft"] = memory["nls"] / memory["peft"]
    figures |= {f"memory_{name}_mb": value for name, value in memory.items()}
    table = Table(title=f"{args.model}, {args.steps} steps of {args.batch_size} examples")
    for column in ("system", "median wall s", "median CPU s", "peak memory MB"):
        table.add_column(column, justify="right")
    for name, rows in times.items():
        medians = [statistics.median(column) for column in zip(*rows[1:], strict=True)]
        peak = f"{memory[name]:.0f}" if name in memory else ""
        table.add_row(name, *(f"{median:.2f}" for median in medians), peak)
    console.print(table)
    print(json.dumps({"benchmark": "train_step", "figures": figures}))


def _ratios(times: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Return the median ratios of NLS to the others over the steps, and their range."""
    figures: dict[str, float] = {}
    for label, clock in (("", 0), ("_cpu", 1)):
        for other in ("peft", "floor"):
            ratios = [
                ours[clock] / theirs[clock]
                for ours, theirs in zip(times["nls"][1:], times[other][1:], strict=True)
            ]
            name = f"nls_over_{other}{label}"
            figures[name] = statistics.median(ratios)
            figures[f"{name}_min"], figures[f"{name}_max"] = min(ratios), max(ratios)
        for end in ("", "_min", "_max"):
            figures[f"overhead{label}{end}"] = figures[f"nls_over_floor{label}{end}"] - 1
    return figures


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="2 steps of 2 examples")
    parser.add_argument("--only", choices=list(SYSTEMS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch_size = 2, 2
    return args


def _batches(args: argparse.Namespace) -> tuple[list[list[Encoded]], int]:
    """Return batches of examples in their random order, and a token for padding."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_folder(args.model))
    examples = get_task("gsm8k", data_dir=args.data).train_examples()[
        : args.batch_size * (args.steps + 1)
    ]
    encoded = encode_all(examples, tokenizer, 512)
    size = args.batch_size
    batches = [encoded[i : i + size] for i in range(0, size * (args.steps + 1), size)]
    return batches, tokenizer.eos_token_id


def _peft(name: str, pad: int) -> Step:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=RANKS[0], lora_alpha=2 * RANKS[0], target_modules=PEFT_TARGETS, task_type="CAUSAL_LM"
        )
        model = get_peft_model(load_model(name)[0], config).train()
    optimizer = _optimizer(model)

    def step(batch: Sequence[Encoded], _: int) -> float:
        length = max(len(item.input_ids) for item in batch)
        ids = torch.full((len(batch), length), pad)
        labels = torch.full((len(batch), length), -100)
        mask = torch.zeros(len(batch), length, dtype=torch.long)
        for row, item in enumerate(batch):
            size = len(item.input_ids)
            ids[row, :size] = torch.tensor(item.input_ids)
            labels[row, item.n_prompt : size] = torch.tensor(item.input_ids[item.n_prompt :])
            mask[row, :size] = 1
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=3e-4, fused=True)


def _nls(name: str, _: int) -> Step:
    model, _tokenizer = load_model(name)
    space = lora_space(model, RANKS)
    net = SuperNetwork(model, space, alpha=2 * RANKS[0]).train()
    sampler = RandomSampler(space, seed=0)
    optimizer = _optimizer(net)

    def step(batch: Sequence[Encoded], number: int) -> float:
        net.activate(sampler.draw(number, 0.0)[0].config)
        with packed_attention(model):
            summed, count = completion_loss(model, pack(batch))
            loss = summed / count
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _floor(name: str, _: int) -> Step:
    model, _tokenizer = load_model(name)
    model.requires_grad_(False).train()

    def step(batch: Sequence[Encoded], _: int) -> float:
        packed = pack(batch)
        with packed_attention(model):
            positions = (packed.labels[0] != -100).nonzero()[:, 0]
            embedded = model.get_input_embeddings()(packed.input_ids).requires_grad_(True)
            hidden = model.base_model(
                inputs_embeds=embedded,
                position_ids=packed.positions,
                use_cache=False,
                sequence_starts=tuple(packed.starts.tolist()),
            ).last_hidden_state[0, positions]
            head = model.get_output_embeddings()
            loss = head_loss(hidden, head.weight, None, packed.labels[0, positions])
            loss = loss / len(positions)
            loss.backward()
        return float(loss.detach())

    return step


SYSTEMS: dict[str, Callable[[str, int], Step]] = {"peft": _peft, "nls": _nls, "floor": _floor}


def _report_own_memory(args: argparse.Namespace) -> None:
    """Run two steps of one system and print the process's peak resident memory in MB."""
    batches, pad = _batches(args)
    step = SYSTEMS[args.only](args.model, pad)
    longest = max(batches, key=lambda batch: sum(len(item.input_ids) for item in batch))
    step(longest[:1], 0)  # from now on the optimizer's state takes its memory
    step(longest, 1)
    print(json.dumps(_peak_memory()))


def _peak_memory() -> float:
    """Return this process's largest resident set in MB.

    Of the kernel's status file: a child's ``ru_maxrss`` begins at what its parent had.
    """
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def _memory_of(name: str, args: argparse.Namespace) -> float:
    command: list[Any] = [sys.executable, __file__, "--only", name, "--model", args.model]
    command += ["--steps", str(args.steps), "--batch-size", str(args.batch_size)]
    if args.data:
        command += ["--data", str(args.data)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
