"""Cuts of heads, feed-forward channels and blocks without any tuning: WikiText-2 perplexity.

Three questions. Which order of channels and heads makes prefixes worth keeping? Which blocks can be
left out? How much better than equal cuts are cuts that a knapsack over single losses chose?
Importance is calibrated and cuts are selected on C4 (different rows); the scores are on WikiText-2
test. Every cut is an activated sub-network: no copy of the model is made.

    python benchmarks/structure_cuts.py [--quick] [--model smollm2-135m] [--losses FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_folder import add_data_option
from rich.console import Console
from rich.table import Table
from torch import Tensor

from elastune.allocate import additive_loss, allocate, single_choice_losses, uniform_config
from elastune.build_structure import structure_space
from elastune.calibration_text import calibration_texts
from elastune.data import calibration_rows
from elastune.importance import UnitScores, structure_scores
from elastune.losses import head_loss
from elastune.models import load_model
from elastune.models.blocks import blocks
from elastune.reorder import reorder_
from elastune.space import SearchSpace, SubnetConfig
from elastune.supernet import SuperNetwork
from elastune.tasks import get_task

ORDERS = ("natural", "magnitude", "wanda", "taylor")
PARTS = (0.9, 0.8, 0.7, 0.6)


class Losses:
    """Mean next-token losses of sub-networks on fixed rows, printed as they come."""

    def __init__(self, rows: Mapping[str, Tensor], console: Console) -> None:
        self.rows = rows
        self.console = console
        self.figures: dict[str, float] = {}
        self.table: list[tuple[str, str, float]] = []

    def score(self, net: SuperNetwork, what: str, kept: str, config: SubnetConfig) -> float:
        """Measure the perplexity of a cut on the test rows and note it."""
        with net.active(config):
            perplexity = math.exp(mean_loss(net.model, self.rows["test"]))
        self.table.append((what, kept, perplexity))
        self.note(f"perplexity {what} {kept}", perplexity)
        print(f"{what}, {kept}: {perplexity:.1f}", flush=True)
        return perplexity

    def note(self, name: str, value: float) -> None:
        """Add to the figures of the last line."""
        self.figures[re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")] = value


@torch.inference_mode()
def mean_loss(model: Any, rows: Tensor) -> float:
    """Return the mean next-token loss of a model with a plain head, in nats."""
    total = 0.0
    for ids in rows.split(2):
        hidden = model.base_model(input_ids=ids, use_cache=False)[0][:, :-1].flatten(0, 1)
        head = model.get_output_embeddings()
        total += float(head_loss(hidden, head.weight, head.bias, ids[:, 1:].flatten()))
    return total / rows[:, 1:].numel()


class SingleCuts:
    """The loss of sub-networks of which one block differs: run from that block on.

    What flows into every block of the whole model is kept; the blocks before the one that differs
    are left out, and what would have come out of them is put in. Half of the work on average.
    """

    def __init__(self, net: SuperNetwork, rows: Tensor) -> None:
        self.net = net
        self.rows = rows
        self.blocks = blocks(net.model)
        self.inputs: list[Tensor] = []
        net.activate(net.space.largest())
        handles = [b.module.register_forward_pre_hook(self._keep) for b in self.blocks]
        self.base_loss = mean_loss(net.model, rows)
        for handle in handles:
            handle.remove()

    def _keep(self, _: Any, args: tuple[Any, ...]) -> None:
        self.inputs.append(args[0])

    def __call__(self, config: SubnetConfig) -> float:
        base = self.net.space.largest()
        changed = [int(name.split(".")[1]) for name in config if config[name] != base[name]]
        if not changed:
            return self.base_loss
        first = changed[0]
        before = {f"layers.{i}.block": 0 for i in range(first)}
        # One entry a batch and block: batch b of block i is number b * blocks + i.
        given = iter(self.inputs[first :: len(self.blocks)])
        handle = self.blocks[first].module.register_forward_pre_hook(
            lambda _, args: (next(given), *args[1:])
        )
        # A block that is itself left out hands on what it is given.
        try:
            with self.net.active(SubnetConfig({**config, **before})):
                return mean_loss(self.net.model, self.rows)
        finally:
            handle.remove()


def main() -> None:
    args = _arguments()
    console = Console()
    model, tokenizer = load_model(args.model)
    n = args.calibration + args.selection
    texts = calibration_texts("c4", args.data)
    c4 = calibration_rows(texts, tokenizer, n_sequences=n, length=args.tokens, seed=0)
    task = get_task("wikitext2", data_dir=args.data, window=args.window)
    text = "".join(piece.completion for piece in task.report_examples())[:400_000]
    ids = torch.tensor(tokenizer(text)["input_ids"][: args.pieces * args.window])
    rows = {
        "calibration": c4[: args.calibration],
        "selection": c4[args.calibration :],
        "test": ids.view(-1, args.window),
    }
    losses = Losses(rows, console)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for order in ORDERS:
        model.load_state_dict(dense)
        scores: UnitScores = {}
        if order != "natural":
            scores = structure_scores(model, rows["calibration"], order)
            reorder_(model, scores)
        net = _net(model, scores if order == "taylor" else {}, args.parts)
        _equal_cuts(net, losses, order, args.parts)
        if order == "taylor":
            _global_threshold(net, losses, scores, args.parts)
        if order == "wanda":
            _selected_cuts(net, losses, args)
        net.unwrap()
    _show(console, losses, args)


def _net(model: Any, scores: UnitScores, parts: Sequence[float]) -> SuperNetwork:
    """Make everything elastic at the widths that are asked for anywhere below."""
    found = blocks(model)
    full, heads = found[0].shape.ffn, found[0].shape.heads
    choices = [*(round(part * full) for part in (*parts, *SELECTION)), *_widths(model, parts), full]
    thresholds = [_kept_above_threshold(scores, part) for part in parts]
    ffn = {
        f"layers.{b.index}.ffn": [*choices, *(kept[f"layers.{b.index}.ffn"] for kept in thresholds)]
        if scores
        else choices
        for b in found
    }
    groups = range(heads, 0, -found[0].heads_per_unit)
    space = structure_space(model, ffn=ffn, heads=list(groups), depth="all", round_to=1)
    return SuperNetwork(model, space)


SELECTION = (0.85, 0.7, 0.5, 0.3)
"""Parts of the channels that the knapsack chooses from."""


def _widths(model: Any, parts: Sequence[float]) -> list[int]:
    """Return the widths at which all blocks have a part of their weights, attention whole."""
    block = blocks(model)[0]
    whole = _weights(model, block.shape)
    channel = _weights(model, block.shape._replace(heads=0, kv_heads=0)) / block.shape.ffn
    return [int(block.shape.ffn - (1 - part) * whole / channel) for part in parts]


def _weights(model: Any, shape: Any) -> int:
    """Return the weights of a block of gated feed-forward and grouped attention."""
    if shape is None:
        return 0
    heads = 2 * blocks(model)[0].head_dim * (shape.heads + shape.kv_heads)
    return int(model.config.hidden_size * (heads + 3 * shape.ffn))


def _kept_above_threshold(scores: UnitScores, part: float) -> dict[str, int]:
    """Return how many channels of each block are among the best of all blocks together."""
    ffn = {name: score for name, score in scores.items() if name.endswith("ffn")}
    if not ffn:
        return {}
    every = torch.cat(list(ffn.values()))
    threshold = every.sort(descending=True).values[round(part * len(every)) - 1]
    return {name: max(int((score >= threshold).sum()), 2) for name, score in ffn.items()}


def _equal_cuts(net: SuperNetwork, losses: Losses, order: str, parts: Sequence[float]) -> None:
    """Score the same width, or number of heads, in every block or in every second one."""
    base = net.space.largest()
    if order == "natural":
        losses.score(net, "dense", "100 %", base)
    full = base["layers.0.ffn"]
    for part in parts:
        widths = {name: round(part * full) for name in base if name.endswith("ffn")}
        kept = f"FFN {part:.0%}"
        losses.score(net, order, kept, SubnetConfig({**base, **widths}))
    if order == "magnitude":
        return
    heads = [name for name in base if name.endswith("heads")]
    choices = next(dim.choices for dim in net.space.dims if dim.kind == "heads")
    for choice in choices[1:]:
        for where, members in (("all", heads), ("every second", heads[1::2])):
            config = SubnetConfig({**base, **dict.fromkeys(members, choice)})
            losses.score(net, order, f"{choice} heads in {where}", config)


def _global_threshold(
    net: SuperNetwork, losses: Losses, scores: UnitScores, parts: Sequence[float]
) -> None:
    for part in parts:
        widths = _kept_above_threshold(scores, part)
        config = SubnetConfig({**net.space.largest(), **widths})
        losses.score(net, "taylor, one threshold", f"FFN {part:.0%}", config)


def _selected_cuts(net: SuperNetwork, losses: Losses, args: argparse.Namespace) -> None:
    """Measure single choices on the selection text; score what they lead to on the test text."""
    full = net.space.largest()
    space = _selection_space(net.space, [round(p * full["layers.0.ffn"]) for p in args.choices])
    objective = SingleCuts(net, losses.rows["selection"])
    base = objective.base_loss
    single = single_choice_losses(objective, space, path=args.losses, progress=_progress)
    del objective  # what flows into every block
    _left_out(net, losses, {n: d[0] for n, d in single.items() if n.endswith("block")}, args)
    ffn_only = {name: of_dim for name, of_dim in single.items() if name.endswith("ffn")}

    def channels(config: SubnetConfig) -> float:
        return float(sum(config[name] for name in ffn_only))

    def weights(config: SubnetConfig) -> float:
        return float(sum(_weights(net.model, shape) for shape in net.shapes(config)))

    for part in args.parts:
        kept = f"FFN {part:.0%}"
        config = allocate(space, ffn_only, channels, part * channels(full))
        _compare(net, losses, space, ffn_only, "knapsack over FFN", kept, config, base)
        kept = f"block weights {part:.0%}"
        budget = part * weights(full)
        equal = uniform_config(net.space, weights, budget, kinds=["ffn"])
        losses.score(net, "equal FFN", kept, equal)
        config = allocate(space, single, weights, budget)
        _compare(net, losses, space, single, "knapsack over all", kept, config, base)


def _progress(done: int, total: int) -> None:
    if done % 10 == 0:
        print(f"{done} of {total} single choices", flush=True)


def _selection_space(space: SearchSpace, widths: Sequence[int]) -> SearchSpace:
    """Return the same dims with fewer widths."""
    data = space.to_dict()
    for dim in data["dims"]:
        if dim["kind"] == "ffn":
            dim["choices"] = [dim["choices"][0], *sorted(widths, reverse=True)]
    return SearchSpace.from_dict(data)


def _compare(
    net: SuperNetwork,
    losses: Losses,
    space: SearchSpace,
    single: Mapping[str, Mapping[int, float]],
    what: str,
    kept: str,
    config: SubnetConfig,
    base_loss: float,
) -> None:
    """Score a selected cut, and print the increase that was predicted and the one that came."""
    predicted = additive_loss(space, single, config)
    with net.active(config):
        together = mean_loss(net.model, losses.rows["selection"]) - base_loss
    losses.score(net, what, kept, config)
    out = [name for name in config if name.endswith("block") and not config[name]]
    losses.note(f"predicted increase {what} {kept}", predicted)
    losses.note(f"increase {what} {kept}", together)
    losses.console.print(
        f"  loss increase on the selection text: predicted {predicted:.3f}, measured "
        f"{together:.3f}; left out: {', '.join(out) or 'no block'}"
    )


def _left_out(
    net: SuperNetwork, losses: Losses, single: Mapping[str, float], args: argparse.Namespace
) -> None:
    """Score sub-networks without some whole blocks."""
    base = net.space.largest()
    names = sorted(single, key=lambda name: single[name])
    in_order = sorted(single, key=lambda name: int(name.split(".")[1]))
    rng = np.random.default_rng(0)
    for count in args.left_out:
        ways = {"least single loss": names[:count], "the last": in_order[-count:]}
        for draw in range(args.draws):
            ways[f"random {draw}"] = [str(name) for name in rng.choice(in_order, count, False)]
        for way, chosen in ways.items():
            config = SubnetConfig({**base, **dict.fromkeys(chosen, 0)})
            losses.score(net, way, f"without {count} blocks", config)


def _show(console: Console, losses: Losses, args: argparse.Namespace) -> None:
    rows = losses.rows
    table = Table(
        title=f"{args.model}, untuned, WikiText-2 test {rows['test'].shape[0]} x "
        f"{rows['test'].shape[1]} tokens; calibration {rows['calibration'].shape[0]}, "
        f"selection {rows['selection'].shape[0]} x {args.tokens} C4 tokens"
    )
    for column in ("order or choice", "kept", "perplexity"):
        table.add_column(column, justify="right" if column == "perplexity" else "left")
    for what, kept, perplexity in sorted(losses.table, key=lambda row: row[1]):
        table.add_row(what, kept, f"{perplexity:,.1f}")
    console.print(table)
    print(json.dumps({"benchmark": "structure_cuts", "figures": losses.figures}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", type=int, default=24, help="rows")
    parser.add_argument("--selection", type=int, default=6, help="rows")
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--pieces", type=int, default=12, help="windows of test text")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument("--losses", type=Path, help="file that keeps the single losses")
    parser.add_argument("--quick", action="store_true", help="less text, fewer cuts")
    args = parser.parse_args()
    args.parts, args.choices, args.left_out, args.draws = PARTS, SELECTION, (3, 6), 2
    if args.quick:
        args.calibration, args.selection, args.pieces, args.window = 4, 1, 1, 128
        args.tokens = 64
        args.parts, args.choices, args.left_out, args.draws = (0.8,), (0.7,), (3,), 1
    return args


if __name__ == "__main__":
    main()
