"""`elastune fit`: plans that keep a time limit, and models that keep a budget."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_finetune import classifier, save_labelled
from test_lonas import cli
from tiny_llama import tiny_tokenizer
from tiny_run import save_sums, save_tiny_model
from transformers import AutoModelForSequenceClassification

from elastune.artifacts import RunDirectory
from elastune.cost import model_cost
from elastune.errors import BadRecipe
from elastune.files import read_json
from elastune.fit import closest, reached_cost, reached_score, tightened
from elastune.fit_plan import LEAST, SPARE, Knobs, Plan, Speed, cut, make_plan
from elastune.fit_request import Facts, Request
from elastune.latency import Conditions, Latency
from elastune.models import load_model
from elastune.search.base import Trial
from elastune.search.limits import parse_limit
from elastune.space import SubnetConfig

#: About a BERT-base on SST-2.
ENCODER = Facts(
    kind="encoder",
    task_kind="classification",
    n_train=67_000,
    n_report=872,
    longest=512,
    length=64,
    blocks=12,
    units=(12, 3072),
    hidden=768,
    fixed_heads=False,
    full={"params": 110e6, "nonzero": 110e6, "macs": 5.5e9, "block_macs": 5.5e9, "latency_ms": 40},
    halves={
        "params": (28e6, 56e6),
        "nonzero": (28e6, 56e6),
        "macs": (1.9e9, 3.6e9),
        "block_macs": (1.9e9, 3.6e9),
    },
    sparse_weights=85_000_000,
    per_rank=12 * 18_000,
    load_seconds=2.0,
)
DECODER = replace(ENCODER, kind="decoder", task_kind="generation", n_train=7000, n_report=1300)
SPEED = Speed(step=0.2, score=0.004)


def request(**changes: Any) -> Request:
    settings: dict[str, Any] = {"model": "m", "task": "sst2", "targets": ("macs<=0.6x",)}
    return Request(**(settings | {"max_drop": 1.0} | changes))


def test_the_method_follows_from_model_and_targets() -> None:
    def method(facts: Facts, *targets: str, overrides: tuple[str, ...] = ()) -> str:
        return make_plan(request(targets=targets, overrides=overrides), facts, SPEED).recipe.method

    assert method(ENCODER, "macs<=0.6x") == "eftnas"
    assert method(DECODER, "macs<=0.6x") == "lonas"
    assert method(ENCODER, "nonzero<=0.6x") == method(DECODER, "nonzero<=50%") == "shears"
    assert method(DECODER, "nonzero<=0.6x", "macs<=0.8x") == "lonas"
    assert method(ENCODER, "macs<=0.6x", overrides=("method=lonas",)) == "lonas"
    with pytest.raises(BadRecipe, match="eftnas, lonas, shears"):
        method(ENCODER, "macs<=0.6x", overrides=("method=finetune",))


@pytest.mark.parametrize("target", ["macs<=0.6x", "latency<=0.6x", "macs<=3.3G", "block_macs<=60%"])
def test_the_generated_space_has_points_on_both_sides_of_the_target(target: str) -> None:
    structure = make_plan(request(targets=(target,)), ENCODER, SPEED).recipe.structure
    assert structure is not None
    assert structure.generate is not None
    points = structure.generate.points
    assert isinstance(points, list)
    assert points[0] == 1.0
    assert points == sorted(points, reverse=True)
    assert sum(point > 0.6 for point in points) == sum(point <= 0.6 for point in points) == 2


def test_points_of_parameters_leave_room_for_what_no_block_holds() -> None:
    # 26 M of 110 M are outside of the blocks, so 0.6x leaves 40 M of the blocks' 84 M.
    structure = make_plan(request(targets=("params<=0.6x",)), ENCODER, SPEED).recipe.structure
    assert structure is not None
    assert structure.generate is not None
    assert structure.generate.cost == "params"
    assert round(40 / 84, 3) in structure.generate.points  # type: ignore[operator]


def test_widths_of_a_decoder_reach_below_the_target() -> None:
    recipe = make_plan(request(), DECODER, SPEED).recipe
    structure = recipe.structure
    assert structure is not None
    assert isinstance(structure.heads, list)
    assert isinstance(structure.ffn, list)
    heads, ffn = DECODER.halves["macs"]
    smallest = min(structure.heads) * heads + min(structure.ffn) * ffn
    assert smallest < 0.6 * DECODER.full["macs"]
    assert recipe.train.sampler == "random"


def test_sparsity_makes_up_for_the_adapters_own_weights() -> None:
    recipe = make_plan(request(targets=("nonzero<=0.6x",)), DECODER, SPEED).recipe
    ratio, ranks = recipe.sparsify.ratio, recipe.adapter.ranks
    assert ratio is not None
    assert isinstance(ranks, list)
    left = 110e6 - ratio * 85e6 + max(ranks) * DECODER.per_rank
    assert 0.59 * 110e6 < left <= 0.6 * 110e6


def test_what_a_space_cannot_reach_is_said_beforehand() -> None:
    plan = make_plan(request(targets=("params<=0.2x",)), ENCODER, SPEED)
    assert any("will probably be missed" in note for note in plan.notes)
    plan = make_plan(request(targets=("nonzero<=0.2x",)), ENCODER, SPEED)
    assert any("will be missed" in note for note in plan.notes)


def test_a_time_limit_is_kept_with_some_to_spare_and_more_time_is_never_less_work() -> None:
    whole = make_plan(request(), ENCODER, SPEED)
    before: tuple[float, ...] | None = None
    for hours in (0.25, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 100):
        plan = make_plan(request(hours=hours), ENCODER, SPEED)
        assert plan.seconds <= 3600 * hours * (1 - SPARE)
        knobs = tuple(asdict(plan.knobs).values())
        assert before is None or all(a <= b for a, b in zip(before, knobs, strict=True))
        # No more is cut than must be: another hundredth of an epoch would be too much.
        assert plan.seconds > 0.97 * 3600 * hours * (1 - SPARE) or plan.knobs == whole.knobs
        before = knobs
    assert plan.knobs == whole.knobs


def test_a_plan_of_few_steps_warns() -> None:
    def warns(hours: float) -> bool:
        notes = make_plan(request(hours=hours), ENCODER, SPEED).notes
        return any("training steps teach neither" in note for note in notes)

    assert warns(0.1)
    assert not warns(1.0)


def test_epochs_go_first_then_examples_then_trials_then_validation() -> None:
    whole = Knobs(epochs=4.0, n_train=1000, trials=40, n_validation=400, n_report=500)
    least = Knobs(epochs=1.0, n_train=100, trials=4, n_validation=40, n_report=50)

    def seconds(knobs: Knobs) -> float:
        return knobs.epochs * knobs.n_train + knobs.trials * knobs.n_validation + 2 * knobs.n_report

    names = list(asdict(whole))
    budgets = {21_000: 0, 20_000: 1, 17_500: 2, 16_500: 3, 2_600: 4, 1_000: 5}
    for budget, n_cut in budgets.items():
        found = cut(whole, least, seconds, budget)
        assert seconds(found) <= budget
        changed = [name for name in names if getattr(found, name) != getattr(whole, name)]
        assert changed == names[: len(changed)]
        assert len(changed) == n_cut
        assert all(getattr(found, n) == getattr(least, n) for n in changed[:-1])


def test_less_than_the_least_is_refused_and_the_least_is_told() -> None:
    with pytest.raises(BadRecipe, match=r"the least that can be done takes about") as caught:
        make_plan(request(hours=0.01), ENCODER, SPEED)
    told = float(str(caught.value.try_).split()[1].rstrip(","))
    plan = make_plan(request(hours=told), ENCODER, SPEED)
    assert plan.knobs.epochs == LEAST.epochs


def test_what_the_user_sets_is_not_cut() -> None:
    mine = ("train.epochs=2", "search.trials=30", "importance.examples=400")
    plan = make_plan(request(hours=0.5, overrides=mine), ENCODER, SPEED)
    assert (plan.recipe.train.epochs, plan.recipe.search.trials) == (2, 30)
    assert plan.recipe.importance is not None
    assert plan.recipe.importance.examples == 400
    assert plan.recipe.data.n_train == plan.knobs.n_train < 67_000


def test_a_plan_survives_being_written() -> None:
    plan = make_plan(request(hours=0.5), ENCODER, SPEED)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())), "fit.json")
    assert again == plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("speed<=0.6x",)}, "speed"),
        ({"targets": ("macs>=0.6x",)}, "upper bound"),
        ({"targets": ("score>=0.9",)}, "--max-drop"),
        ({"targets": ("memory<=0.5x",)}, "cannot be searched for"),
        ({"targets": ()}, "no limit"),
        ({"max_drop": -1.0}, "--max-drop"),
        ({"max_drop": float("nan")}, "--max-drop"),
        ({"hours": 0.0}, "--hours"),
    ],
)
def test_requests_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecipe, match=message):
        request(**changes)


def test_a_target_on_what_the_model_lacks_is_refused() -> None:
    with pytest.raises(BadRecipe, match="has no decode_latency_ms; it has params"):
        make_plan(request(targets=("decode_latency<=0.5x",)), ENCODER, SPEED)


def latency(*samples: float) -> Latency:
    return Latency(samples, (), Conditions(), "cpu", 1)


def test_a_measured_miss_tightens_the_bound_by_as_much() -> None:
    asked = (parse_limit("latency<=0.6x"), parse_limit("params<=0.9x"))
    slow = {"full": latency(10, 20, 10), "fit": latency(7.5, 15, 7.5)}
    once = tightened(asked, asked, slow)
    assert once is not None
    assert once[0].number == pytest.approx(0.6 * 0.6 / 0.75)
    assert once[1] == asked[1]
    twice = tightened(once, asked, slow)
    assert twice is not None
    assert twice[0].number == pytest.approx(once[0].number * 0.6 / 0.75)
    assert tightened(once, asked, {"full": latency(10), "fit": latency(6.1)}) is None
    absolute = (parse_limit("latency<=5ms"),)
    found = tightened(absolute, absolute, {"full": latency(10), "fit": latency(10)})
    assert found is not None
    assert found[0].number == pytest.approx(2.5)


def test_costs_and_scores_are_held_against_their_targets() -> None:
    full = {"params": 100.0}
    row = reached_cost(parse_limit("params<=60%"), {"params": 61.0}, full, {})
    assert (row.bound, row.part, row.met) == (60.0, 0.61, False)
    assert reached_cost(parse_limit("params<=61"), {"params": 61.0}, full, {}).met
    dense = {"name": "dense+full", "score": 0.9}
    assert reached_score(dense, {"score": 0.89}, 1.0, True).met
    missed = reached_score(dense, {"score": 0.885}, 1.0, True)
    assert not missed.met
    assert missed.part == pytest.approx(1.5)
    # Perplexity: less is better, and a point is one.
    assert reached_score({"name": "d", "score": 12.0}, {"score": 12.9}, 1.0, False).met


def test_what_binds_is_told_from_the_trials() -> None:
    pairs = [(0.9, 90.0), (0.88, 70.0), (0.7, 50.0)]
    trials = [
        Trial(i, SubnetConfig({"d": i}), {"error": 1 - score, "params": cost}, {"score": score})
        for i, (score, cost) in enumerate(pairs)
    ]
    full = {"params": 100.0}
    said = " | ".join(closest(trials, {"params": 60.0}, 0.87, True, full))
    assert "best of 1 sub-networks scores 0.7000" in said
    assert "smallest params is 0.7x" in said
    said = " | ".join(closest(trials, {"params": 40.0}, 0.95, True, full))
    assert "the smallest has params 0.5x" in said
    assert "none of 3 sub-networks keeps the score" in said
    said = " | ".join(closest(trials, {"params": 80.0}, 0.87, True, full))
    assert said.startswith("on the validation examples 1 of 3 sub-networks keep all targets")


# -- whole fits, at toy size -----------------------------------------------------------------

QUICK = ["train.max_steps=4", "train.batch_size=8", "search.trials=5", "data.n_validation=8"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return the options of a fit of a tiny BERT on labelled sentences."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = tiny_tokenizer()
    classifier("bert", tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data = save_labelled(folder / "data")
    own = [f"task.options.report={data / 'report.jsonl'}", "importance.rounds=2"]
    return [
        *("--model", folder / "model", "--task", f"classification:{data / 'train.jsonl'}"),
        *(part for setting in [*QUICK, *own] for part in ("--set", setting)),
    ]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return the options of a fit of a tiny Llama on sums."""
    folder = tmp_path_factory.mktemp("decoder")
    model, data = save_tiny_model(folder / "model"), save_sums(folder / "data")
    own = [f"task.options.report={data / 'report.jsonl'}", "task.options.max_new_tokens=4"]
    return [
        *("--model", model, "--task", data / "train.jsonl"),
        *(part for setting in [*QUICK, *own] for part in ("--set", setting)),
    ]


def test_the_plan_is_told_as_a_recipe_and_nothing_is_written(
    encoder: list[Any], decoder: list[Any], tmp_path: Path
) -> None:
    for options, target, method in (
        (encoder, "macs<=0.6x", "eftnas"),
        (decoder, "macs<=0.7x", "lonas"),
        (decoder, "nonzero<=0.8x", "shears"),
    ):
        out = tmp_path / "run"
        told = cli("fit", *options, "--target", target, "--plan-only", "--json", "--out", out)
        plan = json.loads(told.stdout)
        assert plan["recipe"]["method"] == method
        assert plan["seconds"] == pytest.approx(
            sum(stage["seconds"] for stage in plan["stages"]), abs=0.1
        )
        assert not out.exists()
    told = cli("fit", *encoder, "--target", "macs<=0.6x", "--plan-only", "--out", out)
    text = told.stdout[told.stdout.index("method: eftnas") :]
    assert yaml.safe_load(text)["train"]["max_steps"] == 4


@pytest.fixture(scope="module")
def fitted(encoder: list[Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("runs") / "run"
    options = ["--target", "block_macs<=0.7x", "--max-drop", "100", "--out", out, "--json"]
    return out, json.loads(cli("fit", *encoder, *options).stdout)


def test_a_fit_ends_with_a_checkpoint_within_the_target(
    fitted: tuple[Path, Any], encoder: list[Any]
) -> None:
    out, found = fitted
    assert found["met"] is True
    smaller, tokenizer = load_model(
        found["checkpoint"], head="sequence-classification", num_labels=2
    )
    whole = AutoModelForSequenceClassification.from_pretrained(encoder[1])
    tokens = RunDirectory(out).recipe().evaluate.macs_length
    part = model_cost(smaller, tokens).block_macs / model_cost(whole, tokens).block_macs
    assert part <= 0.7
    assert found["targets"][0]["part"] == pytest.approx(part)
    assert tokenizer("a bucket")["input_ids"]
    card = (Path(found["checkpoint"]) / "README.md").read_text()
    assert "| fit |" in card.partition("## Figures")[2]
    rows = {row["name"]: row for row in read_json(out / "metrics.json")["rows"]}
    assert set(rows) == {"dense+full", "fit"}
    assert found["reference"]["score"] == rows["dense+full"]["score"]


def test_the_same_command_goes_on_with_the_kept_plan(
    fitted: tuple[Path, Any], encoder: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, found = fitted

    def refuse(*_: Any) -> None:
        raise AssertionError("measured anew")

    monkeypatch.setattr("elastune.fit_facts.measure_speed", refuse)
    monkeypatch.setattr("elastune.fit.find_target", refuse)
    options = ["--target", "block_macs<=0.7x", "--max-drop", "100", "--out", out, "--json"]
    before = (out / "fit.json").read_text()
    assert json.loads(cli("fit", *encoder, *options).stdout) == found
    assert (out / "fit.json").read_text() == before
    options[1] = "block_macs<=0.6x"
    refused = cli("fit", *encoder, *options, code=2)
    assert "another request; they differ in targets" in " ".join(refused.output.split())


def test_a_fit_killed_before_its_first_stage_goes_on(
    decoder: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    options = [*decoder, "--target", "macs<=0.8x", "--out", out]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("elastune.fit.make_base", killed)
        cli("fit", *options, code=130)
    plan = read_json(out / "fit.json")
    monkeypatch.setattr("elastune.fit_facts.measure_speed", killed)
    monkeypatch.setattr("elastune.fit.make_base", killed)
    cli("fit", *options, code=130)
    assert read_json(out / "fit.json") == plan


def test_a_target_out_of_reach_ends_with_the_closest_and_says_why(
    decoder: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ["--target", "params<=0.3x", "--max-drop", "0", "--out", out]
    told = " ".join(cli("fit", *decoder, *options).output.split())
    assert "missed: this is the closest it could get" in told
    assert "no sub-network is small enough: the smallest has params" in told
    model, _ = load_model(out / "subnets" / "fit")
    assert sum(p.numel() for p in model.parameters()) > 0


def test_a_sparse_fit_is_an_adapter_that_keeps_the_non_zeros(
    decoder: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ["--target", "nonzero<=0.8x", "--max-drop", "100", "--out", out, "--json"]
    found = json.loads(cli("fit", *decoder, *options).stdout)
    assert found["met"] is True
    assert 0.5 < found["targets"][0]["part"] <= 0.8
    assert found["fit"]["nonzero"] == found["targets"][0]["value"]
    assert list(Path(found["checkpoint"]).rglob("adapter_config.json"))


def test_latency_is_measured_side_by_side(encoder: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--target", "latency<=0.95x", "--max-drop", "100", "--out", out, "--json"]
    found = json.loads(cli("fit", *encoder, *options).stdout)
    row = found["targets"][0]
    assert row["name"] == "latency_ms"
    assert row["value"] > 0
    assert row["met"] == (row["part"] <= 0.95 * 1.02)


def test_other_folders_and_too_little_time_are_refused(decoder: list[Any], tmp_path: Path) -> None:
    other = tmp_path / "mine"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    target = ["--target", "macs<=0.8x"]
    refused = cli("fit", *decoder, *target, "--out", other, code=2)
    assert "not empty and not a run directory" in " ".join(refused.output.split())
    late = cli("fit", *decoder, *target, "--hours", "1e-9", "--out", tmp_path / "new", code=2)
    assert "the least that can be done" in " ".join(late.output.split())
    assert not (tmp_path / "new").exists()
