"""What the benchmarks for a GPU share: a model of Llama-2-7B's shape on the device, and clocks.

Weights are random: nothing is downloaded, and no time depends on their values. On a machine without
a GPU a script says so and ends well, unless `--device cpu` is asked for, which is for trying the
scripts out at toy size (`--blocks 2 --width 128`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is measured, and on what."""
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096, help="hidden size")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--quick", action="store_true", help="4 blocks, fewer rounds")


def parsed(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """Parse the arguments; end the script where the device is not there."""
    args = parser.parse_args()
    if args.quick:
        args.blocks = min(args.blocks, 4)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        reason = "no GPU here that torch can use; --device cpu --blocks 2 --width 128 tries it out"
        print(f"skipped: {reason}")
        print(json.dumps({"benchmark": name, "figures": {}, "skipped": reason}))
        sys.exit(0)
    return args


def llama(args: argparse.Namespace) -> LlamaForCausalLM:
    """Return the model in bfloat16, frozen."""
    head = 128 if args.width >= 1024 else 32
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.width * 43 // 16,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.width // head,
        num_key_value_heads=args.width // head,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def rows(args: argparse.Namespace, n: int, length: int) -> torch.Tensor:
    """Return random token ids on the CPU, ``(n, length)``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, args.vocabulary, (n, length), generator=generator)


def measured(work: Callable[[], Any], device: str) -> tuple[float, float]:
    """Return the seconds that some work takes, and the device's peak memory in GiB meanwhile.

    Memory is what torch has allocated; NaN on the CPU.
    """
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")


def report(name: str, title: str, figures: Mapping[str, Any]) -> None:
    """Print the figures, and as the last line all that there are as JSON."""
    print(title)
    known = {key: value for key, value in figures.items() if value == value}  # no NaN
    for key, value in known.items():
        print(f"{key}: {value if isinstance(value, str) else f'{value:.4g}'}")
    print(json.dumps({"benchmark": name, "figures": known}))


def device_name(device: str) -> str:
    """Return what the device calls itself."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else device
