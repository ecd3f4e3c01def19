"""Fuzz: recipes, overrides, limits and targets, search spaces, configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from fuzzing import NASTY_TEXT, Outcomes, changed, damaged, scalars, texts_near, tiers, values
from hypothesis import given
from hypothesis import strategies as st

from elastune.config import apply_override, dump_recipe, load_recipe, make_recipe
from elastune.errors import ElastuneError
from elastune.files import read_json
from elastune.fit_request import Request
from elastune.search.limits import parse_limit, parse_limits, resolve
from elastune.space import ElasticDim, SearchSpace, SubnetConfig
from elastune.yaml_text import parse_yaml

REPO = Path(__file__).resolve().parent.parent
RECIPES = [path.read_text(encoding="utf-8") for path in sorted((REPO / "recipes").glob("*.yaml"))]
PLAIN = [parse_yaml(text) for text in RECIPES]
FULL = make_recipe(PLAIN[0], "recipe").model_dump(mode="json")
KEYS = sorted(
    {
        f"{section}.{key}"
        for section, inner in FULL.items()
        if isinstance(inner, dict)
        for key in inner
    }
    | set(FULL)
)
YAML_OF_NOTE = (
    *("&a [*a]", "a: &a {b: *a}", "2020-13-45", "!!timestamp x", "!!int x", "!!float x"),
    *("!!bool x", "!!binary '*'", "<<: 1", "? [a]\n: b", "!!python/object/apply:os.system [true]"),
    *(
        "!!python/name:os.system",
        "1" * 5000,
        "[" * 3000,
        "{a: " * 2000,
        "&a a\n--- *a",
        "\ufeffa: 1",
    ),
    *(
        "!!set {a, b}",
        "!!omap [a: 1]",
        "0o777",
        "1:2:3",
        ".inf",
        "-.INF",
        ".nan",
        "%YAML 9.9\n---\na",
    ),
)
BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def recipe_of(folder: Path, text: bytes, overrides: tuple[str, ...] = ()) -> Any:
    path = folder / "recipe.yaml"
    path.write_bytes(text)
    recipe = load_recipe(path, overrides)
    again = make_recipe(parse_yaml(dump_recipe(recipe)), "again")
    assert dump_recipe(again) == dump_recipe(recipe)  # which NaN does not keep from being equal
    return recipe


@tiers(60)
def test_any_recipe_is_read_or_refused(tmp_path: Path, tier: Any) -> None:
    outcomes = Outcomes()
    near = st.sampled_from([*PLAIN, FULL]).flatmap(changed)
    spelt = near.map(lambda data: yaml.safe_dump(data, allow_unicode=True))
    texts = st.sampled_from(RECIPES).flatmap(lambda text: damaged(text.encode()))

    @tier
    @given(st.one_of(spelt.map(lambda text: text.encode("utf-8", "surrogatepass")), texts))
    def check(text: bytes) -> None:
        outcomes.of(lambda: recipe_of(tmp_path, text))

    check()
    outcomes.both()


def test_yaml_that_its_own_reader_stumbles_over_is_refused(tmp_path: Path) -> None:
    for text in (*YAML_OF_NOTE, BOMB, "task: {name: gsm8k, options: *x}"):
        for whole in (text, f"model: m\ntask: {{name: gsm8k, options: {{a: {text}}}}}"):
            found = Outcomes().of(lambda whole=whole: recipe_of(tmp_path, whole.encode()))
            assert isinstance(found, ElastuneError) or "options" in whole, (whole, found)


@tiers(60)
def test_any_override_is_taken_or_refused(tmp_path: Path, tier: Any) -> None:
    outcomes = Outcomes()
    keys = st.one_of(st.sampled_from(KEYS), st.text(max_size=10), st.sampled_from(NASTY_TEXT))
    written = values.map(lambda value: yaml.safe_dump(value, default_flow_style=True).strip())
    right = st.one_of(written, st.sampled_from(YAML_OF_NOTE), scalars.map(str))
    overrides = st.one_of(st.builds(lambda key, value: f"{key}={value}", keys, right), st.text())

    @tier
    @given(st.lists(overrides, min_size=1, max_size=3))
    def check(some: list[str]) -> None:
        outcomes.of(lambda: recipe_of(tmp_path, RECIPES[0].encode(), tuple(some)))
        outcomes.of(lambda: [apply_override(dict(FULL), one) for one in some])

    check()
    outcomes.both()


NAMES = ["latency", "params", "macs", "score", "loss", "memory", "size", "nonzero", "Ram", "x", ""]
SIGNS = ["<=", ">=", "<", "=", "==", "≤", "≥", "=<", "~", ""]
NUMBERS = ["0.6", "60", "1e3", ".5", "5.", "-1", "1e999", "9" * 5000, "nan", "inf", "٣", "0x1", ""]
UNITS = ["%", "x", "M", "B", "ms", "GiB", "k", "s", "X", "parsec", " %", ""]
SYSTEMS = ["dense", "dense-1.0", "sparse+lora", "heuristic-0.5", "dense--1", "nan", "a-b"]
LIMITS = st.one_of(
    st.builds(
        lambda *parts: "".join(parts),
        *(st.sampled_from(some) for some in (NAMES, SIGNS, NUMBERS, UNITS)),
    ),
    st.builds(
        lambda *parts: "".join(parts),
        *(st.sampled_from(some) for some in (NAMES, SIGNS, SYSTEMS)),
    ),
    st.text(max_size=20),
    st.text(alphabet="<>=≤≥!~ae0123456789.+-%xMB ,and", max_size=24),
)
REFERENCES = {"dense": {"params": 1e8, "latency_ms": 12.5, "score": 0.5, "macs": float("nan")}}


@tiers(200)
def test_any_limit_is_read_or_refused_and_spelt_as_it_is_read(tier: Any) -> None:
    outcomes = Outcomes()

    @tier
    @given(st.lists(LIMITS, max_size=3))
    def check(texts: list[str]) -> None:
        found = outcomes.of(lambda: parse_limits(texts))
        if not isinstance(found, ElastuneError):
            assert tuple(parse_limit(str(limit)) for limit in found) == found
        outcomes.of(lambda: resolve(texts, REFERENCES))
        outcomes.of(lambda: Request("m", "gsm8k", tuple(texts), 1.0).to_dict())

    check()
    outcomes.both()


SPACE = SearchSpace(
    [
        ElasticDim("layers.0.qkv", "rank", (32, 24, 16), ("model.layers.0.self_attn.q_proj",)),
        ElasticDim("layers.1.ffn", "ffn", (128, 64, 0), ("model.layers.1.mlp",)),
    ]
)


@tiers(100)
def test_any_space_file_is_read_or_refused(tmp_path: Path, tier: Any) -> None:
    outcomes, path = Outcomes(), tmp_path / "space.json"

    def use() -> Any:
        space = SearchSpace.from_dict(read_json(path))
        for config in (space.largest(), space.smallest(), space.heuristic()):
            assert space.decode(space.encode(config)) == config
        repr(space)
        return SearchSpace.from_dict(json.loads(json.dumps(space.to_dict())))

    @tier
    @given(texts_near(json.dumps(SPACE.to_dict())))
    def check(text: bytes) -> None:
        path.write_bytes(text)
        outcomes.of(use)

    check()
    outcomes.both()


@tiers(100)
def test_any_configuration_is_read_or_refused(tier: Any) -> None:
    outcomes = Outcomes()
    near = changed(dict(SPACE.heuristic())).map(json.dumps)

    @tier
    @given(st.one_of(near, st.text(), st.sampled_from(["[" * 3000, '{"a": ' + "1" * 5000 + "}"])))
    def check(text: str) -> None:
        outcomes.of(lambda: SPACE.check(SubnetConfig.from_json(text)))

    check()
    outcomes.both()
