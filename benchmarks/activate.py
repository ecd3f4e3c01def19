"""How fast a sub-network is switched, and how soon after loading the model training can begin.

- activate_ms: `SuperNetwork.activate` of a random sub-network, median.
- ready_s: from the loaded model to the first draw of the training loop: search space, adapters,
  Trainer, optimiser.

    python benchmarks/activate.py [--quick] [--model smollm2-135m]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import transformers

from elastune.build_space import lora_space
from elastune.config import TrainConfig
from elastune.data import Encoded
from elastune.models import load_model
from elastune.sampling import Draw, RandomSampler
from elastune.supernet import SuperNetwork
from elastune.train import train


class _Ready(Exception):
    """Training asked for its first draw."""


class _StopAtOnce(RandomSampler):
    def draw(self, index: int, progress: float) -> Sequence[Draw]:
        raise _Ready


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--quick", action="store_true", help="50 repeats")
    args = parser.parse_args()
    repeats = 50 if args.quick else args.repeats
    transformers.logging.set_verbosity_error()
    model, tokenizer = load_model(args.model)
    examples = [Encoded(tokenizer("one two three four").input_ids, 1)] * 32

    started = time.perf_counter()
    space = lora_space(model)
    net = SuperNetwork(model, space)
    built = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(net, examples, _StopAtOnce(space, 0), TrainConfig(), folder=Path(folder))
        except _Ready:
            ready = time.perf_counter() - started

    rng = np.random.default_rng(0)
    configs = [space.sample(rng) for _ in range(repeats)]
    times = []
    for config in configs:
        started = time.perf_counter()
        net.activate(config)
        times.append((time.perf_counter() - started) * 1000)
    print(f"{space!r}, {len(net.adapters)} adapters")
    print(f"activate: median {statistics.median(times):.3f} ms, largest {max(times):.3f} ms")
    print(f"super-network built in {built:.2f} s, ready to train in {ready:.2f} s")
    figures = {
        "activate_ms": statistics.median(times),
        "activate_ms_max": max(times),
        "build_s": built,
        "ready_s": ready,
    }
    print(json.dumps({"benchmark": "activate", "figures": figures}))


if __name__ == "__main__":
    main()
