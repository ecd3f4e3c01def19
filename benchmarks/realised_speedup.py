"""Realised speed-up: measured speed-up over MACs ratio of extracted sub-networks.

The dense model and its sub-networks of about 85, 75 and 60 % of the blocks' MACs take turns, so
that ratios hold when the machine's speed drifts:

- uniform: fewer heads and a narrower feed-forward in all blocks; ffn: the feed-forward alone;
- mixed: heads and widths of each block at random; depth: every so-manieth block left out.

Prefill is 256 tokens with the logits of the last one; decoding one token at a time after 64. Then
training steps of LoNAS (frozen base, low-rank adapters): random sub-networks beside the full size,
and the peak memory of a step beside that of training the base's own weights.

Figures are of wall time, and again, as *_cpu, of processor time: on a machine that other programs
use, with one thread, only these hold.

    python benchmarks/realised_speedup.py [--quick] [--repeats 9]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from elastune.build_space import lora_space
from elastune.build_structure import structure_space
from elastune.cost import CostModel
from elastune.data import Encoded, pack
from elastune.latency import Conditions, Latency, compare_latency
from elastune.losses import completion_loss
from elastune.memory import peak_memory
from elastune.models import load_model
from elastune.packing import packed_attention
from elastune.sampling import RandomSampler
from elastune.space import SearchSpace, SubnetConfig
from elastune.subnetwork import extract_model
from elastune.supernet import SuperNetwork

PROMPT, CACHED = 256, 64
SHARES = (0.85, 0.75, 0.6)
TRAINED_WIDTHS = (1.0, 0.875, 0.75, 0.625, 0.5)


def main() -> None:
    args = _arguments()
    console = Console(width=120)
    model, _ = load_model(args.model)
    configs, costs = _subnetworks(model, args.quick)
    figures: dict[str, float] = {}
    rows = _measure(configs, args)
    _print_speed(console, rows, costs, args, figures)
    _training(console, args, figures)
    if not args.quick:
        _memory(console, args, figures)
    print(json.dumps({"benchmark": "realised_speedup", "figures": figures}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=12, help="of training")
    parser.add_argument(
        "--quick", action="store_true", help="equal blocks of 60 %%, 3 rounds, 2 steps"
    )
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.steps = 3, 2
    return args


Costs = Mapping[str, tuple[int, int, float]]
"""Name -> MACs of prefill, of a decoded token, and the share of the blocks' MACs."""


def _subnetworks(
    model: PreTrainedModel, quick: bool
) -> tuple[dict[str, PreTrainedModel], dict[str, tuple[int, int, float]]]:
    """Return the dense model and sub-networks, extracted, and what they cost."""
    width = int(model.config.intermediate_size)
    heads = int(model.config.num_attention_heads)
    space = structure_space(
        model,
        ffn=list(range(width, width // 8, -64)),
        heads=[1.0, 2 / 3, 1 / 3] if heads % 3 == 0 else [1.0, 0.75, 0.5],
        depth="all",
    )
    net = SuperNetwork(model, space)
    prefill, decode = CostModel(net, PROMPT), CostModel(net, CACHED)
    full = prefill(space.largest())
    chosen = {"dense": space.largest()}

    def share(config: SubnetConfig) -> float:
        return prefill(config).block_macs / full.block_macs

    for wanted in SHARES[-1:] if quick else SHARES:
        name = f"{wanted:.0%}"
        fewer = sorted({dim.choices[1] for dim in space.dims if dim.kind == "heads"})[0]
        chosen[f"uniform {name}"] = _uniform(space, fewer, wanted, share)
        if not quick:
            chosen[f"ffn {name}"] = _uniform(space, None, wanted, share)
    if not quick:
        chosen[f"mixed {SHARES[-1]:.0%}"] = _mixed(space, SHARES[-1], share)
        chosen[f"depth {SHARES[-1]:.0%}"] = _shallow(space, SHARES[-1])
    costs = {}
    for name, config in chosen.items():
        cost = prefill(config)
        head = (cost.macs - cost.block_macs) // PROMPT
        costs[name] = (cost.block_macs + head, decode(config).decode_macs, share(config))
    extracted = {name: extract_model(net, config).model for name, config in chosen.items()}
    return extracted, costs


def _uniform(
    space: SearchSpace,
    heads: int | None,
    wanted: float,
    share: Callable[[SubnetConfig], float],
) -> SubnetConfig:
    """Return the configuration of equal blocks that is nearest to a share of the MACs."""
    largest = dict(space.largest())
    if heads is not None:
        largest |= {dim.name: heads for dim in space.dims if dim.kind == "heads"}
    widths = [dim for dim in space.dims if dim.kind == "ffn"]
    found = [
        SubnetConfig(largest | {dim.name: choice for dim in widths}) for choice in widths[0].choices
    ]
    return min(found, key=lambda config: abs(share(config) - wanted))


def _mixed(
    space: SearchSpace, wanted: float, share: Callable[[SubnetConfig], float]
) -> SubnetConfig:
    """Return random heads and widths, moved step by step to a share of the MACs."""
    rng = np.random.default_rng(0)
    whole = {dim.name: 1 for dim in space.dims if dim.kind == "depth"}
    config = SubnetConfig({**space.sample(rng), **whole})
    widths = [dim for dim in space.dims if dim.kind == "ffn"]
    while abs(share(config) - wanted) > 0.002:
        dim = widths[int(rng.integers(len(widths)))]
        step = 1 if share(config) > wanted else -1
        place = dim.choices.index(config[dim.name]) + step
        if 0 <= place < len(dim.choices):
            config = SubnetConfig({**config, dim.name: dim.choices[place]})
    return config


def _shallow(space: SearchSpace, wanted: float) -> SubnetConfig:
    """Return full blocks of which some, evenly spread, are left out."""
    depth = [dim.name for dim in space.dims if dim.kind == "depth"]
    dropped = round(len(depth) * (1 - wanted))
    places = np.linspace(1, len(depth) - 2, dropped).round().astype(int)
    return SubnetConfig({**space.largest(), **{depth[place]: 0 for place in places}})


Rows = dict[str, dict[str, Latency]]


def _measure(models: Mapping[str, PreTrainedModel], args: argparse.Namespace) -> Rows:
    """Measure all workloads."""
    workloads = {
        "prefill": Conditions(1, PROMPT, 0, args.repeats, 1),
        "prefill, batch 4": Conditions(4, PROMPT, 0, args.repeats, 1),
        "decode": Conditions(1, CACHED, 16, args.repeats, 1),
    }
    if args.quick:
        del workloads["prefill, batch 4"]
    return {name: compare_latency(models, conditions) for name, conditions in workloads.items()}


def _print_speed(
    console: Console, rows: Rows, costs: Costs, args: argparse.Namespace, figures: dict[str, float]
) -> None:
    """Print speed-up over MACs ratio, and keep the figures."""
    for workload, found in rows.items():
        table = Table(title=f"{args.model}, {workload}, {torch.get_num_threads()} threads")
        headers = ("model", "block MACs", "ms (IQR)", "CPU ms (IQR)", "MACs ratio", "speed-up")
        for column in (*headers, "realised", "by CPU"):
            table.add_column(column, justify="right")
        is_decode = workload == "decode"
        for name, latency in found.items():
            macs = costs["dense"][is_decode] / costs[name][is_decode]
            row = [name, f"{costs[name][2]:.1%}"]
            realised, faster = [], []
            for ours, dense in zip(_clocks(latency), _clocks(found["dense"]), strict=True):
                speed_up = ours.decode_speed_up if is_decode else ours.prefill_speed_up
                ms = ours.decode_ms_per_token if is_decode else ours.prefill_ms
                spread = ours.decode_iqr_ms if is_decode else ours.prefill_iqr_ms
                row.append(f"{ms:.1f} ({spread:.1f})")
                faster.append(speed_up(dense))
                realised.append(faster[-1] / macs)
            row += [f"{macs:.3f}", f"{faster[0]:.3f}", *(f"{value:.3f}" for value in realised)]
            table.add_row(*row)
            key = f"torch_{workload}_{name}".replace(", ", "_").replace(" ", "_").replace("%", "")
            if name != "dense":
                figures |= dict(zip((key, f"{key}_cpu"), realised, strict=False))
        console.print(table)
    for workload in ("torch_prefill", "torch_decode"):
        for clock in ("", "_cpu"):
            figures[f"{workload}{clock}"] = figures[f"{workload}_uniform_60{clock}"]


def _clocks(latency: Latency) -> list[Latency]:
    """Return a latency in wall time and in processor time."""
    return [latency, latency.processor or latency]


def _training_net(name: str, train_base: bool = False) -> SuperNetwork:
    model, _ = load_model(name)
    widths = structure_space(model, ffn=TRAINED_WIDTHS, heads=[1.0, 2 / 3])
    space = widths if train_base else lora_space(model, [32, 24, 16]) + widths
    return SuperNetwork(model, space, train_base=train_base).train()


def _step(net: SuperNetwork, seed: int) -> Callable[[SubnetConfig], None]:
    """Return a function that trains one sub-network for one step of 4 x 192 random tokens."""
    rng = np.random.default_rng(seed)
    vocabulary = int(net.model.config.vocab_size)
    batch = pack([Encoded(rng.integers(0, vocabulary, 192).tolist(), 64) for _ in range(4)])
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)

    def step(config: SubnetConfig) -> None:
        net.activate(config)
        with packed_attention(net.model):
            summed, count = completion_loss(net.model, batch)
            (summed / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def prepare_training(model: str, train_base: bool) -> Callable[[], None]:
    """Return two steps of the full size as work for `elastune.memory.peak_memory`."""
    net = _training_net(model, train_base)
    step = _step(net, 0)

    def work() -> None:
        for _ in range(2):
            step(net.space.largest())

    return work


def _training(console: Console, args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Time random sub-networks beside the full size."""
    net = _training_net(args.model)
    step = _step(net, 0)
    largest = net.space.largest()
    sampler = RandomSampler(net.space, seed=0)
    cost = CostModel(net, 192)
    pairs, shares = [], []
    for number in range(args.steps + 1):
        config = sampler.draw(number, 0.0)[0].config
        order = [("full", largest), ("random", config)]
        seconds = {}
        for label, wanted in order if number % 2 else reversed(order):
            started = time.perf_counter(), time.process_time()
            step(wanted)
            seconds[label] = time.perf_counter() - started[0], time.process_time() - started[1]
        if number:  # the first is a warm-up
            pairs.append((*seconds["full"], *seconds["random"]))
            shares.append(cost(config).block_macs / cost(largest).block_macs)
    ratios = [random / full for full, _, random, _ in pairs]
    cpu_ratios = [random / full for _, full, _, random in pairs]
    figures["train_step_random_over_full"] = statistics.mean(ratios)
    figures["train_step_random_over_full_min"] = min(ratios)
    figures["train_step_random_over_full_max"] = max(ratios)
    figures["train_step_random_over_full_cpu"] = statistics.mean(cpu_ratios)
    figures["train_step_block_macs_share"] = statistics.mean(shares)
    full_s, _, random_s, _ = (statistics.mean(column) for column in zip(*pairs, strict=True))
    console.print(
        f"training step, {args.steps} of each: full size {full_s:.2f} s, random sub-networks "
        f"{random_s:.2f} s ({statistics.mean(shares):.0%} of the blocks' MACs), "
        f"ratio {statistics.mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), of CPU "
        f"time {statistics.mean(cpu_ratios):.3f}"
    )


def _memory(console: Console, args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Compare the peak memory of a step with that of training all weights."""
    peaks = {
        label: peak_memory(
            "realised_speedup:prepare_training", {"model": args.model, "train_base": train_base}
        ).peak_mb
        for label, train_base in (("lonas", False), ("full_weights", True))
    }
    figures |= {f"train_peak_{label}_mb": peak for label, peak in peaks.items()}
    figures["train_peak_lonas_over_full_weights"] = peaks["lonas"] / peaks["full_weights"]
    console.print(
        f"peak memory of a step {peaks['lonas']:.0f} MB, of training all weights "
        f"{peaks['full_weights']:.0f} MB"
    )


if __name__ == "__main__":
    main()
