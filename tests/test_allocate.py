"""The knapsack against trying everything, equal cuts, and single losses that survive a kill."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from elastune.allocate import additive_loss, allocate, single_choice_losses, uniform_config
from elastune.errors import BadArtifact, BadData, InvalidSpace, InvalidSubnet
from elastune.space import ElasticDim, SearchSpace, SubnetConfig

HEADS, FFN, RANKS = (4, 2, 0), (60, 40, 30, 10), (8, 4)


def structure(n_blocks: int, *, depth: bool = True, ranks: bool = False) -> SearchSpace:
    dims = []
    for i in range(n_blocks):
        block = f"model.layers.{i}"
        dims.append(ElasticDim(f"layers.{i}.heads", "heads", HEADS, (f"{block}.attn.o",)))
        dims.append(ElasticDim(f"layers.{i}.ffn", "ffn", FFN, (f"{block}.mlp.down",)))
        if ranks:
            dims.append(ElasticDim(f"layers.{i}.down", "rank", RANKS, (f"{block}.mlp.down",)))
        if depth:
            dims.append(ElasticDim(f"layers.{i}.block", "depth", (1, 0), (block,)))
    return SearchSpace(dims)


def cost_of(config: SubnetConfig) -> float:
    """100 outside the blocks; a block costs 7, 10 a head and 1 a channel, nothing when left out."""
    total = 100.0
    for i in range(sum(name.endswith("ffn") for name in config)):
        if config.get(f"layers.{i}.block", 1):
            total += 7 + 10 * config[f"layers.{i}.heads"] + config[f"layers.{i}.ffn"]
    return total


def random_losses(space: SearchSpace, seed: int) -> dict[str, dict[int, float]]:
    rng = np.random.default_rng(seed)
    losses = {}
    for dim in space.dims:
        steps = np.concatenate([[0], rng.normal(0.5, 1.0, len(dim.choices) - 1).cumsum()])
        scale = 3.0 if dim.kind == "depth" else 1.0
        losses[dim.name] = {c: float(scale * s) for c, s in zip(dim.choices, steps, strict=True)}
    return losses


def every_config(space: SearchSpace) -> list[SubnetConfig]:
    grid = np.indices([len(dim.choices) for dim in space.dims]).reshape(len(space), -1).T
    return [space.decode([int(i) for i in row]) for row in grid]


def naive_loss(losses: dict[str, dict[int, float]], config: SubnetConfig) -> float:
    """A block that is left out loses what its own dim says, whatever its widths are."""
    total = 0.0
    for name, choice in config.items():
        block = name.rpartition(".")[0] + ".block"
        if name == block or config.get(block, 1):
            total += losses[name][choice]
    return total


def best_by_trying(
    space: SearchSpace, losses: dict[str, dict[int, float]], budget: float
) -> float | None:
    found = [
        naive_loss(losses, config)
        for config in every_config(space)
        if cost_of(config) <= budget
        and any(config.get(f"layers.{i}.block", 1) for i in range(len(space)) if i < 2)
    ]
    return min(found, default=None)


@pytest.mark.parametrize("depth", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_no_configuration_within_the_budget_loses_less(seed: int, depth: bool) -> None:
    space = structure(2, depth=depth)
    losses = random_losses(space, seed)
    largest = cost_of(space.largest())
    n_found = 0
    for budget in (largest, 0.9 * largest, 0.75 * largest, 0.6 * largest, 0.45 * largest, 117):
        expected = best_by_trying(space, losses, budget)
        if expected is None:
            with pytest.raises(InvalidSpace, match="no sub-network costs"):
                allocate(space, losses, cost_of, budget)
            continue
        n_found += 1
        config = allocate(space, losses, cost_of, budget)
        assert config in space
        assert cost_of(config) <= budget
        assert naive_loss(losses, config) == pytest.approx(expected, abs=1e-9)
        assert additive_loss(space, losses, config) == pytest.approx(expected, abs=1e-9)
    assert n_found >= 5


def test_the_solver_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    space = structure(2, depth=False, ranks=True)
    losses = {
        name: {choice: abs(loss) for choice, loss in of_dim.items()}
        for name, of_dim in random_losses(space, 5).items()
    }

    def cost(config: SubnetConfig) -> float:
        return cost_of(config) + sum(
            config[f"layers.{i}.down"] * config[f"layers.{i}.ffn"] for i in (0, 1)
        )

    # On this one its presolve does, where it is on.
    allocate(space, losses, cost, 0.7 * cost(space.largest()))
    assert capfd.readouterr() == ("", "")


def test_a_budget_that_a_configuration_meets_exactly_is_met() -> None:
    space = structure(3, depth=False)
    losses = {d.name: {c: float(i) for i, c in enumerate(d.choices)} for d in space.dims}

    def flops(config: SubnetConfig) -> float:
        return cost_of(config) * 1.234567e12

    wanted = SubnetConfig({**space.largest(), "layers.1.ffn": 40})
    config = allocate(space, losses, flops, flops(wanted))
    assert flops(config) <= flops(wanted)
    assert additive_loss(space, losses, config) == 1.0


def test_widths_of_a_block_that_is_left_out_do_not_count() -> None:
    space = structure(2)
    losses = {dim.name: dict.fromkeys(dim.choices, 0.0) for dim in space.dims}
    # Every cut inside block 0 gains a lot, and leaving it out costs little: only one can be had.
    losses["layers.0.ffn"] = {60: 0.0, 40: -5.0, 30: -5.0, 10: -5.0}
    losses["layers.0.block"] = {1: 0.0, 0: -4.0}
    losses["layers.1.block"] = {1: 0.0, 0: 9.0}
    config = allocate(space, losses, cost_of, cost_of(space.largest()))
    assert config["layers.0.block"] == 1
    assert config["layers.0.ffn"] != 60
    losses["layers.0.block"] = {1: 0.0, 0: -6.0}
    config = allocate(space, losses, cost_of, cost_of(space.largest()))
    assert (config["layers.0.block"], config["layers.0.ffn"]) == (0, 60)


def test_one_block_always_stays() -> None:
    space = structure(2)
    losses = {dim.name: dict.fromkeys(dim.choices, 1.0) for dim in space.dims}
    for i in (0, 1):
        losses[f"layers.{i}.block"] = {1: 0.0, 0: -float(i + 1)}
    config = allocate(space, losses, cost_of, 1000)
    assert (config["layers.0.block"], config["layers.1.block"]) == (1, 0)


@pytest.mark.parametrize("seed", range(3))
def test_costs_that_do_not_add_up_still_stay_within_the_budget(seed: int) -> None:
    space = structure(4, depth=False, ranks=True)
    losses = {
        name: {choice: abs(loss) for choice, loss in of_dim.items()}
        for name, of_dim in random_losses(space, seed).items()
    }

    def cost(config: SubnetConfig) -> float:
        ranks = [config[f"layers.{i}.down"] for i in range(4)]
        adapters = sum(rank * config[f"layers.{i}.ffn"] for i, rank in enumerate(ranks))
        return cost_of(config) + adapters

    full = cost(space.largest())
    seen: list[float] = []

    def noted(config: SubnetConfig) -> float:
        seen.append(cost(config))
        return seen[-1]

    n_over = 0
    for part in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
        seen.clear()
        assert cost(allocate(space, losses, noted, part * full)) <= part * full
        n_over += max(seen[-2:]) > part * full  # the answer before the last one
    assert n_over >= 2  # else the case would not be one


def test_choices_of_infinite_loss_are_never_taken() -> None:
    space = structure(2, depth=False)
    losses = {d.name: {c: float(i) for i, c in enumerate(d.choices)} for d in space.dims}
    losses["layers.0.ffn"][10] = float("inf")
    losses["layers.1.ffn"][10] = float("nan")
    config = allocate(space, losses, cost_of, 100 + 2 * 7 + 30 + 30)
    assert [config[f"layers.{i}.ffn"] for i in (0, 1)] == [30, 30]
    with pytest.raises(InvalidSpace, match="costs 173 or less: the cheapest costs 174, the la"):
        allocate(space, losses, cost_of, 173)


def test_missing_losses_are_named() -> None:
    space = structure(1)
    losses = random_losses(space, 0)
    del losses["layers.0.ffn"][30]
    with pytest.raises(BadData, match=r"layers\.0\.ffn: no loss of \[30\]"):
        allocate(space, losses, cost_of, 1000)
    losses["layers.0.fn"] = losses.pop("layers.0.ffn")
    with pytest.raises(BadData, match=r"did you mean 'layers\.0\.ffn'"):
        allocate(space, losses, cost_of, 1000)
    with pytest.raises(BadData, match="there are no losses"):
        allocate(space, {}, cost_of, 1000)


def test_dims_without_losses_stay_at_their_largest() -> None:
    space = structure(3, ranks=True)
    losses = single_choice_losses(Counted(), space, kinds=("heads", "ffn"))
    assert {name.rpartition(".")[2] for name in losses} == {"heads", "ffn"}
    config = allocate(space, losses, cost_of, 0.6 * cost_of(space.largest()))
    kept = [config[f"layers.{i}.{what}"] for i in range(3) for what in ("down", "block")]
    assert kept == [8, 1] * 3
    assert cost_of(config) <= 0.6 * cost_of(space.largest())


def test_thirty_blocks_are_allocated_within_seconds() -> None:
    space = structure(30)
    losses = random_losses(space, 0)
    budget = 0.6 * cost_of(space.largest())
    config = allocate(space, losses, cost_of, budget)
    assert cost_of(config) <= budget
    equal = uniform_config(space, cost_of, budget)
    assert additive_loss(space, losses, config) < additive_loss(space, losses, equal)


def test_equal_cuts_take_the_largest_part_that_fits() -> None:
    space = structure(3)
    # The parts are 1, 2/3, 1/2, 1/6, 0; at 2/3 of 4 heads, 2 of them are the nearest.
    config = uniform_config(space, cost_of, 100 + 3 * (7 + 20 + 40))
    assert [config[n] for n in ("layers.0.heads", "layers.2.ffn", "layers.1.block")] == [2, 40, 1]
    config = uniform_config(space, cost_of, 100 + 3 * (7 + 20 + 40) - 1)
    assert [config[n] for n in ("layers.0.heads", "layers.2.ffn", "layers.1.block")] == [2, 30, 1]
    config = uniform_config(space, cost_of, 100 + 3 * (7 + 40 + 30), kinds=["ffn"])
    assert [config[n] for n in ("layers.0.heads", "layers.2.ffn", "layers.1.block")] == [4, 30, 1]
    with pytest.raises(InvalidSpace, match="costs 150 or less: the smallest costs 151"):
        uniform_config(space, cost_of, 150)


class Counted:
    """A loss that counts how often it is asked for, and fails after a while."""

    def __init__(self, limit: int = 10**6) -> None:
        self.asked: list[SubnetConfig] = []
        self.limit = limit

    def __call__(self, config: SubnetConfig) -> float:
        if len(self.asked) == self.limit:
            raise KeyboardInterrupt
        self.asked.append(config)
        return 2.0 + sum(1 / (1 + choice) for choice in config.values())


def test_single_losses_are_differences_to_the_base() -> None:
    space = structure(1)
    objective = Counted()
    calls: list[tuple[int, int]] = []
    losses = single_choice_losses(
        objective, space, progress=lambda done, total: calls.append((done, total))
    )
    assert len(objective.asked) == 1 + 2 + 3 + 1
    assert calls[-1] == (7, 7)
    assert losses["layers.0.heads"] == pytest.approx({4: 0, 2: 1 / 3 - 1 / 5, 0: 1 - 1 / 5})
    assert losses["layers.0.block"] == pytest.approx({1: 0, 0: 1 - 1 / 2})
    base = SubnetConfig({"layers.0.heads": 2, "layers.0.ffn": 30, "layers.0.block": 1})
    beside = single_choice_losses(Counted(), space, base)
    assert beside["layers.0.heads"] == pytest.approx({4: 1 / 5 - 1 / 3, 2: 0, 0: 1 - 1 / 3})
    with pytest.raises(InvalidSubnet):
        single_choice_losses(Counted(), space, SubnetConfig({"layers.0.heads": 3}))


def test_a_killed_pass_goes_on_where_it_stopped(tmp_path: Path) -> None:
    space, path = structure(2), tmp_path / "sub" / "losses.jsonl"
    with pytest.raises(KeyboardInterrupt):
        single_choice_losses(Counted(5), space, path=path)
    with path.open("a") as file:
        file.write('{"dim": "layers.0.ffn", "cho')  # torn by the kill
    again = Counted()
    losses = single_choice_losses(again, space, path=path)
    assert len(again.asked) == 13 - 5
    assert losses == single_choice_losses(Counted(), space)
    assert all(json.loads(line) for line in path.read_text().splitlines())
    silent = Counted(0)
    assert single_choice_losses(silent, space, path=path) == losses


def test_losses_beside_another_base_or_damaged_are_refused(tmp_path: Path) -> None:
    space, path = structure(1), tmp_path / "losses.jsonl"
    single_choice_losses(Counted(), space, path=path)
    with pytest.raises(BadArtifact, match="another base"):
        single_choice_losses(Counted(), space, space.smallest(), path=path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], '{"dim": 3}\n', *lines[1:]]))
    with pytest.raises(BadArtifact, match="damaged"):
        single_choice_losses(Counted(), space, path=path)
