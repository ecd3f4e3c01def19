"""Samplers: what a step trains depends on (seed, index) alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, pairwise
from typing import Any, get_args

import numpy as np
import pytest

from elastune.errors import BadRecipe
from elastune.sampling import (
    SAMPLERS,
    STAGE_ORDER,
    ProgressiveSampler,
    RandomSampler,
    Sampler,
    SandwichSampler,
    make_sampler,
)
from elastune.space import DimKind, ElasticDim, SearchSpace

SPACE = SearchSpace(
    [
        ElasticDim("a", "rank", (32, 24, 16), ("m.a",)),
        ElasticDim("b", "rank", (32, 24, 16), ("m.b",)),
        ElasticDim("c", "rank", (8, 4), ("m.c",)),
    ]
)


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_depend_on_seed_and_index_alone(name: str) -> None:
    def draws(sampler: Sampler, indices: Any) -> dict[int, Any]:
        return {i: list(sampler.draw(i, i / 50)) for i in indices}

    forward = draws(make_sampler(name, SPACE, 1), range(50))
    backward = draws(make_sampler(name, SPACE, 1), reversed(range(50)))
    assert forward == backward
    late = make_sampler(name, SPACE, 1)
    assert list(late.draw(40, 40 / 50)) == forward[40]
    assert forward != draws(make_sampler(name, SPACE, 2), range(50))
    assert len({str(draw) for draw in forward.values()}) > 10


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_that_is_drawn_is_in_the_space_and_weights_add_up_to_1(name: str) -> None:
    sampler = make_sampler(name, SPACE, 0)
    for index in range(30):
        draws = sampler.draw(index, index / 30)
        assert all(draw.config in SPACE for draw in draws)
        assert sum(draw.weight for draw in draws) == pytest.approx(1)


def assert_uniform(pick: Callable[[int], Any], n_outcomes: int, limit: float) -> None:
    n_draws = 100 * n_outcomes
    outcomes = [pick(index) for index in range(n_draws)]
    counts = [outcomes.count(outcome) for outcome in set(outcomes)]
    assert len(counts) == n_outcomes
    assert sum((count - 100) ** 2 / 100 for count in counts) < limit


def test_random_draws_are_uniform_over_all_configurations() -> None:
    sampler = RandomSampler(SPACE, 0)
    # 17 degrees of freedom: 40.8 is passed once in a thousand seeds.
    assert_uniform(lambda i: sampler.draw(i, 0.0)[0].config, 18, 40.8)


def test_steps_in_a_row_are_not_alike() -> None:
    sampler = RandomSampler(SPACE, 0)
    choices = [sampler.draw(i, 0.0)[0].config["a"] for i in range(901)]
    pairs = list(pairwise(choices))
    assert_uniform(lambda i: pairs[i], 9, 26.1)  # 8 degrees of freedom


@pytest.mark.parametrize("n_random", [0, 1, 3])
def test_a_sandwich_is_largest_random_ones_and_smallest(n_random: int) -> None:
    sampler = SandwichSampler(SPACE, 0, n_random)
    draws = sampler.draw(7, 0.0)
    assert len(draws) == n_random + 2
    assert draws[0].config == SPACE.largest()
    assert draws[-1].config == SPACE.smallest()
    assert {draw.weight for draw in draws} == {1 / (n_random + 2)}
    middles = {str(d.config) for i in range(50) for d in sampler.draw(i, 0.0)[1:-1]}
    assert n_random == 0 or len(middles) > 5


@pytest.mark.parametrize(
    ("progress", "allowed_a", "allowed_c"),
    [
        (0.0, {32}, {8}),
        (0.33, {32}, {8}),
        (0.34, {32, 24}, {8, 4}),
        (0.66, {32, 24}, {8, 4}),
        (0.67, {32, 24, 16}, {8, 4}),
        (1.0, {32, 24, 16}, {8, 4}),
    ],
)
def test_progressive_stages_open_one_more_choice_at_equal_times(
    progress: float, allowed_a: set[int], allowed_c: set[int]
) -> None:
    sampler = ProgressiveSampler(SPACE, 0)
    draws = [sampler.draw(i, progress)[0].config for i in range(60)]
    assert {config["a"] for config in draws} == allowed_a
    assert {config["c"] for config in draws} == allowed_c


def dim(name: str, kind: Any, *choices: int) -> ElasticDim:
    return ElasticDim(name, kind, choices, (f"m.{name}",))


RANK, HEADS = dim("r", "rank", 32, 24, 16), dim("h", "heads", 8, 4)
FFN, DEPTH = dim("f", "ffn", 48, 32, 16), dim("d", "depth", 1, 0)


def openings(space: SearchSpace) -> list[str]:
    """How many choices each dim draws from, stage by stage."""
    sampler = ProgressiveSampler(space, 0)
    found = []
    for stage in range(sampler.n_stages):
        progress = (stage + 0.5) / sampler.n_stages
        drawn = [sampler.draw(i, progress)[0].config for i in range(80)]
        for one in space.dims:
            seen = {config[one.name] for config in drawn}
            assert seen == set(one.choices[: len(seen)])
        found.append("".join(str(len({c[one.name] for c in drawn})) for one in space.dims))
    return found


@pytest.mark.parametrize(
    ("dims", "stages"),
    [
        ((RANK,), ["1", "2", "3"]),
        ((DEPTH, FFN, HEADS, RANK), ["1111", "1112", "1113", "1223", "1323", "2323"]),
        ((RANK, DEPTH), ["11", "21", "31", "32"]),
        ((HEADS, FFN), ["11", "22", "23"]),
        ((DEPTH,), ["1", "2"]),
        ((dim("r", "rank", 32), FFN), ["11", "12", "13"]),  # one choice: no stage of its own
        ((dim("r", "rank", 32),), ["1"]),
    ],
)
def test_progressive_stages_open_ranks_then_widths_then_depth(
    dims: tuple[ElasticDim, ...], stages: list[str]
) -> None:
    assert openings(SearchSpace(dims)) == stages


def test_every_kind_of_dim_has_its_turn_once() -> None:
    assert sorted(chain(*STAGE_ORDER)) == sorted(get_args(DimKind))


def test_stages_of_a_space_of_ranks_draw_as_one_group_of_dims() -> None:
    sampler = ProgressiveSampler(SPACE, 5)
    for index in range(60):
        rng = np.random.default_rng((5, index))
        opened = index // 20 + 1
        indices = [int(rng.integers(min(opened, len(d.choices)))) for d in SPACE.dims]
        assert sampler.draw(index, index / 60)[0].config == SPACE.decode(indices)


def test_the_last_progressive_stage_is_uniform() -> None:
    sampler = ProgressiveSampler(SPACE, 0)
    assert_uniform(lambda i: sampler.draw(i, 0.9)[0].config, 18, 40.8)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_says_whether_every_step_begins_with_the_largest(name: str) -> None:
    sampler = make_sampler(name, SPACE, 0)
    firsts = {sampler.draw(i, 0.9)[0].config for i in range(30)}
    assert (firsts == {SPACE.largest()}) == getattr(sampler, "begins_with_largest", False)


@pytest.mark.parametrize("n_random", [0, 1, 4])
def test_n_random_is_how_many_random_ones_a_named_sandwich_has(n_random: int) -> None:
    assert len(make_sampler("sandwich", SPACE, 0, n_random=n_random).draw(0, 0.0)) == n_random + 2
    assert len(make_sampler("random", SPACE, 0, n_random=n_random).draw(0, 0.0)) == 1


def test_unknown_samplers_are_refused() -> None:
    with pytest.raises(BadRecipe, match="'sandwitch'; known are random, sandwich, progressive"):
        make_sampler("sandwitch", SPACE, 0)
