"""Sparsifiers at 50 %: WikiText-2 perplexity, zeros per row, and time against forward passes.

The yardstick of time is two plain forward passes over the calibration tokens without the head:
what any method must pay that looks at every layer's input and goes on through the pruned layer.
It is timed right before and right after Wanda in the same process, and the mean is the divisor.
wanda_peak_mb is the process's peak memory up to then: nothing before Wanda holds more.

    python benchmarks/sparsify.py [--quick] [--model smollm2-135m] [--sequences 128] [--length 256]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from data_folder import add_data_option
from rich.console import Console
from rich.table import Table

from elastune.calibration_text import calibration_texts
from elastune.data import calibration_rows, row_batches
from elastune.evaluate import evaluate
from elastune.export.profile_run import peak_mb
from elastune.models import load_model
from elastune.sparsify import Sparsity, sparsify_
from elastune.tasks import get_task


def main() -> None:
    args = _arguments()
    console = Console()
    sparsity = Sparsity.parse(args.ratio)
    model, tokenizer = load_model(args.model)
    rows = calibration_rows(
        calibration_texts("c4", args.data),
        tokenizer,
        n_sequences=args.sequences,
        length=args.length,
        seed=0,
    )
    task = get_task("wikitext2", data_dir=args.data, window=512)
    texts = task.report_examples()[: args.pieces]

    def perplexity() -> tuple[float, float, int]:
        score = evaluate(model, tokenizer, task, texts)
        return score.value, score.stderr, score.n

    dense_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results: dict[str, dict[str, Any]] = {"dense": {"ppl": perplexity()}}
    two_forwards = [_timed(lambda: _two_forwards(model, rows))]
    for method in ("wanda", "sparsegpt", "magnitude"):
        model.load_state_dict(dense_state)
        masks: dict[str, torch.Tensor] = {}
        seconds = _timed(
            lambda m=method, out=masks: out.update(sparsify_(model, m, sparsity, rows))
        )
        if method == "wanda":
            wanda_peak_mb = peak_mb()
            two_forwards.append(_timed(lambda: _two_forwards(model, rows)))
        zeros = {
            int(n) for mask in masks.values() for n in (~mask).sum(dim=1) * 100 // mask.shape[1]
        }
        results[method] = {"ppl": perplexity(), "seconds": seconds, "zeros": zeros}
    yardstick = [sum(times) / len(times) for times in zip(*two_forwards, strict=True)]
    table = Table(
        title=f"{args.model}, {args.ratio:.0%}, {rows.shape[0]} x {rows.shape[1]} C4 tokens"
    )
    for column in (
        "method",
        "perplexity",
        "stderr",
        "zeros per row %",
        "wall s",
        "CPU s",
        "x two fwd",
    ):
        table.add_column(column, justify="right")
    for name, result in results.items():
        value, stderr, _ = result["ppl"]
        wall, cpu = result.get("seconds", (float("nan"),) * 2)
        span = result.get("zeros", {0})
        table.add_row(
            name, f"{value:.2f}", f"{stderr:.2f}", f"{min(span)}..{max(span)}",
            f"{wall:.1f}", f"{cpu:.1f}", f"{wall / yardstick[0]:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"two forward passes: {yardstick[0]:.1f} s wall, {yardstick[1]:.1f} s CPU; "
        f"perplexity over {results['dense']['ppl'][2]} tokens"
    )
    wall, cpu = results["wanda"]["seconds"]
    figures = {
        "wanda_over_two_forwards": wall / yardstick[0],
        "wanda_over_two_forwards_cpu": cpu / yardstick[1],
        "sparsegpt_over_two_forwards": results["sparsegpt"]["seconds"][0] / yardstick[0],
        "sparsegpt_over_two_forwards_cpu": results["sparsegpt"]["seconds"][1] / yardstick[1],
        "wanda_peak_mb": wanda_peak_mb,
        **{f"perplexity_{name}": result["ppl"][0] for name, result in results.items()},
    }
    print(json.dumps({"benchmark": "sparsify", "figures": figures}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--pieces", type=int, default=60, help="pieces of test text, ~500 tokens each"
    )
    parser.add_argument("--quick", action="store_true", help="8 x 128 tokens, 1 piece")
    args = parser.parse_args()
    if args.quick:
        args.sequences, args.length, args.pieces = 8, 128, 1
    return args


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


@torch.inference_mode()
def _two_forwards(model: Any, rows: torch.Tensor) -> None:
    for _ in range(2):
        for batch in row_batches(rows, 4096):
            model.base_model(input_ids=batch, use_cache=False)


if __name__ == "__main__":
    main()
