"""A LoNAS sub-network of a 7B model beside the dense one: prefill and decoding, in turns.

The sub-network has three quarters of the heads and 56 % of the feed-forward channels in every
block, about 60 % of the blocks' MACs, and is a plain smaller model.

- prefill_speed_up, decode_speed_up: medians of rounds; macs_ratio: dense over cut, of the blocks.
- dense_prefill_ms, cut_prefill_ms, dense_decode_ms, cut_decode_ms.

    python benchmarks/gpu/latency.py [--quick] [--batch 1] [--prompt 1024] [--new 32]
                                     [--device cuda] [--blocks 32] [--width 4096]
"""

from __future__ import annotations

import argparse
from typing import Any

import subject

from elastune.build_structure import structure_space
from elastune.cost import CostModel
from elastune.latency import Conditions, compare_latency
from elastune.subnetwork import extract_model
from elastune.supernet import SuperNetwork


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    subject.add_options(parser)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    args = subject.parsed(parser, "gpu_latency")
    model = subject.llama(args)
    space = structure_space(model, ffn=[1.0, 0.56], heads=[1.0, 0.75], round_to=8)
    net = SuperNetwork(model, space)
    cost = CostModel(net, args.prompt)
    cut = extract_model(net, space.smallest()).model
    repeats = min(args.repeats, 3) if args.quick else args.repeats
    conditions = Conditions(args.batch, args.prompt, args.new, repeats, 2)
    found = compare_latency({"dense": net.unwrap(), "cut": cut}, conditions)
    macs = [cost(config).block_macs for config in (space.largest(), space.smallest())]
    figures: dict[str, Any] = {
        "device": found["cut"].device,
        "macs_ratio": macs[0] / macs[1],
        "prefill_speed_up": found["cut"].prefill_speed_up(found["dense"]),
        "decode_speed_up": found["cut"].decode_speed_up(found["dense"]),
    }
    for name, latency in found.items():
        figures[f"{name}_prefill_ms"] = latency.prefill_ms
        figures[f"{name}_decode_ms"] = latency.decode_ms_per_token
    title = f"{args.blocks} blocks of {args.width}, batch {args.batch}, prompt {args.prompt}"
    subject.report("gpu_latency", title, figures)


if __name__ == "__main__":
    main()
