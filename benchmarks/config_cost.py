"""What the cost of one configuration takes, by counting: parameters, non-zeros and MACs.

Spaces over a Llama of 30 blocks: ranks of adapters (90 dims), and ranks with heads, feed-forward
widths and depth (LoNAS, 180 dims). A cost is looked up block by block; a block at sizes that were
never asked for is counted first.

- <space>_us: `CostModel` of configurations it has never met, in microseconds, once every block has
  been met at most of its sizes: the mean over the last half of the configurations, which is what
  a search pays. Goal 100.
- <space>_first_us: the mean over the first 20 configurations of a new `CostModel`.
- <space>_build_s: making the `CostModel`.

    python benchmarks/config_cost.py [--quick] [--blocks 30] [--configs 4000]
"""

from __future__ import annotations

import argparse
import json
import time

import generated
import numpy as np

from elastune.build_space import lora_space
from elastune.build_structure import structure_space
from elastune.cost import CostModel
from elastune.space import SearchSpace
from elastune.supernet import SuperNetwork

FIRST = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--configs", type=int, default=4000)
    parser.add_argument("--quick", action="store_true", help="1,000 configurations")
    args = parser.parse_args()
    n_configs = 1000 if args.quick else args.configs
    figures: dict[str, float] = {}
    for name in ("ranks", "lonas"):
        net = _super_network(name, args.blocks)
        started = time.perf_counter()
        cost = CostModel(net, 256)
        figures[f"{name}_build_s"] = time.perf_counter() - started
        rng = np.random.default_rng(0)
        times_us = []
        for config in [net.space.sample(rng) for _ in range(n_configs)]:
            started = time.perf_counter()
            cost(config)
            times_us.append((time.perf_counter() - started) * 1e6)
        figures[f"{name}_us"] = float(np.mean(times_us[n_configs // 2 :]))
        figures[f"{name}_us_p99"] = float(np.quantile(times_us[n_configs // 2 :], 0.99))
        figures[f"{name}_first_us"] = float(np.mean(times_us[:FIRST]))
        print(
            f"{name}, {len(net.space.dims)} dims: {figures[f'{name}_us']:.0f} us a configuration, "
            f"{figures[f'{name}_first_us']:.0f} at first; "
            f"made in {figures[f'{name}_build_s']:.2f} s"
        )
    print(json.dumps({"benchmark": "config_cost", "figures": figures}))


def _super_network(name: str, n_blocks: int) -> SuperNetwork:
    model = generated.llama(n_blocks)
    dims = list(lora_space(model, (32, 24, 16)).dims)
    if name == "lonas":
        dims += structure_space(
            model, ffn=[1.0, 0.75, 0.5], heads=[1.0, 0.75, 0.5], depth="all", round_to=8
        ).dims
    return SuperNetwork(model, SearchSpace(dims))


if __name__ == "__main__":
    main()
