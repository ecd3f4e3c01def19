"""Trainings in several processes against the same in one: how far apart are their weights.

Toy models and data, launched as users launch them, on CPUs: data parallelism, a frozen base in
shards (FSDP2), optimizer states in shards (DeepSpeed ZeRO, where it is installed). What trains:
an elastic adapter (ranks), an adapter on an elastic base (structure), a sandwich with in-place
distillation, and EFTNAS (scores by movement pruning, all weights, an outside teacher, a size that
trains alone). ZeRO refuses structure, whose steps leave blocks out.

Figures: weights_<how>_<what>, the largest difference of a trained weight over the largest weight,
over all trainings of the run; losses_<how>_<what>, of a step's loss, relative.

    python benchmarks/processes.py [--quick] [--hows ddp fsdp2 zero1 zero2] [--kinds ranks eftnas]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

HOWS = {
    "ddp": ["--multi_gpu"],
    "fsdp2": ["--use_fsdp", "--fsdp_version", "2"],
    "zero1": ["--use_deepspeed", "--zero_stage", "1"],
    "zero2": ["--use_deepspeed", "--zero_stage", "2"],
}


def main() -> None:
    from test_processes import KINDS, difference, launched, losses, recipe, trainings
    from tiny_run import cli

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hows", nargs="+", choices=HOWS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--quick", action="store_true", help="data parallelism of one kind")
    args = parser.parse_args()
    found = importlib.util.find_spec("deepspeed") is not None
    hows = args.hows or [how for how in HOWS if found or not how.startswith("zero")]
    kinds = args.kinds
    if args.quick:
        hows, kinds = hows[:1], kinds[:1]

    print("two processes against one: largest differences of weights, of losses")
    figures: dict[str, float] = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            file = recipe(home, **KINDS[kind])
            with contextlib.redirect_stdout(io.StringIO()):
                cli("run", file, "--out", home / "one")
            for how in hows:
                if how.startswith("zero") and kind == "structure":
                    continue
                launched("run", file, "--out", home / how, how=HOWS[how])
                for training in trainings(home / "one"):
                    one, two = home / "one" / training, home / how / training
                    pairs = zip(losses(two), losses(one), strict=True)
                    loss = max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs)
                    weights = difference(two, one)
                    print(f"{how:6} {kind:10} {training:28} {weights:.1e} {loss:.1e}", flush=True)
                    for name, value in (("weights", weights), ("losses", loss)):
                        key = f"{name}_{how}_{kind}"
                        figures[key] = max(figures.get(key, 0.0), value)
    print(json.dumps({"benchmark": "processes", "figures": figures}))


if __name__ == "__main__":
    main()
