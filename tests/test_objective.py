"""The objective: losses and scores as evaluation gives them, shared, reused, raced or not."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from test_heads import Labels, Numbers
from tiny_llama import tiny_llama, tiny_tokenizer
from tiny_models import AUTO, fill_adapters, tiny_model

from elastune.allocate import single_choice_losses
from elastune.build_space import lora_space
from elastune.build_structure import structure_space
from elastune.cost import CostModel
from elastune.errors import BadData, BadRecipe
from elastune.evaluate import evaluate, mean_loss
from elastune.heads import HEADS
from elastune.metrics import F1, PEARSON, TOKEN_F1
from elastune.objective import ValidationObjective, make_objective
from elastune.predict.classification import predict_labels
from elastune.search.base import Trial
from elastune.space import SubnetConfig
from elastune.supernet import SuperNetwork
from elastune.tasks.base import (
    ClassificationExample,
    Example,
    MultipleChoiceExample,
    QuestionAnsweringExample,
)
from elastune.tasks.custom import Custom

PLAIN = {"cache": False, "reuse": False, "race": False}
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "cache": PLAIN | {"cache": True},
    "prefix": PLAIN | {"reuse": True, "merge": False},
    "merging": PLAIN | {"reuse": True, "prefix_mb": 0},
    "rungs": PLAIN | {"race": True},
    "all": {},
}
N = 40


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def completions(n: int = N) -> list[Example]:
    texts = [(f"What is {i} + 4?" + " Hm." * (i % 5), f" It is {i + 4}.") for i in range(n)]
    return [Example(prompt, answer, str(i), str(i)) for i, (prompt, answer) in enumerate(texts)]


def choices(n: int = N) -> list[MultipleChoiceExample]:
    return [
        MultipleChoiceExample(f"{i} apples and {i}?", (" 7", f" {i}", " none"), i % 3, str(i))
        for i in range(n)
    ]


def texts(n: int = N) -> list[ClassificationExample]:
    pairs = [(f"text {i * 7 % 11}" + " and so on" * (i % 3), f"{i}") for i in range(n)]
    return [ClassificationExample(a, b, i % 3, f"{a}{b}") for i, (a, b) in enumerate(pairs)]


def questions(n: int = N) -> list[QuestionAnsweringExample]:
    return [
        QuestionAnsweringExample(
            str(i), "How many?", "There are " + "so very " * (3 * i % 20) + f"{i}.", (), (), str(i)
        )
        for i in range(n)
    ]


class Generated(Labels):
    """Texts that are generated, and right where they begin with a letter of the first half."""

    kind = "generation"
    max_new_tokens = 3

    def is_finished(self, text: str) -> bool:
        return False

    def extract(self, text: str) -> str:
        return text[:1]

    def is_correct(self, text: str, example: Any) -> bool:
        return text[:1].lower() < "m"


class Choices(Labels):
    kind = "multiple-choice"


class Ordered(Numbers):
    metrics = (PEARSON,)


class F1Labels(Labels):
    metrics = (F1,)


class Spans(Labels):
    kind = "question-answering"
    metrics = (TOKEN_F1,)
    max_length, stride, n_best, max_answer_length = 48, 8, 5, 10
    has_unanswerable = False
    no_answer_threshold = 0.0


#: kind of model -> its task, what is measured and the examples.
CASES: dict[str, tuple[str, Any, Any]] = {
    "tokens": ("causal-lm", Custom, completions),
    "generation": ("causal-lm", Generated, completions),
    "choices": ("causal-lm", Choices, choices),
    "classes": ("classifier", Labels, texts),
    "numbers": ("number", Ordered, texts),
    "f1": ("classifier", F1Labels, texts),
    "spans": ("reader", Spans, questions),
}
MEASURED = [
    *(("tokens", "loss"), ("choices", "loss"), ("classes", "loss"), ("numbers", "loss")),
    *(("spans", "loss"), ("choices", "score"), ("classes", "score"), ("numbers", "score")),
    *(("f1", "score"), ("spans", "score"), ("generation", "score")),
]


def made(case: str, tokenizer: Any) -> tuple[SuperNetwork, Any, list[Any]]:
    """Return a super-network, a task and its examples."""
    head, task, examples = CASES[case]
    if head == "causal-lm":
        model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    else:
        auto = AUTO["reader" if head == "reader" else "classifier"]
        labels = {} if head == "reader" else {"num_labels": 1 if head == "number" else 3}
        model = tiny_model(
            "bert", auto=auto, vocab_size=len(tokenizer), max_position_embeddings=256, **labels
        )
    space = lora_space(model, [8, 4, 0]) + structure_space(
        model, heads=[1.0, 0.5], ffn=[1.0, 0.5], depth=[1], round_to=8
    )
    net = SuperNetwork(model, space)
    fill_adapters(net)
    return net, task.__new__(task), examples()


def objective_of(
    net: SuperNetwork, tokenizer: Any, task: Any, examples: Any, kind: str = "loss", **options: Any
) -> ValidationObjective:
    count = CostModel(net, 16)
    options = {"batch_tokens": 512} | options
    return make_objective(net, tokenizer, task, examples, count, kind=kind, **options)[0]  # type: ignore[arg-type]


def expected_quality(
    net: SuperNetwork, config: SubnetConfig, tokenizer: Any, task: Any, examples: Any, kind: str
) -> float:
    """Measure a configuration as a user would, without an objective."""
    with net.active(config):
        if kind == "score":
            score = evaluate(net.model, tokenizer, task, examples).value
            return 1 - score if task.higher_is_better else score
        if task.head == "causal-lm":
            return mean_loss(net.model, tokenizer, examples).loss
        head = HEADS[task.head]
        batch = head.collate(head.encode(examples, tokenizer, getattr(task, "max_length", 512)))
        net.model.eval()
        return float(head.loss(net.model, batch).detach() / head.n_targets(batch))


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize(("case", "kind"), MEASURED)
def test_no_switch_changes_a_measurement(
    case: str, kind: str, switches: str, tokenizer: Any
) -> None:
    net, task, examples = made(case, tokenizer)
    objective = objective_of(net, tokenizer, task, examples, kind, **SWITCHES[switches])
    before = net.config
    count = CostModel(net, 16)
    largest = net.space.largest()
    last = SubnetConfig({**largest, "layers.1.ffn": 24})
    for config in (largest, last, net.space.heuristic(), net.space.smallest(), last):
        found = objective(config)
        wanted = expected_quality(net, config, tokenizer, task, examples, kind)
        assert found[objective.quality] == pytest.approx(wanted, rel=1e-5, nan_ok=True)
        if kind == "score":
            score = 1 - wanted if task.higher_is_better else wanted
            assert found["score"] == pytest.approx(score, rel=1e-5, abs=1e-12, nan_ok=True)
        counts = {name: float(value) for name, value in vars(count(config)).items()}
        assert {name: found[name] for name in counts} == counts
        assert next(iter(found)) == objective.quality
    assert net.config == before


@pytest.mark.parametrize(("case", "kind"), MEASURED)
def test_outcomes_are_those_of_each_example_alone(case: str, kind: str, tokenizer: Any) -> None:
    net, task, examples = made(case, tokenizer)
    config = net.space.heuristic()
    measured = objective_of(net, tokenizer, task, examples, kind).measure(config, [])
    if case == "f1" or (case == "numbers" and kind == "score"):
        assert measured.outcomes is None  # only all examples together have one
        return
    assert measured.outcomes is not None
    assert measured.outcomes.dtype == np.float32
    quality = next(iter(measured.values.values()))
    assert float(measured.outcomes.astype(float).mean()) == pytest.approx(quality, rel=1e-6)
    for i in (0, 17, N - 1):
        alone = objective_of(net, tokenizer, task, examples[i : i + 1], kind, **PLAIN)(config)
        own = alone[next(iter(measured.values))]
        if case in ("tokens", "choices", "spans") and kind == "loss":
            continue  # these weigh by tokens or windows, see below
        assert measured.outcomes[i] == pytest.approx(own, rel=1e-4)


def test_examples_of_more_tokens_weigh_more(tokenizer: Any) -> None:
    net, task, examples = made("tokens", tokenizer)
    config = net.space.heuristic()
    outcomes = objective_of(net, tokenizer, task, examples).measure(config, []).outcomes
    assert outcomes is not None
    tokens = [
        len(tokenizer(e.completion, add_special_tokens=False).input_ids) + 1 for e in examples
    ]
    net.activate(config)
    for i in (0, 17, N - 1):
        own = mean_loss(net.model, tokenizer, examples[i : i + 1])
        assert own.n == tokens[i]
        assert outcomes[i] == pytest.approx(own.loss * tokens[i] * N / sum(tokens), rel=1e-5)


# --- what is shared -------------------------------------------------------------------------------


def test_the_same_network_is_measured_once(tokenizer: Any, monkeypatch: Any) -> None:
    net, task, examples = made("tokens", tokenizer)
    objective = objective_of(net, tokenizer, task, examples)
    cut = SubnetConfig({**net.space.largest(), "layers.1.block": 0})
    same = SubnetConfig({**cut, "layers.1.qkv": 4, "layers.1.ffn": 24})
    first = objective.measure(cut, [])
    assert first.equivalents > 0
    monkeypatch.setattr(net, "activate", lambda config: pytest.fail("measured again"))
    for config in (cut, same):
        again = objective.measure(config, [])
        assert again.values["loss"] == first.values["loss"]
        assert again.equivalents == 0
        assert np.array_equal(again.outcomes, first.outcomes)  # type: ignore[arg-type]


def test_equivalents_are_the_work_that_was_done(tokenizer: Any) -> None:
    net, task, examples = made("tokens", tokenizer)
    largest = net.space.largest()
    plain = objective_of(net, tokenizer, task, examples, **PLAIN)
    assert plain.measure(largest, []).equivalents == 1
    macs = {c: CostModel(net, 16)(c).block_macs for c in (largest, net.space.smallest())}
    found = plain.measure(net.space.smallest(), []).equivalents
    assert found == pytest.approx(macs[net.space.smallest()] / macs[largest])
    shared = objective_of(net, tokenizer, task, examples)
    assert shared.measure(largest, []).equivalents == pytest.approx(1)
    last = SubnetConfig({**largest, "layers.1.qkv": 4})
    # One of two blocks, of a network with nearly the largest one's MACs.
    assert 0.45 < shared.measure(last, []).equivalents < 0.5


def test_a_sweep_of_single_choices_does_about_half_the_work(tokenizer: Any) -> None:
    model = tiny_model(
        "llama", vocab_size=len(tokenizer), max_position_embeddings=256, num_hidden_layers=6
    )
    net = SuperNetwork(model, structure_space(model, heads=[1, 0.5], ffn=[1, 0.5], round_to=8))
    task, examples = Custom.__new__(Custom), completions()
    found: dict[str, Any] = {}
    work: dict[str, float] = {}
    for name, switches in (("plain", PLAIN), ("all", {})):
        objective = objective_of(net, tokenizer, task, examples, **switches)
        made_: list[float] = []

        def loss(config: SubnetConfig, objective: Any = objective, made_: Any = made_) -> float:
            measured = objective.measure(config, [])
            made_.append(measured.equivalents)
            return float(measured.values["loss"])

        found[name] = single_choice_losses(loss, net.space)
        work[name] = sum(made_)
    assert work["all"] < 0.65 * work["plain"]
    for dim, by_choice in found["plain"].items():
        assert found["all"][dim] == pytest.approx(by_choice, abs=1e-5)


# --- races ----------------------------------------------------------------------------------------


def trial_of(
    objective: ValidationObjective, config: SubnetConfig, number: int = 0, **changes: Any
) -> Trial:
    found = objective.measure(config, [])
    values = {name: found.values[name] for name in (objective.quality, "params")}
    fields = {"values": values, "outcomes": found.outcomes} | changes
    return Trial(number, config, fields.pop("values"), **fields)


def spoilt(net: SuperNetwork) -> SubnetConfig:
    """Make the largest sub-network clearly worse than the smallest, which is cheaper."""
    for name, adapter in net.adapters.items():
        if name.endswith("down_proj"):
            adapter.lora_B.data.mul_(40)
    return net.space.largest()


@pytest.fixture
def race(tokenizer: Any) -> tuple[SuperNetwork, Any, list[Any]]:
    net, task, _ = made("tokens", tokenizer)
    spoilt(net)
    return net, task, completions(128)


def test_a_candidate_that_a_cheaper_one_beats_is_dropped_at_the_first_rung(
    race: Any, tokenizer: Any
) -> None:
    net, task, examples = race
    objective = objective_of(net, tokenizer, task, examples)
    assert objective.ends == (16, 32, 64, 128)
    rival = trial_of(objective, net.space.smallest())
    found = objective.measure(net.space.largest(), [rival])
    assert found.dropped
    assert found.outcomes is not None
    seen = np.isfinite(found.outcomes)
    assert seen.sum() == 16
    assert found.equivalents == pytest.approx(16 / 128)
    # The estimate is the rival's quality and the mean paired difference so far.
    assert rival.outcomes is not None
    difference = float((found.outcomes - rival.outcomes)[seen].mean())
    assert found.values["loss"] == pytest.approx(rival.values["loss"] + difference, rel=1e-5)
    whole = objective_of(net, tokenizer, task, examples, race=False)(net.space.largest())["loss"]
    assert found.values["loss"] == pytest.approx(whole, rel=0.2)
    assert set(found.values) == set(objective(net.space.smallest()))
    # Asked for in full it goes on where it was left.
    rest = objective.measure(net.space.largest(), [])
    assert not rest.dropped
    assert rest.equivalents == pytest.approx(112 / 128)
    assert rest.values["loss"] == pytest.approx(whole, rel=1e-6)


def test_whoever_is_dearer_unfinished_or_out_of_limits_is_no_rival(
    race: Any, tokenizer: Any
) -> None:
    net, task, examples = race
    largest, smallest = net.space.largest(), net.space.smallest()

    def drops(candidate: SubnetConfig = largest, **changes: Any) -> bool:
        objective = objective_of(net, tokenizer, task, examples)
        return objective.measure(candidate, [trial_of(objective, smallest, **changes)]).dropped

    assert drops()
    values = {"loss": 1.0, "params": 1e9}
    assert not drops(values=values)  # dearer
    assert not drops(values=values | {"params": float("nan")})
    assert not drops(dropped=True)
    assert not drops(violation=0.1)
    assert not drops(outcomes=None)
    assert not drops(outcomes=np.full(128, np.nan, dtype=np.float32))
    assert not drops(outcomes=np.zeros(64, dtype=np.float32))
    assert not drops(values={"loss": 1.0, "params": 1.0, "latency_ms": 1.0})  # unknown of it


def test_a_candidate_that_is_better_or_cheaper_sees_all_examples(race: Any, tokenizer: Any) -> None:
    net, task, examples = race
    objective = objective_of(net, tokenizer, task, examples)
    rivals = [trial_of(objective, net.space.largest())]
    found = objective.measure(net.space.smallest(), rivals)
    assert not found.dropped
    assert np.isfinite(found.outcomes).all()  # type: ignore[arg-type]


def test_the_race_can_be_switched_off(race: Any, tokenizer: Any) -> None:
    net, task, examples = race
    objective = objective_of(net, tokenizer, task, examples, race=False)
    rival = trial_of(objective, net.space.smallest())
    assert objective.ends == (128,)
    assert not objective.measure(net.space.largest(), [rival]).dropped
    strict = objective_of(net, tokenizer, task, examples, error_rate=1e-300)
    assert not strict.measure(net.space.largest(), [rival]).dropped


def test_broken_sub_networks_are_measured_as_nan_and_beat_nobody(race: Any, tokenizer: Any) -> None:
    net, task, examples = race
    objective = objective_of(net, tokenizer, task, examples)
    rival = trial_of(objective, net.space.smallest())
    for adapter in net.adapters.values():
        adapter.lora_B.data[:, 4:] = float("nan")
    found = objective.measure(net.space.largest(), [rival])
    assert not found.dropped
    assert np.isnan(found.values["loss"])


def test_right_and_wrong_answers_race_too(tokenizer: Any) -> None:
    net, task, _ = made("classes", tokenizer)
    examples = texts(256)
    # What the rival says is right, by definition.
    net.activate(net.space.smallest())
    plan = predict_labels(net.model, tokenizer, task, examples, batch_tokens=512, done=set())
    gold = {r["index"]: r["prediction"] for r in plan.records}
    examples = [
        ClassificationExample(e.text, e.text_pair, gold[i], e.key) for i, e in enumerate(examples)
    ]
    for adapter in net.adapters.values():
        adapter.lora_B.data.mul_(40)
    objective = objective_of(net, tokenizer, task, examples, "score")
    rival = trial_of(objective, net.space.smallest())
    assert rival.values["error"] == 0
    found = objective.measure(net.space.largest(), [rival])
    assert found.dropped
    assert found.values["score"] == pytest.approx(1 - found.values["error"])
    assert 0.1 < found.values["error"] <= 1


def test_costs_may_be_any_mapping(tokenizer: Any) -> None:
    net, task, examples = made("tokens", tokenizer)

    def cost(config: SubnetConfig) -> Mapping[str, float]:
        return {"latency_ms": float(sum(config.values()))}

    objective, values = make_objective(
        net, tokenizer, task, examples, cost, kind="loss", against="latency_ms"
    )
    config = net.space.smallest()
    found = objective.measure(config, [])
    assert values == ("loss", "latency_ms")
    assert set(found.values) == {"loss", "latency_ms"}
    assert found.equivalents == 1


def test_what_cannot_be_scored_is_refused_at_once(tokenizer: Any) -> None:
    net = SuperNetwork(model := tiny_llama(tokenizer), lora_space(model, [8, 4]))
    task = Custom.__new__(Custom)
    with pytest.raises(BadData, match="no completion token"):
        objective_of(net, tokenizer, task, [])
    with pytest.raises(BadData, match="no completion token"):
        objective_of(net, tokenizer, task, [Example("word " * 2000, "", "", "")])
    with pytest.raises(BadRecipe, match="ascend to 1"):
        objective_of(net, tokenizer, task, completions(), rungs=(0.5, 0.2))


def test_an_objective_leaves_the_model_as_it_was(race: Any, tokenizer: Any) -> None:
    net, task, examples = race
    before = copy.deepcopy(net.model.state_dict())
    objective = objective_of(net, tokenizer, task, examples)
    objective(net.space.largest())
    objective(net.space.smallest())
    after = net.model.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert "forward" not in {key for module in net.model.modules() for key in vars(module)}
