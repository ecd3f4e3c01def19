"""Memory of a training step of elastic adapters: a base in float32 against one packed in 4 bits.

Each is loaded and trained one step in processes of their own, with gradient checkpointing and
without. Memory is the most that was resident above what the interpreter and its libraries took
before: weights, activations, gradients. The packed checkpoint is made first and not measured.

- loaded_mb: what is resident once the model is loaded. peak_mb: at most, in the step or before.
- *_over_float32: the peak over that of float32 without gradient checkpointing.
- cpu_over_float32: CPU time of the step; weights are unpacked in every product.

    python benchmarks/four_bit.py [--quick] [--model smollm2-135m] [--rows 8] [--length 256]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from elastune.memory import peak_memory

KINDS = ("float32", "float32_checkpointing", "nf4", "nf4_checkpointing")


def main() -> None:
    args = _arguments()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        _pack(args.model, scratch / "packed")
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(args.repeats):
            for kind in KINDS:
                options = {
                    "source": str(scratch / "packed") if kind.startswith("nf4") else args.model,
                    "checkpointing": kind.endswith("checkpointing"),
                    "rows": args.rows,
                    "length": args.length,
                    "answer": str(scratch / "answer.json"),
                }
                peak = peak_memory("four_bit:prepare", options)
                step = json.loads((scratch / "answer.json").read_text())
                step["loaded_mb"] -= peak.start_mb
                found[kind].append(step | {"peak_mb": peak.peak_mb - peak.start_mb})
    for kind, runs in found.items():
        for key in ("loaded_mb", "peak_mb", "cpu_s"):
            figures[f"{kind}_{key}"] = statistics.median(run[key] for run in runs)
    for kind in KINDS[1:]:
        for key, name in (("peak_mb", "peak"), ("cpu_s", "cpu")):
            ratios = [a[key] / b[key] for a, b in zip(found[kind], found["float32"], strict=True)]
            figures[f"{kind}_{name}_over_float32"] = statistics.median(ratios)
    for key, value in figures.items():
        print(f"{key}: {value:.3f}")
    print(json.dumps({"benchmark": "four_bit", "figures": figures}))


def prepare(
    source: str, checkpointing: bool, rows: int, length: int, answer: str
) -> Callable[[], None]:
    """Import what is needed, and return loading and one training step."""
    import bitsandbytes  # noqa: F401 - its libraries are no part of what is measured

    from elastune.build_space import lora_space
    from elastune.memory import _resident_mb
    from elastune.models import load_model
    from elastune.supernet import SuperNetwork

    def work() -> None:
        model, _ = load_model(source)
        loaded = _resident_mb("VmRSS")
        net = SuperNetwork(model, lora_space(model, (32, 24, 16)))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        net.train()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)
        started = time.process_time()
        # No logits: training never forms them all, and here they would hide the rest.
        hidden = model.base_model(input_ids=ids, use_cache=False)[0]
        hidden.square().mean().backward()
        taken = {"loaded_mb": loaded, "cpu_s": time.process_time() - started}
        Path(answer).write_text(json.dumps(taken), encoding="utf-8")

    return work


def _pack(model: str, folder: Path) -> None:
    from elastune.models import load_model, save_model

    save_model(*load_model(model, load_in_4bit=True), folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="2 x 128 tokens, once")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.length, args.repeats = 2, 128, 1
    return args


if __name__ == "__main__":
    main()
