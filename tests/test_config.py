"""Recipes: what is understood, what is refused, and what the user is told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from elastune import config, sections
from elastune.config import Recipe, dump_recipe, load_recipe, make_recipe
from elastune.errors import BadRecipe

REPO = Path(__file__).resolve().parent.parent
SMALLEST = {"model": "smollm2-135m", "task": "gsm8k"}
SECTIONS = [
    kind
    for kind in (*vars(config).values(), *vars(sections).values())
    if isinstance(kind, type)
    and issubclass(kind, BaseModel)
    and kind.__module__.startswith((config.__name__, sections.__name__))
]


def refused(data: dict[str, Any]) -> str:
    with pytest.raises(BadRecipe) as caught:
        make_recipe(data, "my.yaml")
    return str(caught.value)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    return path


# --- defaults -----------------------------------------------------------------------------------

#: Shears (NAACL 2024), section 4 and its released commands; Wanda's calibration.
PUBLISHED = {
    "sparsify.method": "wanda",
    "sparsify.ratio": 0.5,
    "sparsify.calibration.n_sequences": 128,
    "sparsify.calibration.length": 2048,
    "adapter.ranks": [32, 24, 16],
    "adapter.alpha": 64,
    "adapter.targets": ["q", "k", "v", "up", "gate", "down"],
    "train.learning_rate": 3e-4,
    "train.batch_size": 16,
    "train.epochs": 3,
    "train.sampler": "random",
}


@pytest.mark.parametrize(("key", "value"), PUBLISHED.items())
def test_defaults_are_the_published_settings(key: str, value: Any) -> None:
    place: Any = make_recipe(SMALLEST, "")
    for part in key.split("."):
        place = getattr(place, part)
    assert place == value


def test_every_setting_has_a_say_somewhere_in_the_package() -> None:
    files = [p for p in (REPO / "elastune").rglob("*.py") if p.name != "config.py"]
    code = "\n".join(path.read_text() for path in files)
    fields = {name for section in SECTIONS for name in section.model_fields}
    assert len(fields) > 40
    # `train.tasks` and the like are read through properties of the recipe itself.
    own = (REPO / "elastune" / "config.py").read_text()
    unread = [n for n in sorted(fields) if not re.search(rf"\.{n}\b", code)]
    assert [name for name in unread if not re.search(rf"self(\.\w+)*\.{name}\b", own)] == []


@pytest.mark.parametrize(
    "path",
    [*sorted((REPO / "recipes").glob("*.yaml")), REPO / "elastune" / "demo.yaml"],
    ids=lambda path: path.name,
)
def test_shipped_recipes_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe


def test_a_dumped_recipe_spells_every_default_out() -> None:
    elastic = {"method": "eftnas", "structure": {"generate": {}}}
    text = dump_recipe(make_recipe(SMALLEST | elastic, ""))
    text += dump_recipe(make_recipe(SMALLEST | {"method": "sqft", "adapter": {"keep": "int4"}}, ""))
    for section in SECTIONS:
        for name in section.model_fields:
            assert f"{name}:" in text


# --- overrides ----------------------------------------------------------------------------------

OVERRIDES: list[tuple[str, str, Any]] = [
    ("train.learning_rate=3e-4", "train.learning_rate", 3e-4),
    ("train.learning_rate=1E-3", "train.learning_rate", 1e-3),
    ("train.learning_rate=0.01", "train.learning_rate", 0.01),
    ("seed=-3", "seed", -3),
    ("train.max_steps=null", "train.max_steps", None),
    ("train.gradient_checkpointing=true", "train.gradient_checkpointing", True),
    ("adapter.ranks=[8, 4]", "adapter.ranks", [8, 4]),
    ("adapter.ranks={'*': [8, 4], '*.down': [0]}", "adapter.ranks", {"*": [8, 4], "*.down": [0]}),
    ("adapter.targets=q,v", "adapter.targets", ["q", "v"]),
    ("adapter.targets=[q, v]", "adapter.targets", ["q", "v"]),
    ("baselines=dense", "baselines", ["dense"]),
    ("baselines=[]", "baselines", []),
    ("task.limit=7", "task.limit", 7),
    ("task=svamp", "task.name", "svamp"),
    ("task.options.shots=3", "task.options", {"shots": 3}),
    ("evaluate.tasks=svamp,mawps", "evaluate.tasks.1.name", "mawps"),
    ("data.dir=my data", "data.dir", Path("my data")),
    ("model=1e5/x", "model", "1e5/x"),
    ("model=a=b", "model", "a=b"),
    ("model='3e4'", "model", "3e4"),
    ("sparsify.pattern=2:4", "sparsify.pattern", "2:4"),
    ("sparsify.calibration.source=c4", "sparsify.calibration.source", "c4"),
]


@pytest.mark.parametrize(("text", "key", "value"), OVERRIDES)
def test_overrides_are_yaml_values(recipe_file: Path, text: str, key: str, value: Any) -> None:
    recipe = load_recipe(recipe_file, [text])
    recipe_file.write_text(dump_recipe(recipe))
    assert load_recipe(recipe_file) == recipe
    place: Any = recipe
    for part in key.split("."):
        place = place[int(part)] if part.isdigit() else getattr(place, part)
    assert place == value
    assert type(place) is type(value) or isinstance(place, Path)


def test_an_override_of_a_shorthand_keeps_its_name(recipe_file: Path) -> None:
    task = load_recipe(recipe_file, ["task.limit=5", "task.template=qa"]).task
    assert (task.name, task.limit, task.template) == ("gsm8k", 5, "qa")


def test_later_overrides_win(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train.lr", "not of the form section.key=value"),
        ("=3", "not of the form section.key=value"),
        ("seed.x=3", "'seed' has no keys of its own"),
        ("adapter.ranks=[8", "not valid YAML"),
        ("train.learning_rte=1", "did you mean 'learning_rate'"),
    ],
)
def test_bad_overrides_are_refused(recipe_file: Path, text: str, said: str) -> None:
    recipe_file.write_text(yaml.safe_dump(SMALLEST | {"seed": 1}))
    with pytest.raises(BadRecipe) as caught:
        load_recipe(recipe_file, [text])
    assert said in str(caught.value)
    assert text.partition("=")[0].split(".")[-1] in str(caught.value)


# --- refusals -----------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"modle": "x"}, "unknown key 'modle' (did you mean 'model'?)"),
    ({"train": {"bach_size": 3}}, "unknown key 'train.bach_size' (did you mean 'batch_size'?)"),
    ({"sparsify": {"calibration": {"n": 3}}}, "known here are source, n_sequences, length"),
    ({"evaluate": {"tasks": [{"nam": "x"}]}}, "did you mean 'name'?"),
    ({"sparsify": {"ratio": 1.0}}, "sparsify.ratio: input should be less than 1, got 1.0"),
    ({"sparsify": {"ratio": -0.1}}, "sparsify.ratio: input should be greater than or equal to 0"),
    ({"sparsify": {"method": "wand"}}, "'wanda', 'magnitude' or 'sparsegpt', got 'wand'"),
    ({"baselines": ["sprase"]}, "unknown baseline 'sprase' (did you mean 'sparse'?)"),
    ({"train": {"learning_rate": "fast"}}, "train.learning_rate: "),
    ({"train": {"learning_rate": float("inf")}}, "train.learning_rate: "),
    ({"train": {"learning_rate": float("nan")}}, "train.learning_rate: "),
    ({"train": {"schedule": "cosin"}}, "'cosine'"),
    ({"train": {"max_steps": 0}}, "train.max_steps: "),
    ({"train": 3}, "train: "),
    ({"adapter": {"ranks": "all"}}, "adapter.ranks: "),
    ({"task": None}, "task: "),
    ({"method": "shear"}, "'shears'"),
    ({"evaluate": {"tasks": ["svamp", "svamp"]}}, "two tasks are called 'svamp'"),
    ({"evaluate": {"tasks": ["a/x.jsonl", "b/x.jsonl"]}}, "two tasks are called 'x.jsonl'"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_wrong_settings_are_named_with_what_is_allowed(wrong: dict[str, Any], said: str) -> None:
    assert said in refused(SMALLEST | wrong)


def test_every_wrong_setting_is_in_the_one_message() -> None:
    text = refused({"task": "gsm8k", "sed": 1, "train": {"epochs": -1}, "baselines": ["x"]})
    assert text.startswith("my.yaml: ")
    for said in ("'model' is missing", "'sed'", "train.epochs", "unknown baseline 'x'"):
        assert said in text
    assert len(text.splitlines()) == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [", "not valid YAML"),
        (b"- a\n- b", "mapping"),
        (b"", "mapping"),
        (b"\xff\xfe\x00", ""),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(BadRecipe, match=r"broken\.yaml") as caught:
        load_recipe(path)
    assert said in str(caught.value)


def test_a_missing_recipe_names_the_path_and_a_way_out(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(BadRecipe, match="cannot read the recipe") as caught:
            load_recipe(path)
        assert str(path) in str(caught.value)
        assert "try: " in str(caught.value)


def test_a_recipe_cannot_be_changed_behind_a_runs_back() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_recipe(SMALLEST, "").train.epochs = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("gsm8k", "gsm8k"),
        ("reasoning_gym:chain_sum", "reasoning_gym:chain_sum"),
        ("/data/my.test/sums.jsonl", "sums.jsonl"),
        ("custom:data/sums.json.gz", "sums.json.gz"),
        ("custom:hub:owner/name", "custom:hub:owner/name"),
        ("perplexity:notes/day.txt", "day.txt"),
    ],
)
def test_results_call_a_file_by_its_name_without_folders(name: str, label: str) -> None:
    assert Recipe(model="m", task=name).task.label == label  # type: ignore[arg-type]
