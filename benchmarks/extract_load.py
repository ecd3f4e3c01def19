"""Cutting a sub-network out, saving it and loading it, against loading the dense model.

A LoNAS sub-network of SmolLM2-135M: heads at 0.67 or 1 and channels at 0.5 to 1 in every block,
with adapters of random ranks merged into the weights. Loading is from a folder, files already
read once, in turns with the dense model's.

- extract_s: `extract_model`, median.
- save_s: `save_subnetwork`, which loads what it wrote and compares logits; once.
- load_s, load_dense_s: transformers' `from_pretrained`, medians.
- load_over_dense: the ratio; median of the turns' ratios. Goal 1.1: smaller, but a class whose
  layers have sizes of their own.

    python benchmarks/extract_load.py [--quick] [--repeats 9]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

import elastune as et
from elastune.space import SearchSpace
from elastune.supernet import SuperNetwork


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="3 repeats")
    args = parser.parse_args()
    repeats = 3 if args.quick else args.repeats
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    net, tokenizer = _super_network(args.model)
    config = net.space.sample(np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as name:
        dense, cut = Path(name) / "dense", Path(name) / "cut"
        et.save_model(et.load_model(args.model)[0], tokenizer, dense)
        extract_s = [_seconds(lambda: et.extract_model(net, config)) for _ in range(repeats)]
        sub = et.extract_model(net, config)
        save_s = _seconds(lambda: et.save_subnetwork(sub, tokenizer, cut))
        pairs = [(_load_s(cut), _load_s(dense)) for _ in range(repeats + 1)][1:]
    figures = {
        "extract_s": statistics.median(extract_s),
        "save_s": save_s,
        "load_s": statistics.median(own for own, _ in pairs),
        "load_dense_s": statistics.median(whole for _, whole in pairs),
        "load_over_dense": statistics.median(own / whole for own, whole in pairs),
        "params_over_dense": sub.model.num_parameters() / net.unwrap().num_parameters(),
    }
    for figure, value in figures.items():
        print(f"{figure}: {value:.3f}")
    print(json.dumps({"benchmark": "extract_load", "figures": figures}))


def _super_network(name: str) -> tuple[SuperNetwork, Any]:
    model, tokenizer = et.load_model(name)
    dims = list(et.lora_space(model, (32, 24, 16)).dims)
    dims += et.structure_space(model, ffn=[1.0, 0.75, 0.5], heads=[1.0, 0.67]).dims
    net = SuperNetwork(model, SearchSpace(dims))
    generator = torch.Generator().manual_seed(0)
    for adapter in net.adapters.values():  # as if trained: B is zero otherwise
        torch.nn.init.normal_(adapter.lora_B, std=0.005, generator=generator)
    return net, tokenizer


def _load_s(folder: Path) -> float:
    return _seconds(lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
