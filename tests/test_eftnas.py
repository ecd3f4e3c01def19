"""EFTNAS at toy size: a space made from importance, a teacher, and budgets that are kept."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_finetune import classifier, save_labelled
from test_lonas import cli, rows
from tiny_llama import tiny_tokenizer
from tiny_run import save_recipe, save_sums, save_tiny_model, tiny_recipe
from transformers import AutoModelForSequenceClassification

from elastune.artifacts import RunDirectory
from elastune.config import make_recipe
from elastune.cost import model_cost
from elastune.errors import BadRecipe
from elastune.files import read_json
from elastune.generated import GeneratedSpace
from elastune.importance.saved import load_scores
from elastune.measure import systems
from elastune.models import load_model
from elastune.progress import Reporter
from elastune.run import Run
from elastune.space import SearchSpace

POINTS = [1.0, 0.7, 0.4]
STRUCTURE: dict[str, Any] = {
    "generate": {"points": POINTS, "tolerance": 0.1},
    "round_to": 1,
    "budgets": POINTS[1:],
    "budget_slack": 0.25,
    "allocation": "points",
}
NAMES = ["points-70", "points-40"]
SEARCH = {"algorithm": "hill_climb", "trials": 6, "objective": "loss", "cost": "block_macs"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold a decoder, sums, and a recipe."""
    folder = tmp_path_factory.mktemp("source")
    model, data = save_tiny_model(folder / "model"), save_sums(folder / "data")
    recipe = tiny_recipe(
        model,
        data,
        method="eftnas",
        start="dense+full",
        structure=STRUCTURE,
        importance={"method": "fisher", "examples": 8, "rounds": 3},
        train={"full_learning_rate": 1e-3},
        search=SEARCH,
        baselines=["dense", "dense+full", "alone"],
    )
    recipe["adapter"] = {"ranks": []}
    save_recipe(folder / "eftnas.yaml", recipe)
    return folder


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    cli("run", source / "eftnas.yaml", "--out", out)
    return out


def test_every_size_is_reported_beside_the_same_size_trained_alone(run: Path) -> None:
    found = rows(run)
    assert {"dense", "dense+full", "largest", "smallest", "best", *NAMES} <= set(found)
    for name in NAMES:
        own, alone = found[name], found[f"alone-{name}"]
        assert (own["params"], own["macs"]) == (alone["params"], alone["macs"])
        assert own["params"] < found["dense"]["params"]


def test_points_cost_what_was_asked_for(run: Path) -> None:
    full = model_cost(load_model(run.parent.parent / _model(run))[0], 16).block_macs
    for name, target in zip(NAMES, POINTS[1:], strict=True):
        model, _ = load_model(run / "subnets" / name)
        assert model_cost(model, 16).block_macs / full == pytest.approx(target, abs=0.1)


def _model(run: Path) -> Path:
    return Path(read_yaml(run)["model"])


def read_yaml(run: Path) -> dict[str, Any]:
    from elastune.yaml_text import parse_yaml

    return dict(parse_yaml((run / "recipe.yaml").read_text()))


def test_the_best_of_a_budget_is_the_best_trial_that_meets_it(run: Path) -> None:
    trials = read_json(run / "search" / "trials.json")["trials"]
    full = read_json(run / "search" / "budgets.json")["full_block_macs"]
    found = rows(run)
    for budget in POINTS[1:]:
        limit = budget * full * 1.25
        fitting = [t for t in trials if t["values"]["block_macs"] <= limit]
        best = min(fitting, key=lambda t: (t["values"]["loss"], t["values"]["block_macs"]))
        assert found[f"best-{100 * budget:g}"]["config"] == best["config"]


def test_the_search_begins_with_the_points(run: Path) -> None:
    trials = read_json(run / "search" / "trials.json")["trials"]
    subnets = read_json(run / "search" / "budgets.json")["subnets"]
    assert [trial["config"] for trial in trials[:2]] == [subnets[name] for name in NAMES]
    assert len(trials) == 6


def test_sizes_trained_alone_took_the_same_steps_from_the_same_pruned_weights(run: Path) -> None:
    def steps(folder: str) -> list[int]:
        lines = (run / folder / "train.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    for name in NAMES:
        assert steps(f"baselines/alone-{name}") == steps("supernet") == [1, 2, 3, 4, 5, 6]


def test_the_ordered_base_computes_what_the_fine_tuned_model_computes(run: Path) -> None:
    tuned, tokenizer = load_model(run / "baselines" / "dense-full" / "model")
    base, _ = load_model(run / "base")
    ids = tokenizer("What is 3 + 4?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-5)
    moved = [
        name
        for name, weight in base.state_dict().items()
        if not torch.equal(weight, tuned.state_dict()[name])
    ]
    assert any("mlp" in name for name in moved)


def test_scores_say_what_they_were_made_from(run: Path) -> None:
    scores, made_from = load_scores(run / "importance.safetensors")
    assert made_from["importance"]["method"] == "fisher"
    assert made_from["start"] == "dense+full"
    assert {name.partition("/")[0] for name in scores} == {"order", "keep"}
    generated = GeneratedSpace.from_dict(read_json(run / "generated.json"))
    assert [point.target for point in generated.points] == POINTS
    assert SearchSpace.from_dict(read_json(run / "space.json")) == generated.space


def test_another_search_trains_nothing_again(run: Path, source: Path) -> None:
    def done(stage: str) -> str:
        return str(read_json(run / "manifest.json")["stages"][stage]["finished"])

    stages = ("dense+full", "importance", "generate", "sparsify", "train", "alone-points-70")
    before = [done(stage) for stage in stages]
    cli("run", source / "eftnas.yaml", "--out", run, "--set", "search.trials=8", "--update")
    assert [done(stage) for stage in stages] == before
    assert len(read_json(run / "search" / "trials.json")["trials"]) == 8
    cli("run", source / "eftnas.yaml", "--out", run, "--update")  # as the other tests know it


def test_what_was_trained_alone_is_scored_itself(run: Path) -> None:
    """Its figures are never those of the same size out of the super-network."""
    work = Run(RunDirectory(run), RunDirectory(run).recipe(), Reporter())
    keys = {system.name: system.key for system in systems(work)}
    assert keys["alone-points-70"] != keys["points-70"]
    weights = [load_file(run / "baselines" / "alone-points-70" / "trained.safetensors")]
    weights.append(load_file(run / "supernet" / "trained.safetensors"))
    assert any(not torch.equal(weights[0][n], weights[1][n]) for n in weights[0] if n in weights[1])


def test_the_teacher_is_asked_once_or_runs_along(run: Path) -> None:
    """Language models have too many logits to keep."""
    assert not (run / "teacher").exists()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = tiny_tokenizer()
    classifier("bert", tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    save_labelled(folder / "data")
    return folder


def encoder_recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    return {
        "method": "eftnas",
        "model": str(folder / "model"),
        "task": {
            "name": f"classification:{folder / 'data/train.jsonl'}",
            "options": {"report": str(folder / "data/report.jsonl")},
        },
        "data": {"n_validation": 8},
        "structure": STRUCTURE,
        "train": {"max_steps": 4, "batch_size": 8, "full_learning_rate": 1e-3},
        "search": SEARCH | {"trials": 2, "objective": "score"},
        "evaluate": {"macs_length": 16},
        "baselines": ["dense+full"],
    } | sections


MOVEMENT = {
    "method": "movement",
    "movement": {"max_steps": 5, "warmup": [0.2, 0.6], "block_size": 4, "learning_rate": 1e-3},
}


@pytest.mark.parametrize(
    ("importance", "structure"),
    [
        (MOVEMENT, STRUCTURE | {"generate": {"points": POINTS, "tolerance": 0.15}}),
        ({"method": "taylor", "examples": 16, "tie": "sum"}, STRUCTURE),
        (
            {"method": "wanda", "examples": 16},
            STRUCTURE | {"generate": {"by": "knapsack", "points": POINTS, "tolerance": 0.3}},
        ),
        ({"method": "magnitude"}, {"ffn": [1.0, 0.5], "round_to": 8}),
    ],
    ids=["movement", "taylor", "knapsack", "by-hand"],
)
def test_encoders_of_any_importance_leave_smaller_classifiers(
    importance: Any, structure: Any, encoder: Path, tmp_path: Path
) -> None:
    recipe = encoder_recipe(encoder, importance=importance, structure=structure)
    out = tmp_path / "run"
    cli("run", save_recipe(tmp_path / "r.yaml", recipe), "--out", out)
    found = rows(out)
    assert found["smallest"]["params"] < found["dense+full"]["params"]
    # What the teacher says of examples is kept: it is asked once for all training.
    assert len(list((out / "teacher").iterdir())) == 1
    model = load_model(out / "subnets/smallest", head="sequence-classification", num_labels=2)[0]
    assert sum(p.numel() for p in model.parameters()) == found["smallest"]["params"]


def test_embeddings_of_fewer_tokens_and_less_rank_leave_smaller_models(
    encoder: Path, tmp_path: Path
) -> None:
    recipe = encoder_recipe(
        encoder,
        vocabulary="task",
        start="dense+full",
        importance={"method": "magnitude"},
        structure=STRUCTURE | {"embedding": [1.0, 0.5]},
        baselines=["dense+full", "alone"],
    )
    out = tmp_path / "run"
    cli("run", save_recipe(tmp_path / "r.yaml", recipe), "--out", out)
    found = rows(out)
    space = SearchSpace.from_dict(read_json(out / "space.json"))
    assert [d.choices for d in space.dims if d.kind == "embedding"] == [(32, 16)]
    whole = load_model(encoder / "model", head="sequence-classification", num_labels=2)[0]
    n_tokens = whole.config.vocab_size
    model, tokenizer = load_model(
        out / "subnets/smallest", head="sequence-classification", num_labels=2
    )
    assert len(tokenizer) < n_tokens
    assert sum(p.numel() for p in model.parameters()) == found["smallest"]["params"]
    assert found["alone-points-40"]["params"] == found["points-40"]["params"]
    # What is reported is what the saved folder says of the same sentences.
    lines = (out / "predictions" / "smallest.train.jsonl.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        inputs = tokenizer(record["text"], return_tensors="pt")
        with torch.no_grad():
            label = int(model(**inputs).logits.argmax())
        assert label == record["prediction"]


def test_a_checkpoint_can_teach(encoder: Path, tmp_path: Path) -> None:
    teacher = AutoModelForSequenceClassification.from_pretrained(encoder / "model")
    teacher.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    recipe = encoder_recipe(encoder, baselines=["dense"], importance={"method": "magnitude"})
    recipe["train"] = recipe["train"] | {"distill": {"teacher": str(tmp_path / "teacher")}}
    out = tmp_path / "run"
    cli("run", save_recipe(tmp_path / "r.yaml", recipe), "--out", out)
    losses = [
        json.loads(x)["loss"] for x in (out / "supernet/train.jsonl").read_text().splitlines()
    ]
    # The teacher is the model itself: the largest part of the loss is 0 in the first step.
    assert all(map(math.isfinite, losses))
    assert "dense+full" not in rows(out)


def test_a_teacher_that_reads_other_tokens_is_refused(encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(encoder / "model", tmp_path / "teacher")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "teacher")
    recipe = encoder_recipe(encoder, baselines=["dense"], importance={"method": "magnitude"})
    recipe["train"] = recipe["train"] | {"distill": {"teacher": str(tmp_path / "teacher")}}
    refused = cli("run", save_recipe(tmp_path / "r.yaml", recipe), "--out", tmp_path / "r", code=2)
    assert "has another vocabulary than" in " ".join(refused.output.split())
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": ["dense"]}, "is to be trained, so that baselines"),
        ({"structure": STRUCTURE | {"ffn": [1.0, 0.5]}}, "ffn is of spaces made by hand"),
        ({"structure": STRUCTURE | {"budgets": [0.1]}}, "outside of the generated space"),
        ({"structure": STRUCTURE | {"order": "wanda"}}, "order must be importance"),
        ({"structure": {"ffn": [1.0, 0.5], "budgets": [0.5], "allocation": "points"}}, "generate"),
        ({"structure": {"generate": {"low": 0.5, "high": 0.2}}}, "low 0.5 is above high 0.2"),
        ({"structure": {"generate": {"by": "knapsack", "cost": "latency"}}}, "by: importance"),
        ({"structure": {"generate": {"points": 0}}}, "points is a number of at least 1"),
        ({"structure": {}}, "nothing is elastic"),
        ({"baselines": ["dense+full", "alone"], "structure": {"ffn": [1.0, 0.5]}}, "alone"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    recipe = {"method": "eftnas", "model": "m", "task": "sst2", "structure": STRUCTURE, **changes}
    with pytest.raises(BadRecipe, match=message):
        make_recipe(recipe, "recipe")


def test_a_recipe_of_three_lines_is_the_published_method() -> None:
    recipe = make_recipe(
        {"method": "eftnas", "model": "m", "task": "sst2", "structure": {"generate": {}}}, "recipe"
    )
    assert recipe.train.update == "full"
    assert recipe.train.sampler == "sandwich"
    assert (recipe.train.distill.teacher, recipe.train.distill.weight) == ("dense+full", 0.9)
    assert recipe.train.distill.temperature == 2.0
    assert recipe.importance is not None
    assert recipe.sparsify.ratio == 0.0
