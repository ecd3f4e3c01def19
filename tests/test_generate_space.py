"""Generated spaces against loops over all scores and formulas of their own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import AUTO, inputs_of, outputs_of, stir, tiny_model, tiny_variant
from torch import Tensor

from elastune.allocate import additive_loss
from elastune.cost import CostModel, model_cost
from elastune.drop_blocks import drop_blocks_
from elastune.errors import BadArtifact, BadData, BadRecipe, ElastuneError, InvalidSpace
from elastune.generate_space import candidate_space, space_from_importance, space_from_losses
from elastune.generated import GeneratedSpace, spaced_targets
from elastune.latency_table import LatencyTable
from elastune.models.blocks import PARTS, Block, BlockShape, blocks
from elastune.models.families import known_model_types
from elastune.reorder import reorder_
from elastune.space import ElasticDim, SearchSpace, SubnetConfig
from elastune.subnetwork import extract_model
from elastune.supernet import SuperNetwork

TOKENS, HIDDEN = 16, 32
FAMILIES = ("bert", "llama", "gpt2", "bloom", "falcon-alibi", "llama-one-kv-head", "gemma2")
MODELS = {
    "bert": {"num_hidden_layers": 4},
    "llama": {"num_hidden_layers": 4},
    "gpt2": {"num_hidden_layers": 3},
    "bloom": {"num_hidden_layers": 3},
}


def random_scores(model: Any, seed: int = 0, spread: float = 1.0) -> dict[str, Tensor]:
    """Scores on both sides of zero, far outside of -1 to 1; every block has a level of its own."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{block.index}.{part}": 5 * torch.randn(block.n_units(part), generator=generator)
        + 3 * spread * torch.randn(1, generator=generator)
        for block in blocks(model)
        for part in PARTS
    }


def naive_macs(found: list[Block], shapes: list[tuple[int, int, int] | None]) -> int:
    """MACs of blocks: projections at every token, and both products of attention."""
    gated = any("gate" in role for role in found[0].record.roles)
    total = 0
    for block, shape in zip(found, shapes, strict=True):
        if shape is not None:
            heads, kv_heads, ffn = shape
            width = heads * block.head_dim
            total += TOKENS * HIDDEN * (2 * width + 2 * kv_heads * block.head_dim)
            total += 2 * TOKENS * TOKENS * width
            total += TOKENS * HIDDEN * ffn * (3 if gated else 2)
    return total


def naive_shapes(
    found: list[Block],
    scores: Mapping[str, list[float]],
    threshold: float,
    round_to: int,
    discard: float,
) -> list[tuple[int, int, int] | None]:
    """Heads, key/value heads and width of every block at one threshold, unit by unit."""
    shapes: list[tuple[int, int, int] | None] = []
    for block in found:
        heads = scores[f"layers.{block.index}.heads"]
        if block.fixed_heads:
            n_heads = block.shape.heads if sum(heads) > threshold else 0
        else:
            alive = len([s for s in heads if s > threshold])
            n_heads = 0 if alive < discard * len(heads) else alive * block.heads_per_unit
        n_kv = 0 if n_heads == 0 else max(1, n_heads // max(1, block.heads_per_unit))
        n_kv = min(n_kv, block.shape.kv_heads)
        channels = scores[f"layers.{block.index}.ffn"]
        alive = len([s for s in channels if s > threshold])
        ffn = alive
        if alive < discard * len(channels):
            ffn = 0
        elif 0 < alive < len(channels):
            lower = alive // round_to * round_to
            ffn = lower + (round_to if 2 * (alive - lower) >= round_to else 0)
            ffn = min(max(ffn, round_to), len(channels))
        shapes.append(None if n_heads == 0 and ffn == 0 else (n_heads, n_kv, ffn))
    return shapes


def naive_points(
    model: Any,
    scores: Mapping[str, Tensor],
    targets: tuple[float, ...],
    round_to: int = 1,
    discard: float = 0.02,
) -> list[list[tuple[int, int, int] | None]]:
    """The shapes nearest to every target, of all thresholds there are."""
    found = blocks(model)
    lists = {name: score.double().tolist() for name, score in scores.items()}
    values = {s for score in lists.values() for s in score} | {sum(s) for s in lists.values()}
    every = {t: naive_shapes(found, lists, t, round_to, discard) for t in (-1e9, *sorted(values))}
    full = naive_macs(found, every[-1e9])
    costs = {t: naive_macs(found, shapes) / full for t, shapes in every.items() if any(shapes)}
    return [every[min(costs, key=lambda t: abs(costs[t] - target))] for target in targets]


def shapes_of(model: Any, space: GeneratedSpace, config: SubnetConfig) -> list[Any]:
    """What a super-network over the generated space makes of a point, removed blocks as None."""
    net = SuperNetwork(drop_blocks_(model, space.removed_blocks), space.space)
    left = iter(net.shapes(config))
    n = len(net.blocks) + len(space.removed_blocks)
    net.unwrap()
    return [None if i in space.removed_blocks else next(left) for i in range(n)]


def build(name: str, **changes: Any) -> Any:
    return tiny_variant(name, "base", **(MODELS.get(name, {}) | changes))


@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_equal_those_of_a_loop_over_all_thresholds(name: str, round_to: int) -> None:
    scores = random_scores(build(name))
    targets = (0.25, 0.5, 0.75, 1.0)
    made = space_from_importance(
        build(name), scores, points=targets, tolerance=0.2, tokens=TOKENS, round_to=round_to
    )
    expected = naive_points(build(name), scores, targets, round_to)
    for point, shapes in zip(made.points, expected, strict=True):
        assert shapes_of(build(name), made, point.config) == shapes


def test_movement_like_scores_may_leave_out_halves_and_blocks() -> None:
    """With blocks at very different levels whole halves and blocks fall below the threshold."""
    for name in ("bert", "llama", "bloom"):
        scores = random_scores(build(name), 3, spread=4.0)
        made = space_from_importance(
            build(name), scores, points=(0.3, 0.6), tolerance=0.3, tokens=TOKENS
        )
        expected = naive_points(build(name), scores, (0.3, 0.6))
        assert [shapes_of(build(name), made, p.config) for p in made.points] == expected
        absent = [s for shapes in expected for s in shapes if s is None or 0 in s]
        assert absent, "the test means to see absent parts"


@pytest.mark.parametrize("cost", ["macs", "params"])
@pytest.mark.parametrize("name", known_model_types())
def test_the_reached_cost_is_what_the_extracted_model_counts(name: str, cost: str) -> None:
    model = tiny_variant(name, "base")
    scores = random_scores(model, 2)
    made = space_from_importance(
        model,
        scores,
        cost=cost,
        points=(0.5,),
        tolerance=0.3,
        tokens=TOKENS,  # type: ignore[arg-type]
    )
    (point,) = made.points
    full = block_cost(model, cost)
    assert made.made_from["full_cost"] == full
    net = SuperNetwork(drop_blocks_(model, made.removed_blocks), made.space)
    small = extract_model(net, point.config).model
    assert block_cost(small, cost) == pytest.approx(point.cost * full, rel=1e-12)
    assert abs(point.cost - 0.5) <= 0.3


def block_cost(model: Any, cost: str) -> int:
    if cost == "macs":
        return model_cost(model, TOKENS).block_macs
    names = tuple(f"{name}." for name in blocks_of(model))
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(names))


def blocks_of(model: Any) -> list[str]:
    from elastune.macs import Work

    return list(Work(model, 1).record.block_names(model))


def test_there_are_as_many_points_as_asked_for_and_both_ends_are_among_them() -> None:
    model = build("llama")
    made = space_from_importance(model, random_scores(model), low=0.2, high=1.0, tolerance=0.1)
    targets = [point.target for point in made.points]
    assert targets == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert made.points[-1].cost == 1
    assert made.points[-1].threshold is None
    assert spaced_targets(0.25, 0.75, 3) == (0.25, 0.5, 0.75)
    assert spaced_targets(0.1, 0.7, 4)[-1] == 0.7
    assert spaced_targets(0.4, 0.4, 1) == (0.4,)
    assert all(abs(point.cost - point.target) <= 0.1 for point in made.points)


def test_the_space_is_the_union_of_its_points() -> None:
    model = build("bert")
    made = space_from_importance(
        model, random_scores(model, 1, spread=0), low=0.3, high=1.0, tolerance=0.1
    )
    for dim in made.space.dims:
        assert set(dim.choices) == {point.config[dim.name] for point in made.points}
    assert all(point.config in made.space for point in made.points)
    assert all(dim.choices[0] == made.made_from["full_sizes"][dim.name] for dim in made.space.dims)
    assert made.points[0].config == made.space.smallest()
    assert made.points[-1].config == made.space.largest()
    modules = dict(model.named_modules())
    assert all(module in modules for dim in made.space.dims for module in dim.modules)


def test_the_smallest_point_is_the_smallest_subnetwork_where_blocks_are_left_out_too() -> None:
    model = build("llama")
    scores = two_levels(model, weak=(1,))
    made = space_from_importance(model, scores, low=0.4, high=1.0, points=4, tolerance=0.15)
    assert "layers.1.block" in {dim.name for dim in made.space.dims}
    net = SuperNetwork(model, made.space)
    smallest = made.points[0].config
    assert smallest["layers.1.block"] == 0
    assert net.shapes(smallest) == net.shapes(made.space.smallest())
    for dim in made.space.dims:  # what is in a block that is left out does not matter
        if dim.name.startswith("layers.1.") and dim.kind != "depth":
            assert smallest[dim.name] == dim.choices[0]


def two_levels(model: Any, weak: tuple[int, ...]) -> dict[str, Tensor]:
    """Scores of 10 to 11, and of 0 to 1 in the weak blocks."""
    scores = random_scores(model, 5)
    return {
        name: torch.linspace(0, 1, len(score)) + (0 if int(name.split(".")[1]) in weak else 10)
        for name, score in scores.items()
    }


def test_sizes_in_a_half_that_some_points_lack_have_the_choice_0() -> None:
    model = build("bert")
    scores = two_levels(model, weak=())
    scores["layers.2.heads"] -= 10
    made = space_from_importance(model, scores, low=0.5, high=1.0, points=3, tolerance=0.1)
    choices = {dim.name: dim.choices for dim in made.space.dims}
    assert choices["layers.2.heads"] == (4, 0)
    only_small = space_from_importance(model, scores, points=(0.5, 0.6), tolerance=0.1)
    choices = {dim.name: dim.choices for dim in only_small.space.dims}
    assert choices["layers.2.heads"] == (0,)


def test_blocks_that_no_point_has_leave_the_model_and_others_take_their_numbers() -> None:
    model = build("llama")
    scores = two_levels(model, weak=(1,))
    made = space_from_importance(model, scores, points=(0.48, 0.75), tolerance=0.05)
    assert made.removed_blocks == (1,)
    assert {dim.name.split(".")[1] for dim in made.space.dims} <= {"0", "1", "2"}
    assert not [dim for dim in made.space.dims if dim.kind == "depth"]
    full = model_cost(model, 128).block_macs
    net = SuperNetwork(drop_blocks_(model, made.removed_blocks), made.space)
    cost = CostModel(net, 128)
    for point in made.points:
        assert cost(point.config).block_macs == pytest.approx(point.cost * full, rel=1e-12)


@pytest.mark.parametrize("name", [*known_model_types(), "falcon-alibi", "opt-norm-after"])
def test_a_shortened_model_computes_what_skipping_the_block_does(name: str, tmp_path: Path) -> None:
    model = stir(tiny_variant(name, "base", **deeper(name)))
    if blocks(model)[1].fixed_depth:
        with pytest.raises(InvalidSpace, match="cannot be left out"):
            drop_blocks_(model, [1])
        return
    dims = [ElasticDim("layers.1.block", "depth", (1, 0), (blocks(model)[1].name,))]
    net = SuperNetwork(model, SearchSpace(dims))
    inputs = inputs_of(model)
    with net.active(SubnetConfig({"layers.1.block": 0})):
        expected = outputs_of(net, inputs)
    full = outputs_of(net, inputs)
    model = drop_blocks_(net.unwrap(), [1])
    assert model.config.num_hidden_layers == len(blocks(model)) == 2
    torch.testing.assert_close(outputs_of(model, inputs), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(full, expected, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = AUTO["base"].from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    torch.testing.assert_close(outputs_of(again, inputs), expected, rtol=0, atol=1e-6)


def deeper(name: str) -> dict[str, Any]:
    field = {"mpt": "n_layers", "distilbert": "n_layers"}.get(name, "num_hidden_layers")
    return {field: 3}


def test_a_shortened_decoder_generates_with_a_cache_as_without() -> None:
    model = drop_blocks_(tiny_model("gemma2", num_hidden_layers=4), [0, 2])
    assert [block.module.self_attn.layer_idx for block in blocks(model)] == [0, 1]
    ids = inputs_of(model)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_what_cannot_be_dropped_is_refused_and_the_model_stays() -> None:
    model = build("bert")
    for numbers, words in (([7], "no block"), ([-1], "no block"), (range(4), "nothing remains")):
        with pytest.raises(InvalidSpace, match=words):
            drop_blocks_(model, list(numbers))
    assert len(blocks(model)) == 4
    assert drop_blocks_(model, []) is model
    assert len(blocks(model)) == 4


def test_blocks_that_cannot_be_left_out_keep_one_unit_each() -> None:
    model = tiny_model("gpt2", num_hidden_layers=3, scale_attn_by_inverse_layer_idx=True)
    scores = two_levels(model, weak=(1,))
    made = space_from_importance(
        model, scores, points=(0.5,), tolerance=0.1, tokens=TOKENS, round_to=4
    )
    assert made.removed_blocks == ()
    assert shapes_of(model, made, made.points[0].config)[1] == BlockShape(1, 1, 4)


def test_keeping_a_head_leaves_no_attention_absent() -> None:
    model = build("llama")
    scores = random_scores(model, 3, spread=4.0)
    options: dict[str, Any] = {"points": (0.4, 0.6, 0.8), "tolerance": 0.3, "tokens": TOKENS}
    for keep_head in (False, True):
        made = space_from_importance(model, scores, keep_head=keep_head, **options)
        shapes = [s for p in made.points for s in shapes_of(build("llama"), made, p.config) if s]
        assert any(shape.heads == 0 for shape in shapes) != keep_head


def test_nothing_of_the_model_changes() -> None:
    model = stir(build("llama"))
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    classes = [type(module) for module in model.modules()]
    config = model.config.to_dict()
    space_from_importance(model, random_scores(model), low=0.3, high=1.0, tolerance=0.1)
    assert [type(module) for module in model.modules()] == classes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_kept_units_are_those_above_the_threshold_once_the_model_is_reordered() -> None:
    model = tiny_model("bert", num_hidden_layers=3)
    scores = random_scores(model, 4)
    made = space_from_importance(model, scores, points=(0.6,), tolerance=0.05, tokens=TOKENS)
    (point,) = made.points
    kept = {
        name: set(score.argsort(descending=True)[: point.config.get(name, len(score))].tolist())
        for name, score in scores.items()
    }
    above = {
        name: {i for i, s in enumerate(score.tolist()) if s > (point.threshold or -math.inf)}
        for name, score in scores.items()
    }
    assert made.removed_blocks == ()
    assert kept == above
    first = {name: scores[name][order] for name, order in reorder_(model, scores).items()}
    for name, sorted_scores in first.items():
        n = point.config.get(name, len(sorted_scores))
        assert set(sorted_scores[:n].tolist()) == {scores[name][i].item() for i in above[name]}


def test_dividing_by_cost_compares_a_head_with_as_many_channels_as_it_costs() -> None:
    model = build("bert")
    found = blocks(model)
    per_head = naive_macs(found, [(1, 1, 0)] + [None] * 3)
    per_channel = naive_macs(found, [(0, 0, 1)] + [None] * 3)
    generator = torch.Generator().manual_seed(0)
    rates = {
        f"layers.{b.index}.{part}": torch.rand(b.n_units(part), generator=generator) + 1
        for b in found
        for part in PARTS
    }
    summed = {
        name: rate * (per_head if name.endswith("heads") else per_channel)
        for name, rate in rates.items()
    }
    options: dict[str, Any] = {"points": (0.5, 0.8), "tolerance": 0.05, "tokens": TOKENS}
    by_rate = space_from_importance(model, rates, **options)
    assert space_from_importance(model, summed, per_cost=True, **options).space == by_rate.space
    assert space_from_importance(model, summed, **options).space != by_rate.space

    def own(config: SubnetConfig) -> float:
        shapes: list[Any] = []
        for i in range(4):
            heads = config[f"layers.{i}.heads"]
            shape = (heads, heads, config[f"layers.{i}.ffn"])
            shapes.append(shape if config[f"layers.{i}.block"] else None)
        return naive_macs(found, shapes)

    made = space_from_importance(model, summed, per_cost=True, cost=own, **options)
    assert made.space == by_rate.space


@pytest.mark.parametrize("seed", range(3))
def test_a_function_of_ones_own_finds_what_counting_finds(seed: int) -> None:
    model = build("llama")
    found = blocks(model)
    scores = random_scores(model, seed, spread=2.0)
    calls = 0

    def own(config: SubnetConfig) -> float:
        nonlocal calls
        calls += 1
        shapes: list[Any] = []
        for i in range(4):
            heads = config[f"layers.{i}.heads"]
            shape = (heads, heads // 2, config[f"layers.{i}.ffn"])
            shapes.append(shape if config[f"layers.{i}.block"] else None)
        return naive_macs(found, shapes)

    options: dict[str, Any] = {"low": 0.3, "high": 0.9, "tolerance": 0.2, "tokens": TOKENS}
    made = space_from_importance(model, scores, cost=own, **options)
    counted = space_from_importance(model, scores, cost="macs", **options)
    assert made.space == counted.space
    assert [p.threshold for p in made.points] == [p.threshold for p in counted.points]
    assert calls < 60


def test_a_latency_table_gives_costs_between_its_sizes() -> None:
    model = build("bert")
    full = 100.0
    dims = {}
    for i in range(4):
        dims[f"layers.{i}.heads"] = {4: (0.0, 0.0), 2: (-4.0, 0.0), 0: (-10.0, 0.0)}
        dims[f"layers.{i}.ffn"] = {48: (0.0, 0.0), 24: (-2.0, 0.0), 0: (-12.0, 0.0)}
    rows = [(None, (f"layers.{i}.heads", f"layers.{i}.ffn")) for i in range(4)]
    table = LatencyTable((full, 0.0), False, dims, rows)

    def own(config: SubnetConfig) -> float:
        total = full
        for i in range(4):
            if not config[f"layers.{i}.block"]:
                total -= 22
                continue
            heads, ffn = config[f"layers.{i}.heads"], config[f"layers.{i}.ffn"]
            total -= {4: 0, 3: 2, 2: 4, 1: 7, 0: 10}[heads]
            total -= (48 - ffn) / 24 * 2 if ffn >= 24 else 2 + (24 - ffn) / 24 * 10
        return total

    scores = random_scores(model, 1)
    options: dict[str, Any] = {"low": 0.4, "high": 0.9, "tolerance": 0.1}
    by_table = space_from_importance(model, scores, cost=table, **options)
    by_own = space_from_importance(model, scores, cost=own, **options)
    assert by_table.space == by_own.space
    assert [p.cost for p in by_table.points] == pytest.approx([p.cost for p in by_own.points])
    assert by_table.made_from["cost"] == "latency"
    lacking = LatencyTable((full, 0.0), False, {**dims, "layers.3.ffn": {48: (0.0, 0.0)}}, rows)
    with pytest.raises(BadRecipe, match=r"layers\.3\.ffn, not from 0 to 48"):
        space_from_importance(model, scores, cost=lacking, **options)


def test_latency_is_measured_and_its_points_are_nested() -> None:
    model = tiny_model("bert", hidden_size=64, intermediate_size=2048)
    made = space_from_importance(
        model, random_scores(model), cost="latency", points=(0.8, 1.0), tolerance=0.3, tokens=32
    )
    small, large = made.points
    assert made.made_from["cost"] == "latency"
    assert made.made_from["full_cost"] > 0
    assert all(small.config[name] <= large.config[name] for name in small.config)


def test_ties_stay_together_and_a_target_between_them_is_an_error() -> None:
    model = build("bert")
    scores = {name: torch.ones_like(score) for name, score in random_scores(model).items()}
    for part in ("heads", "ffn"):
        scores[f"layers.0.{part}"] += 1
    with pytest.raises(InvalidSpace) as caught:
        space_from_importance(model, scores, points=(0.6,), tolerance=0.05)
    message = str(caught.value)
    assert "nearest are 0.25 and 1" in message
    assert "from 0.25 to 1 is possible" in message
    assert f"{3 * (4 + 48)} units there have the same score" in message
    assert "larger tolerance" in message
    made = space_from_importance(model, scores, points=(0.25, 1.0))
    assert [point.cost for point in made.points] == [0.25, 1.0]


def test_halves_without_scores_stay_whole() -> None:
    model = build("llama")
    scores = {n: s for n, s in random_scores(model).items() if n.endswith("ffn")}
    made = space_from_importance(model, scores, points=(0.7, 0.9), tolerance=0.05, tokens=TOKENS)
    assert {dim.kind for dim in made.space.dims} == {"ffn"}
    with pytest.raises(InvalidSpace, match="to 1 is possible"):
        space_from_importance(model, scores, points=(0.1,), tokens=TOKENS)


BAD: list[tuple[dict[str, Any], type[ElastuneError], str]] = [
    ({"low": 0.9, "high": 0.3}, InvalidSpace, "got 0.9, 0.3"),
    ({"low": 0.0}, InvalidSpace, "got 0.0"),
    ({"low": -0.1}, InvalidSpace, "got -0.1"),
    ({"high": 1.2}, InvalidSpace, "got 0.2, 1.2"),
    ({"low": math.nan}, InvalidSpace, "got nan"),
    ({"low": None}, InvalidSpace, "got None"),
    ({"points": 0}, InvalidSpace, "0 points"),
    ({"points": 1}, InvalidSpace, "1 points cannot hold both"),
    ({"points": ()}, InvalidSpace, "got none"),
    ({"points": (0.5, 1.5)}, InvalidSpace, r"got \[1.5\]"),
    ({"points": (1.0,)}, InvalidSpace, "nothing is elastic"),
    ({"tolerance": -1}, InvalidSpace, "tolerance"),
    ({"discard": 1.0}, InvalidSpace, "discard"),
    ({"round_to": 0}, InvalidSpace, "round_to must be at least 1"),
    ({"tokens": 0}, InvalidSpace, "tokens must be at least 1"),
    ({"cost": "mac"}, BadRecipe, "did you mean 'macs'"),
    ({"cost": lambda config: 0.0}, InvalidSpace, "must be above 0"),
    ({"cost": lambda config: 1.0, "per_cost": True}, InvalidSpace, "saves nothing"),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD)
def test_what_cannot_be_is_refused(
    changes: dict[str, Any], error: type[ElastuneError], words: str
) -> None:
    model = build("bert")
    options = {"low": 0.2, "high": 1.0, "tolerance": 0.2} | changes
    with pytest.raises(error, match=words):
        space_from_importance(model, random_scores(model), **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers.0.ffn": torch.full((48,), math.nan)}, "48 of 48 scores are not a finite number"),
        ({"layers.0.ffn": torch.full((48,), math.inf)}, "not a finite number"),
        ({"layers.0.ffn": torch.zeros(47)}, r"\(47,\) for 48 units"),
        ({"layers.9.ffn": torch.zeros(48)}, "did you mean"),
        ({"ffn": torch.zeros(48)}, "does not have"),
    ],
)
def test_scores_that_do_not_fit_are_refused(change: dict[str, Tensor], words: str) -> None:
    model = build("bert")
    with pytest.raises(BadData, match=words):
        space_from_importance(model, random_scores(model) | change, low=0.2, high=1.0)
    with pytest.raises(BadData, match="no scores"):
        space_from_importance(model, {}, low=0.2, high=1.0)


def test_a_generated_space_survives_its_file_without_torch(tmp_path: Path) -> None:
    model = build("llama")
    made = space_from_importance(
        model, random_scores(model, 3, spread=4.0), low=0.3, high=0.9, tolerance=0.3
    )
    data = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert GeneratedSpace.from_dict(data) == made
    (tmp_path / "generated.json").write_text(json.dumps(data))
    code = (
        "import json, sys\n"
        "from elastune.generated import GeneratedSpace\n"
        "made = GeneratedSpace.from_dict(json.load(open(sys.argv[1])))\n"
        "print(len(made.points), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "generated.json")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["5", "False"]
    for change in ({"schema": 2}, {"points": [{}]}, {"space": {}}, {"removed_blocks": None}):
        with pytest.raises(BadArtifact, match="not a generated space"):
            GeneratedSpace.from_dict(data | change)
    data["points"][0]["config"] = {}
    with pytest.raises(BadArtifact, match="missing dim"):
        GeneratedSpace.from_dict(data)


# --- the second generator: a knapsack over single-choice losses


def random_losses(space: SearchSpace, seed: int) -> dict[str, dict[int, float]]:
    rng = np.random.default_rng(seed)
    found = {}
    for dim in space.dims:
        steps = np.concatenate([[0], rng.uniform(0.1, 1.0, len(dim.choices) - 1).cumsum()])
        found[dim.name] = {c: float(s) for c, s in zip(dim.choices, steps, strict=True)}
    return found


def test_candidates_reach_from_all_to_nothing_where_the_family_can() -> None:
    for name, heads in (("llama", (4, 2, 0)), ("bert", (4, 3, 2, 1, 0)), ("bloom", (4, 0))):
        model = build(name)
        space = candidate_space(model, steps=4, round_to=4)
        choices = {dim.name: dim.choices for dim in space.dims}
        assert choices["layers.1.heads"] == heads
        n = model.config.intermediate_size if name != "bloom" else 4 * model.config.hidden_size
        assert choices["layers.1.ffn"] == tuple(n * k // 4 for k in (4, 3, 2, 1, 0))
        assert {dim.kind for dim in space.dims} == {"heads", "ffn"}
        SuperNetwork(model, space).unwrap()
    with pytest.raises(InvalidSpace, match="at least one step"):
        candidate_space(model, steps=0)


@pytest.mark.parametrize("seed", range(3))
def test_points_of_the_knapsack_lose_no_more_than_any_other_candidate(seed: int) -> None:
    model = tiny_model("bert")
    space = candidate_space(model, steps=3, round_to=16)
    cost = CostModel(SuperNetwork(model, space), TOKENS)
    losses = random_losses(space, seed)
    made = space_from_losses(
        space, losses, lambda c: cost(c).block_macs, low=0.4, high=1.0, points=3, tolerance=0.2
    )
    full = cost(space.largest()).block_macs
    grid = np.indices([len(dim.choices) for dim in space.dims]).reshape(len(space), -1).T
    every = [space.decode([int(i) for i in row]) for row in grid]
    for point in made.points:
        assert point.cost <= point.target
        assert point.threshold is None
        assert cost(point.config).block_macs == pytest.approx(point.cost * full)
        fits = [c for c in every if cost(c).block_macs <= point.target * full * (1 + 1e-12)]
        least = min(additive_loss(space, losses, c) for c in fits)
        assert additive_loss(space, losses, point.config) == pytest.approx(least)
    for dim in made.space.dims:
        assert set(dim.choices) == {point.config[dim.name] for point in made.points}
    assert GeneratedSpace.from_dict(made.to_dict()) == made


def test_a_knapsack_that_cannot_meet_a_target_says_what_it_can() -> None:
    space = SearchSpace([ElasticDim("layers.0.ffn", "ffn", (10, 5), ("model.layers.0.down",))])
    losses = {"layers.0.ffn": {10: 0.0, 5: 1.0}}

    def cost(config: SubnetConfig) -> float:
        return float(config["layers.0.ffn"])

    with pytest.raises(InvalidSpace, match=r"for 0.8 of the largest cost has 0.5, .* 0.02 below"):
        space_from_losses(space, losses, cost, points=(0.8,))
    with pytest.raises(InvalidSpace, match=r"target 0.3 of the largest cost: .* cheapest costs 5"):
        space_from_losses(space, losses, cost, points=(0.3,))
    made = space_from_losses(space, losses, cost, points=(0.5,))
    assert made.space.dims[0].choices == (5,)


def test_a_knapsack_with_depth_takes_blocks_that_nobody_keeps_out_of_the_model() -> None:
    dims = []
    for i in range(3):
        dims.append(ElasticDim(f"layers.{i}.ffn", "ffn", (10, 5), (f"m.layers.{i}.down",)))
        dims.append(ElasticDim(f"layers.{i}.block", "depth", (1, 0), (f"m.layers.{i}",)))
    space = SearchSpace(dims)
    losses = {dim.name: {c: float(rank) for rank, c in enumerate(dim.choices)} for dim in dims}
    losses["layers.1.block"][0] = 0.0

    def cost(config: SubnetConfig) -> float:
        return float(sum(config[f"layers.{i}.ffn"] * config[f"layers.{i}.block"] for i in range(3)))

    made = space_from_losses(space, losses, cost, points=(1 / 3, 2 / 3), tolerance=0.01)
    assert made.removed_blocks == (1,)
    assert all(m.split(".")[2] in "01" for dim in made.space.dims for m in dim.modules)
    assert {dim.name for dim in made.space.dims} >= {"layers.0.ffn", "layers.1.ffn"}


@pytest.mark.e2e
def test_the_built_in_encoder_has_points_of_all_budgets_in_seconds() -> None:
    from elastune.importance.structure import structure_scores
    from elastune.models import load_model

    model, _ = load_model("minilm-l6", head="sequence-classification", num_labels=2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (4, 64), generator=generator)
    made = space_from_importance(model, structure_scores(model, ids), low=0.2, high=1.0)
    assert len(made.points) == 5
    assert all(abs(point.cost - point.target) <= 0.02 for point in made.points)
    assert made.made_from["seconds"] < 20


@pytest.mark.e2e
def test_the_built_in_decoder_has_points_and_runs_as_the_smallest() -> None:
    from elastune.importance.structure import structure_scores
    from elastune.models import load_model

    model, _ = load_model("smollm2-135m")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (2, 64), generator=generator)
    scores = structure_scores(model, ids)
    made = space_from_importance(model, scores, low=0.5, high=1.0, points=3)
    reorder_(model, scores)
    net = SuperNetwork(drop_blocks_(model, made.removed_blocks), made.space)
    with net.active(made.points[0].config):
        assert bool(outputs_of(net, {"input_ids": ids}).isfinite().all())
