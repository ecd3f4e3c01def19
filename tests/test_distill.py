"""Distillation: every head's loss against naive ones, and the gradients of a whole step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import tiny_tokenizer
from tiny_models import encoded, tiny_model, tiny_net
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from elastune.build_space import lora_space
from elastune.config import AdapterConfig, DistillConfig, TrainConfig
from elastune.errors import BadRecipe
from elastune.finetune import adapted, only_largest
from elastune.heads import HEADS
from elastune.losses import LazyLogits
from elastune.packing import packed_attention
from elastune.sampling import RandomSampler, SandwichSampler
from elastune.supernet import SuperNetwork
from elastune.tasks.base import ClassificationExample, QuestionAnsweringExample
from elastune.train import train
from elastune.whole_model import WholeModel

EXAMPLES = encoded(9, 12, 5, 14, 7, 11, 6, 8, n_prompt=3)
TEXTS = ["3 + 4", "Natalia sold clips to 48 of her friends", "A", "How many apples are there now?"]
LABELLED = [ClassificationExample(text, None, i % 3, text) for i, text in enumerate(TEXTS)]
ASKED = [
    QuestionAnsweringExample(str(i), "How many?", text, (text[:1],), (0,), text)
    for i, text in enumerate(TEXTS)
]
CAPPED = {"final_logit_softcapping": 5.0, "attn_implementation": "eager"}


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student), summed over rows, by the definition."""
    p = (teacher.detach() / temperature).softmax(-1)
    q = (student / temperature).softmax(-1)
    return temperature**2 * (p * (p.log() - q.log())).sum()


def logits_by_hand(model: Any, examples: Any = EXAMPLES) -> tuple[Tensor, Tensor]:
    """Stock forward passes, one example at a time: logits of completions, and their labels."""
    logits, labels = [], []
    for example in examples:
        ids = torch.tensor([example.input_ids])
        logits.append(model(input_ids=ids, use_cache=False).logits[0, example.n_prompt - 1 : -1])
        labels.append(ids[0, example.n_prompt :])
    return torch.cat(logits), torch.cat(labels)


def settings(**changes: Any) -> TrainConfig:
    plain = {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-2, "distill": "in_place"}
    return TrainConfig(**(plain | {"seed": 0} | changes))


def fit(net: Any, folder: Path, *, n_random: int = 1, **changes: Any) -> Any:
    sampler = SandwichSampler(net.space, 3, n_random)
    return train(net, EXAMPLES, sampler, settings(**changes), folder=folder)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def summed_gradients(net: SuperNetwork) -> dict[str, Tensor]:
    """Add up, as they come, the gradients of what is trained."""
    found = {n: torch.zeros(()) for n, p in net.model.named_parameters() if p.requires_grad}
    for name in found:
        net.model.get_parameter(name).register_hook(
            lambda grad, name=name: found.__setitem__(name, found[name] + grad)
        )
    return found


# --- heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("family", "changes", "trained"),
    [
        ("llama", {}, False),
        ("llama", {"tie_word_embeddings": True}, False),
        ("gemma2", CAPPED, False),
        ("llama", {}, True),
    ],
)
def test_a_language_model_learns_the_distributions_at_the_labelled_positions(
    family: str, changes: dict[str, Any], trained: bool, temperature: float
) -> None:
    head = HEADS["causal-lm"]
    net = tiny_net(tiny_model(family, **changes))
    if trained:
        net.model.lm_head.requires_grad_(True)
    other = tiny_model("llama", hidden_size=16, seed=5).requires_grad_(False)  # an outside teacher
    teacher_logits = logits_by_hand(other)[0]
    wanted = divergence(logits_by_hand(net.model)[0], teacher_logits, temperature)
    parameters = [p for p in net.model.parameters() if p.requires_grad]
    theirs = torch.autograd.grad(wanted, parameters)
    batch = head.collate(EXAMPLES)
    with packed_attention(other), torch.no_grad():
        teacher = head.outputs(other, batch)
    with packed_attention(net.model):
        outputs = head.outputs(net.model, batch)
        assert torch.equal(head.loss_of(outputs, batch), head.loss(net.model, batch))
        assert isinstance(outputs[0], LazyLogits) == (family == "llama" and not trained)
        loss = head.distillation_loss(outputs, teacher, batch, temperature)
        ours = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=0)
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their, atol=1e-4 * float(their.abs().max()), rtol=1e-3)


def encoder(auto: Any, seed: int, **changes: Any) -> Any:
    size = len(tiny_tokenizer())
    return tiny_model("bert", auto=auto, vocab_size=size, seed=seed, **changes)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_classifier_learns_its_teachers_classes(temperature: float) -> None:
    head = HEADS["sequence-classification"]
    student, teacher = (
        encoder(AutoModelForSequenceClassification, seed, num_labels=3) for seed in (0, 1)
    )
    batch = head.collate(head.encode(LABELLED, tiny_tokenizer(), 64))
    outputs = head.outputs(student, batch)
    torch.testing.assert_close(head.loss_of(outputs, batch), head.loss(student, batch))
    loss = head.distillation_loss(outputs, head.outputs(teacher, batch), batch, temperature)
    alone = torch.zeros(())
    for text in TEXTS:
        inputs = tiny_tokenizer()(text, return_tensors="pt")
        alone = alone + divergence(student(**inputs).logits, teacher(**inputs).logits, temperature)
    torch.testing.assert_close(loss, alone, rtol=1e-4, atol=0)


def test_a_regressor_learns_its_teachers_number() -> None:
    head = HEADS["sequence-classification"]
    student, teacher = (
        encoder(AutoModelForSequenceClassification, seed, num_labels=1) for seed in (0, 1)
    )
    batch = head.collate(head.encode(LABELLED, tiny_tokenizer(), 64))
    soft = head.outputs(teacher, batch)
    loss = head.distillation_loss(head.outputs(student, batch), soft, batch, 7.0)
    alone = torch.zeros(())
    for text in TEXTS:
        inputs = tiny_tokenizer()(text, return_tensors="pt")
        alone = alone + (student(**inputs).logits - teacher(**inputs).logits)[0, 0] ** 2
    torch.testing.assert_close(loss, alone, rtol=1e-4, atol=0)
    three = encoder(AutoModelForSequenceClassification, 2, num_labels=3)
    with pytest.raises(BadRecipe, match=r"the teacher tells 3 .* the student 1 at 4"):
        head.distillation_loss(soft, head.outputs(three, batch), batch, 1.0)


def test_spans_are_learnt_whatever_pads_the_batch() -> None:
    head = HEADS["question-answering"]
    student, teacher = (encoder(AutoModelForQuestionAnswering, seed) for seed in (0, 1))
    items = head.encode(ASKED, tiny_tokenizer(), 64)
    assert len({head.length(item) for item in items}) > 1
    batch = head.collate(items)
    loss = head.distillation_loss(
        head.outputs(student, batch), head.outputs(teacher, batch), batch, 2.0
    )
    loss.backward()
    total = torch.zeros(())
    for item in items:
        one = {k: v for k, v in head.collate([item]).items() if k != "labels"}
        own, target = student(**one), teacher(**one)
        total = total + divergence(own.start_logits, target.start_logits, 2.0) / 2
        total = total + divergence(own.end_logits, target.end_logits, 2.0) / 2
    torch.testing.assert_close(loss.detach(), total.detach(), rtol=1e-4, atol=0)
    weight = student.qa_outputs.weight
    (wanted,) = torch.autograd.grad(total, weight)
    atol = 1e-5 * float(wanted.abs().max())
    torch.testing.assert_close(weight.grad, wanted, atol=atol, rtol=1e-3)


# --- a step of in-place distillation ------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4), (3, 3)])
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.7, 3.0)])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_gradients_of_a_step_are_those_of_two_passes_by_hand(
    family: str,
    weight: float,
    temperature: float,
    batch_size: int,
    accumulation: int,
    tmp_path: Path,
) -> None:
    net = tiny_net(tiny_model(family, **(CAPPED if family == "gemma2" else {})))
    names = [name for name, p in net.model.named_parameters() if p.requires_grad]
    parameters = [net.model.get_parameter(name) for name in names]
    with net.active(net.space.largest()):
        taught, labels = logits_by_hand(net.model)
        first = nn.functional.cross_entropy(taught, labels) / 2
        wanted = torch.autograd.grad(first, parameters)
    with net.active(net.space.smallest()):
        logits, labels = logits_by_hand(net.model)
        soft = divergence(logits, taught, temperature) / len(labels)
        second = (weight * soft + (1 - weight) * nn.functional.cross_entropy(logits, labels)) / 2
        wanted = [
            a + b for a, b in zip(wanted, torch.autograd.grad(second, parameters), strict=True)
        ]
    found = summed_gradients(net)
    fit(
        net,
        tmp_path,
        n_random=0,
        max_steps=1,
        batch_size=batch_size,
        accumulation=accumulation,
        distill={"teacher": "largest", "weight": weight, "temperature": temperature},
    )
    for name, gradient in zip(names, wanted, strict=True):
        atol = 1e-4 * float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, atol=atol, rtol=1e-3)
    (row,) = rows(tmp_path)
    assert row["loss"] == pytest.approx(float((first + second).detach()), rel=1e-4)


def test_a_classifiers_head_and_adapters_learn_from_the_largest(tmp_path: Path) -> None:
    head, tokenizer = HEADS["sequence-classification"], tiny_tokenizer()
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    model = encoder(AutoModelForSequenceClassification, 0, **off)
    net = adapted(model, head.name, lora_space(model, (8, 4)), AdapterConfig(), 0)  # type: ignore[arg-type]
    with torch.no_grad():
        for number, adapter in enumerate(net.adapters.values()):
            torch.manual_seed(number)
            adapter.lora_B.normal_(std=0.1)
    items = head.encode(LABELLED, tokenizer, 64)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    batch = head.collate(items)
    labels = batch.pop("labels").long()
    with net.active(net.space.largest()):
        taught = model(**batch).logits
    with net.active(net.space.smallest()):
        loss = divergence(model(**batch).logits, taught, 2.0)
    loss = (loss + nn.functional.cross_entropy(taught, labels, reduction="sum")) / 8
    # Both passes read the same weights, so one backward pass through both is their sum.
    wanted = torch.autograd.grad(loss, list(parameters.values()))
    found = summed_gradients(net)
    sampler = SandwichSampler(net.space, 0, 0)
    distill = {"teacher": "largest", "temperature": 2.0}
    cfg = settings(max_steps=1, batch_size=4, distill=distill)
    train(net, items, sampler, cfg, folder=tmp_path, head=head)
    assert any(name.startswith("classifier") for name in parameters)
    for name, gradient in zip(parameters, wanted, strict=True):
        atol = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, atol=atol, rtol=1e-3)


def test_gradient_checkpointing_recomputes_what_each_sub_network_was(tmp_path: Path) -> None:
    states = []
    for checkpointing in (False, True):
        net = tiny_net(tiny_model("llama"))
        folder = tmp_path / str(checkpointing)
        fit(net, folder, gradient_checkpointing=checkpointing, learning_rate=1e-4, accumulation=2)
        states.append(torch.cat([t.flatten() for t in net.trained_state().values()]))
    start = torch.cat([t.flatten() for t in tiny_net(tiny_model("llama")).trained_state().values()])
    moved = states[0] - start
    assert float(moved.norm()) > 1e-3
    assert float((states[1] - states[0]).norm() / moved.norm()) < 1e-3


class Killed(Exception):
    """Stands for whatever ends a run."""


def test_a_killed_run_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> dict[str, Tensor]:
        net = tiny_net(tiny_model("llama"), dropout=0.2)
        fit(net, tmp_path / name, max_steps=5, accumulation=2, checkpoint_every=2)
        return load_file(tmp_path / name / "trained.safetensors")

    whole = run("whole")
    module = sys.modules["elastune.heads.causal_lm"]
    stock, calls = module.completion_logits, 0

    def breaking(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 23:  # 6 a step: in the fourth one
            raise Killed
        return stock(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(module, "completion_logits", breaking)
        with pytest.raises(Killed):
            run("broken")
    assert (tmp_path / "broken" / "checkpoint-2").exists()
    resumed = run("broken")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


# --- when there is nothing to learn from --------------------------------------------------------


def test_a_sampler_that_leaves_the_largest_out_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    net = tiny_net(tiny_model("llama"))
    with pytest.raises(
        BadRecipe, match=r"RandomSampler does not begin with it\ntry: train\.sampler"
    ):
        train(net, EXAMPLES, RandomSampler(net.space, 0), settings(), folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_space_of_one_network_trains_on_its_labels_as_ever(tmp_path: Path) -> None:
    states = []
    for distill in ("in_place", None):
        model = tiny_model("llama")
        net = SuperNetwork(model, only_largest(lora_space(model, (4, 2))), alpha=16)
        cfg = settings(distill=distill)
        train(net, EXAMPLES, RandomSampler(net.space, 0), cfg, folder=tmp_path / str(distill))
        states.append(net.trained_state())
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


# --- what trains --------------------------------------------------------------------------------


@pytest.mark.parametrize(("update", "rate"), [("adapter", 3e-3), ("full", 2e-4)])
def test_all_weights_train_at_the_full_learning_rate(
    update: str, rate: float, tmp_path: Path
) -> None:
    net = WholeModel(tiny_model("llama"))
    changes = {"learning_rate": 3e-3, "full_learning_rate": 2e-4, "schedule": "constant"}
    cfg = settings(update=update, distill=None, max_steps=2, warmup=0.0, **changes)
    before = {name: tensor.clone() for name, tensor in net.trained_state().items()}
    sampler = SandwichSampler(lora_space(net.model, (4, 2)), 0)
    train(net, EXAMPLES, sampler, cfg, folder=tmp_path)
    assert [row["lr"] for row in rows(tmp_path)] == [rate, rate]
    assert all(not torch.equal(before[name], t) for name, t in net.trained_state().items())


def test_every_weight_of_a_super_network_can_learn_from_the_largest(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    net = SuperNetwork(model, lora_space(model, (4, 2)), train_base=True)
    before = {name: tensor.clone() for name, tensor in net.trained_state().items()}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= before.keys()
    fit(net, tmp_path, update="full", full_learning_rate=1e-3)
    saved = load_file(tmp_path / "trained.safetensors")
    assert saved.keys() == before.keys()
    for name, tensor in net.trained_state().items():
        assert not torch.equal(tensor, before[name]), name
        assert torch.equal(tensor, saved[name])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, (None, 1.0, 1.0)),
        ("in_place", ("largest", 1.0, 1.0)),
        ("largest", ("largest", 1.0, 1.0)),
        ({"teacher": "in_place", "weight": 0.5}, ("largest", 0.5, 1.0)),
        ({"name": "in_place", "temperature": 4}, ("largest", 1.0, 4.0)),  # shorthand, then --set
        # From outside: as EFTNAS does, unless told otherwise.
        ("dense+full", ("dense+full", 0.9, 2.0)),
        ({"teacher": "some/checkpoint", "weight": 1.0}, ("some/checkpoint", 1.0, 2.0)),
        ({"name": "dense+full", "temperature": 4}, ("dense+full", 0.9, 4.0)),
    ],
)
def test_a_teacher_is_the_largest_or_one_from_outside_with_published_defaults(
    given: Any, meant: Any
) -> None:
    cfg = TrainConfig(distill=given).distill
    assert (cfg.teacher, cfg.weight, cfg.temperature) == meant
    assert cfg.has_outside_teacher == (meant[0] not in (None, "largest"))
    assert DistillConfig(**cfg.model_dump()) == cfg


@pytest.mark.parametrize(
    "given",
    [
        "",
        {"weight": 0.5},
        {"hidden": 1},
        {"teacher": "dense+full", "relations": -1},
        {"teacher": "largest", "weight": 0},
        {"temperature": 0},
        3,
    ],
)
def test_distillation_settings_that_mean_nothing_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="distill"):
        TrainConfig(distill=given)
