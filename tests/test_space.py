"""Search spaces and configurations: plain data with no surprises, and no torch."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from elastune.errors import InvalidSpace, InvalidSubnet
from elastune.space import ElasticDim, SearchSpace, SubnetConfig


def dim(name: str, *choices: int) -> ElasticDim:
    return ElasticDim(name, "rank", choices, (f"model.{name}",))


SPACE = SearchSpace([dim("a", 32, 24, 16), dim("b", 8, 4), dim("c", 7), dim("d", 9, 6, 3, 0)])
EVERYTHING = [
    SubnetConfig({"a": a, "b": b, "c": c, "d": d})
    for a, b, c, d in itertools.product((32, 24, 16), (8, 4), (7,), (9, 6, 3, 0))
]


def test_the_size_is_the_number_of_configurations() -> None:
    assert SPACE.size == len(EVERYTHING) == 24
    assert len(SPACE) == 4
    assert all(config in SPACE for config in EVERYTHING)
    huge = SearchSpace([dim(str(i), 3, 2, 1) for i in range(210)])
    assert huge.size == 3**210
    assert repr(huge) == "SearchSpace(210 dims, 10^100.2 sub-networks)"


def test_encode_and_decode_are_inverse_and_give_every_configuration_its_own_code() -> None:
    codes = [SPACE.encode(config) for config in EVERYTHING]
    assert len(set(codes)) == 24
    assert [SPACE.decode(code) for code in codes] == EVERYTHING
    assert SPACE.encode(SubnetConfig({"a": 24, "b": 8, "c": 7, "d": 0})) == (1, 0, 0, 3)


@pytest.mark.parametrize("code", [(0, 0, 0), (0, 0, 1, 0), (-1, 0, 0, 0), (0, 0, 0, 4)])
def test_codes_out_of_range_are_refused(code: tuple[int, ...]) -> None:
    with pytest.raises(InvalidSubnet):
        SPACE.decode(code)


def test_named_configurations_are_first_last_and_middle_choices() -> None:
    assert dict(SPACE.largest()) == {"a": 32, "b": 8, "c": 7, "d": 9}
    assert dict(SPACE.smallest()) == {"a": 16, "b": 4, "c": 7, "d": 0}
    # floor(n / 2) of the descending list: of 3 the second, of 2 the smaller, of 4 the third.
    assert dict(SPACE.heuristic()) == {"a": 24, "b": 4, "c": 7, "d": 3}


def test_neighbours_are_all_configurations_one_step_of_one_dim_away() -> None:
    for config in EVERYTHING:
        code = np.array(SPACE.encode(config))
        near = {
            other
            for other in EVERYTHING
            if int(np.abs(np.array(SPACE.encode(other)) - code).sum()) == 1
        }
        found = SPACE.neighbours(config)
        assert len(found) == len(near)
        assert set(found) == near


def test_samples_are_uniform_and_depend_on_the_generator_alone() -> None:
    draws = [SPACE.sample(np.random.default_rng((1, i))) for i in range(2400)]
    assert draws == [SPACE.sample(np.random.default_rng((1, i))) for i in range(2400)]
    counts = [draws.count(config) for config in EVERYTHING]
    chi_square = sum((count - 100) ** 2 / 100 for count in counts)
    assert chi_square < 50  # 23 degrees of freedom: 49.7 is passed once in a thousand seeds


def test_configurations_are_equal_hashable_and_the_same_in_any_order() -> None:
    one, two = SubnetConfig({"a": 1, "b": 2}), SubnetConfig({"b": 2, "a": 1})
    assert one == two
    assert hash(one) == hash(two)
    assert {one: "kept"}[two] == "kept"
    assert one != SubnetConfig({"a": 1, "b": 3})
    assert one != {"a": 1, "b": 2}
    with pytest.raises(TypeError):
        one["a"] = 3  # type: ignore[index]


def test_a_configuration_is_a_copy_of_what_it_was_made_from() -> None:
    choices = {"a": 1}
    config = SubnetConfig(choices)
    choices["a"] = 2
    assert config["a"] == 1


def test_json_makes_the_round_trip() -> None:
    for config in EVERYTHING:
        text = config.to_json()
        assert "\n" not in text
        assert json.loads(text) == dict(config)
        assert SubnetConfig.from_json(text) == config
    numpy_choices: Any = {"a": np.int64(3)}
    assert SubnetConfig(numpy_choices).to_json() == '{"a": 3}'


@pytest.mark.parametrize("text", ["[1]", "3", "{", '{"a": 1.5}', '{"a": true}', '{"a": "3"}', ""])
def test_anything_but_an_object_of_whole_numbers_is_refused(text: str) -> None:
    with pytest.raises(InvalidSubnet):
        SubnetConfig.from_json(text)


@pytest.mark.parametrize("choice", [1.5, True, "3", None])
def test_choices_that_are_not_whole_numbers_are_refused(choice: Any) -> None:
    with pytest.raises(InvalidSubnet, match="whole number"):
        SubnetConfig({"a": choice})


def test_short_counts_the_choices() -> None:
    config = SubnetConfig({"a": 16, "b": 32, "c": 16, "d": 0})
    assert config.short() == "32x1 16x2 0x1"
    assert repr(config) == "SubnetConfig(32x1 16x2 0x1)"


def test_check_names_every_mismatch_and_the_nearest_choice() -> None:
    config = SubnetConfig({"a": 30, "b": 4, "x": 7, "d": 0})
    with pytest.raises(InvalidSubnet) as caught:
        SPACE.check(config)
    message = str(caught.value)
    assert "unknown dim 'x'" in message
    assert "missing dim 'c'" in message
    assert "rank 30 is not a choice of a (32, 24, 16); nearest is 32" in message
    assert "'b'" not in message
    assert "'d'" not in message
    SPACE.check(EVERYTHING[0])


def test_check_names_the_dim_that_was_meant() -> None:
    space = SearchSpace([dim("layers.0.qkv", 4, 2)])
    with pytest.raises(InvalidSubnet, match=r"unknown dim 'layers.0.qvk' \(did you mean 'layers"):
        space.check(SubnetConfig({"layers.0.qvk": 4}))


def test_check_says_how_many_more_mismatches_there_are() -> None:
    space = SearchSpace([dim(f"dim{i}", 4, 2) for i in range(9)])
    with pytest.raises(InvalidSubnet, match=r"and 4 more$"):
        space.check(SubnetConfig({}))


def test_membership_needs_exactly_the_dims_and_their_choices() -> None:
    good = dict(EVERYTHING[0])
    assert SubnetConfig(good) in SPACE
    assert good not in SPACE
    assert SubnetConfig(good | {"a": 31}) not in SPACE
    assert SubnetConfig(good | {"e": 1}) not in SPACE
    assert SubnetConfig({k: v for k, v in good.items() if k != "c"}) not in SPACE
    with pytest.raises(InvalidSubnet):
        SPACE.encode(SubnetConfig(good | {"a": 31}))


@pytest.mark.parametrize("choices", [(), (1, 2), (2, 2), (3, 1, 2), (1, -1)])
def test_dims_need_distinct_choices_largest_first(choices: tuple[int, ...]) -> None:
    with pytest.raises(InvalidSpace, match="a: choices"):
        dim("a", *choices)


def test_spaces_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidSpace, match="no module shares"):
        ElasticDim("a", "rank", (2, 1), ())
    with pytest.raises(InvalidSpace, match="at least one dim"):
        SearchSpace([])
    with pytest.raises(InvalidSpace, match=r"not: b$"):
        SearchSpace([dim("a", 1), dim("b", 1), dim("b", 2)])


def test_a_space_survives_json() -> None:
    data = json.loads(json.dumps(SPACE.to_dict()))
    again = SearchSpace.from_dict(data)
    assert again == SPACE
    assert hash(again) == hash(SPACE)
    assert again.dims[0].modules == ("model.a",)


ROW: dict[str, Any] = {"name": "a", "kind": "rank", "choices": [2, 1], "modules": ["m"]}


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"dims": None},
        {"dims": [{}]},
        {"dims": ["a"]},
        {"dims": [ROW | {"choices": None}]},
        {"dims": [ROW | {"choices": ["x"]}]},
        {"dims": [ROW | {"choices": "21"}]},
        {"dims": [ROW | {"choices": [2.5, 1]}]},
        {"dims": [ROW | {"modules": 3}]},
        {"dims": [ROW | {"modules": "abc"}]},
        {"dims": [ROW | {"kind": "banana"}]},
        {"dims": [ROW | {"choices": [1, 2]}]},
        {"dims": []},
        [],
        None,
    ],
)
def test_data_that_is_no_space_is_refused(data: Any) -> None:
    with pytest.raises(InvalidSpace):
        SearchSpace.from_dict(data)


def test_spaces_searches_and_recipes_are_used_without_torch() -> None:
    code = (
        "import elastune, elastune.space, elastune.search, elastune.config, elastune.errors\n"
        "from elastune.search import ALGORITHMS\n"
        "import sys\n"
        "heavy = {'torch', 'transformers', 'optuna', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
