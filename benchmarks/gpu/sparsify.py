"""Wanda and SparseGPT at 50 % on a 7B model, 128 rows of 2,048 tokens. Published: Wanda in minutes.

- wanda_s, sparsegpt_s: all of `sparsify_`, calibration included. Goal for Wanda: 300 s.
- wanda_peak_gib, sparsegpt_peak_gib: most that torch allocated meanwhile.
- two_forwards_s: two plain passes over the same rows without the head; wanda_over_two_forwards.
- wanda_zeros, sparsegpt_zeros: of a weight of the last block, 0.5.

    python benchmarks/gpu/sparsify.py [--quick] [--methods wanda] [--sequences 128] [--length 2048]
                                      [--device cuda] [--blocks 32] [--width 4096]
"""

from __future__ import annotations

import argparse
from typing import Any

import subject
import torch

from elastune.data import row_batches
from elastune.sparsify import Sparsity, sparsify_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    subject.add_options(parser)
    kinds = ["wanda", "sparsegpt"]
    parser.add_argument("--methods", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    args = subject.parsed(parser, "gpu_sparsify")
    rows = subject.rows(args, args.sequences, args.length)
    figures: dict[str, Any] = {"device": subject.device_name(args.device)}
    for method in args.methods:
        figures |= _figures(method, rows, args)
    title = f"{args.blocks} blocks of {args.width}, {args.sequences} x {args.length} tokens"
    subject.report("gpu_sparsify", title, figures)


def _figures(method: Any, rows: torch.Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Prune a new model by one method, right after two passes of it."""
    model = subject.llama(args)
    two_forwards(model, rows[:1])  # the first call loads kernels
    plain_s, _ = subject.measured(lambda: two_forwards(model, rows), args.device)
    half = Sparsity(0.5)
    seconds, peak = subject.measured(lambda: sparsify_(model, method, half, rows), args.device)
    weight = model.model.layers[-1].mlp.down_proj.weight
    return {
        "two_forwards_s": plain_s,
        f"{method}_s": seconds,
        f"{method}_peak_gib": peak,
        f"{method}_over_two_forwards": seconds / plain_s,
        f"{method}_zeros": float((weight == 0).float().mean()),
    }


@torch.inference_mode()
def two_forwards(model: Any, rows: torch.Tensor) -> None:
    """Run the blocks twice over all rows."""
    for _ in range(2):
        for batch in row_batches(rows, 4096):
            model.base_model(input_ids=batch.to(model.device), use_cache=False)


if __name__ == "__main__":
    main()
