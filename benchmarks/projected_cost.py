"""Hours and money that a run takes at another size: projected from measured ratios, not measured.

Work is counted in forward passes: 2 N operations a token for N weights outside the embedding. The
ratios between our steps and a forward pass are those of docs/results.md (SmolLM2-135M, two cores);
what a GPU computes a second, and what it costs, are options. Who has trained a model on the device
says so instead: ``--train-tokens-s 9000 --at-billions 1.7``, as ``train.jsonl`` has it.

- sparsify: Wanda over the calibration tokens; forwards = 2 x `--wanda`.
- train: forward and input gradient of the frozen base, 2 forwards x `--overhead`.
- search: validation tokens x trials x `--search-work`, the part of whole evaluations that is left.
- report: prefill and decoding of the report examples, for each system; decoding reads all weights
  once a token and batch, so that memory bandwidth bounds it.

Figures: hours_<step>_<size>, dollars_<size>, dominates_<size>.

    python benchmarks/projected_cost.py [--sizes 7 70] [--tflops 400] [--dollars-per-hour 2.5]
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Hours:
    """GPU-hours of one run."""

    sparsify: float
    train: float
    search: float
    report: float

    @property
    def total(self) -> float:
        """All steps together."""
        return self.sparsify + self.train + self.search + self.report

    @property
    def longest(self) -> str:
        """The step that takes most."""
        return max(vars(self), key=lambda name: float(vars(self)[name]))


def hours(billions: float, args: argparse.Namespace) -> Hours:
    """Project the GPU-hours of a run for a model of so many weights."""
    forward_s = _forward_s(billions, args)
    calibration = args.calibration_sequences * args.calibration_length
    trained = args.epochs * args.examples * args.tokens
    searched = args.trials * args.validation * args.tokens
    steps = math.ceil(args.report_examples / args.report_batch) * args.new_tokens
    decode_s = steps * billions * 1e9 * args.bytes / (args.bandwidth_tb_s * 1e12)
    prefill_s = args.report_examples * args.tokens * forward_s
    return Hours(
        calibration * 2 * args.wanda * forward_s / 3600,
        trained * 2 * args.overhead * forward_s / 3600,
        searched * args.search_work * forward_s / 3600,
        args.systems * (decode_s + prefill_s) / 3600,
    )


def _forward_s(billions: float, args: argparse.Namespace) -> float:
    """Return the seconds of one token's forward pass."""
    if args.train_tokens_s is None:
        return float(2 * billions * 1e9 / (args.tflops * 1e12))
    measured = 1 / args.train_tokens_s / (2 * args.overhead)  # of the model that was trained
    return float(measured * billions / args.at_billions)


def main() -> None:
    args = _arguments()
    speed = f"{args.tflops:g} TFLOP/s"
    if args.train_tokens_s is not None:
        speed = f"{args.train_tokens_s:g} tokens/s of {args.at_billions:g}B in training"
    table = Table(title=f"GPU-hours at {speed}, projected")
    for title in ("weights", "sparsify", "train", "search", "report", "total", "$"):
        table.add_column(title, justify="right")
    figures: dict[str, float | str] = {}
    for size in args.sizes:
        found = hours(size, args)
        dollars = found.total * args.dollars_per_hour
        steps = [getattr(found, name) for name in ("sparsify", "train", "search", "report")]
        table.add_row(f"{size:g}B", *(f"{h:.2f}" for h in [*steps, found.total, dollars]))
        figures |= {f"hours_{name}_{size:g}b": round(h, 3) for name, h in vars(found).items()}
        figures[f"dollars_{size:g}b"] = round(dollars, 2)
        figures[f"dominates_{size:g}b"] = found.longest
    Console().print(table)
    print(json.dumps({"benchmark": "projected_cost", "figures": figures}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--sizes", type=float, nargs="+", default=[7, 70], help="billions of weights")
    add("--tflops", type=float, default=400, help="what a GPU reaches, not its peak")
    add("--train-tokens-s", type=float, help="measured in a training; then --tflops is not read")
    add("--at-billions", type=float, default=7, help="of weights: where that was measured")
    add("--bandwidth-tb-s", type=float, default=2.0, help="what a GPU reaches")
    add("--bytes", type=float, default=2, help="of a weight")
    add("--dollars-per-hour", type=float, default=2.5, help="of one GPU")
    add("--examples", type=int, default=10_000)
    add("--tokens", type=int, default=250, help="of an example")
    add("--epochs", type=float, default=3)
    add("--calibration-sequences", type=int, default=128)
    add("--calibration-length", type=int, default=2048)
    add("--trials", type=int, default=200)
    add("--validation", type=int, default=256, help="examples")
    add("--report-examples", type=int, default=1319)
    add("--report-batch", type=int, default=32)
    add("--new-tokens", type=int, default=256)
    add("--systems", type=int, default=6, help="that the report compares")
    add("--wanda", type=float, default=0.97, help="measured, over two forward passes")
    add("--overhead", type=float, default=1.17, help="measured, over forward and input gradient")
    add("--search-work", type=float, default=0.8, help="measured, over --trials evaluations")
    add("--quick", action="store_true", help="the same: nothing is run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
