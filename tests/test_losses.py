"""Completion loss and distillation against torch's and scipy's over the stock model's logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from tiny_models import encoded, tiny_model, tiny_net
from torch import Tensor, nn

import elastune.losses
from elastune.data import Encoded, pack
from elastune.errors import BadRecipe
from elastune.losses import (
    LazyLogits,
    completion_logits,
    completion_loss,
    distillation_loss,
    labels_of,
    logits_loss,
)
from elastune.packing import packed_attention

EXAMPLES = encoded(9, 4, 17, n_prompt=3)
CAPPED = {"final_logit_softcapping": 5.0, "attn_implementation": "eager"}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3_text", {}),
    "gemma2": ("gemma2", CAPPED),
    "gemma3-capped": ("gemma3_text", CAPPED),
}


def build(name: str) -> Any:
    model_type, changes = MODELS[name]
    return tiny_model(model_type, **changes)


def loss_by_hand(model: Any, examples: list[Encoded]) -> tuple[Tensor, int]:
    """One stock forward pass per example, labels shifted by hand, torch's own cross entropy."""
    total, count = torch.zeros(()), 0
    for example in examples:
        logits = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0]
        for position in range(example.n_prompt, len(example.input_ids)):
            target = torch.tensor(example.input_ids[position])
            total = total + nn.functional.cross_entropy(logits[position - 1], target)
            count += 1
    return total, count


def trained_gradients(net: Any, loss: Tensor) -> dict[str, Tensor]:
    parameters = {n: p for n, p in net.model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("per_chunk", [None, 1, 5])
def test_value_and_adapter_gradients_are_those_of_torch_cross_entropy(
    name: str, per_chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = tiny_net(build(name))
    expected, count = loss_by_hand(net.model, EXAMPLES)
    wanted = trained_gradients(net, expected)
    if per_chunk is not None:  # labelled positions whose logits are held at once
        vocabulary = net.model.get_output_embeddings().weight.shape[0]
        monkeypatch.setattr(elastune.losses, "_CHUNK_ELEMENTS", per_chunk * vocabulary)
    with packed_attention(net.model):
        loss, n_labels = completion_loss(net.model, pack(EXAMPLES))
        gradients = trained_gradients(net, loss)
    assert n_labels == count == 6 + 1 + 14
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert len(gradients) == 2 * len(net.adapters)
    for parameter, theirs in wanted.items():
        assert theirs.any(), parameter
        atol = 1e-5 * float(theirs.abs().max())
        torch.testing.assert_close(gradients[parameter], theirs, atol=atol, rtol=1e-4)


def test_the_gradient_follows_what_the_loss_is_multiplied_by() -> None:
    net = tiny_net(build("llama"))
    with packed_attention(net.model):
        once = trained_gradients(net, completion_loss(net.model, pack(EXAMPLES))[0])
        half = trained_gradients(net, completion_loss(net.model, pack(EXAMPLES))[0] * 0.5)
    for name, gradient in once.items():
        torch.testing.assert_close(half[name], gradient * 0.5)


def test_a_head_with_a_bias_is_part_of_the_loss() -> None:
    model = build("llama")
    model.lm_head.bias = nn.Parameter(torch.randn(64))
    model.requires_grad_(False)
    expected, _ = loss_by_hand(model, EXAMPLES)
    with packed_attention(model):
        torch.testing.assert_close(completion_loss(model, pack(EXAMPLES))[0], expected)


def test_a_head_that_trains_gets_its_gradient() -> None:
    model = build("llama")
    wanted = torch.autograd.grad(loss_by_hand(model, EXAMPLES)[0], model.lm_head.weight)[0]
    with packed_attention(model):
        loss, _ = completion_loss(model, pack(EXAMPLES))
    found = torch.autograd.grad(loss, model.lm_head.weight)[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_the_loss_without_gradient_is_the_same_number() -> None:
    net = tiny_net(build("llama"))
    with packed_attention(net.model):
        loss, _ = completion_loss(net.model, pack(EXAMPLES))
        with torch.no_grad():
            alone, _ = completion_loss(net.model, pack(EXAMPLES))
    assert torch.equal(alone, loss.detach())


def test_half_precision_losses_are_summed_in_float32() -> None:
    model = build("llama")
    model.requires_grad_(False)
    expected, _ = loss_by_hand(model, EXAMPLES)
    half = model.bfloat16()
    with packed_attention(half):
        loss, _ = completion_loss(half, pack(EXAMPLES))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)


def test_logits_never_exist_for_positions_without_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    stock = nn.functional.linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[0] == 64:
            rows.append(x.reshape(-1, x.shape[-1]).shape[0])
        return stock(x, weight, bias)

    model = build("llama").requires_grad_(False)
    monkeypatch.setattr(nn.functional, "linear", spy)
    with packed_attention(model):
        _, n_labels = completion_loss(model, pack(EXAMPLES))
    assert rows == [n_labels]


# --- what a model says at the labelled positions ------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_completion_logits_are_the_stock_ones_where_there_is_a_label(name: str) -> None:
    model = build(name).requires_grad_(False)
    stock = [
        model(input_ids=torch.tensor([e.input_ids]), use_cache=False).logits[0, e.n_prompt - 1 : -1]
        for e in EXAMPLES
    ]
    with packed_attention(model):
        logits = completion_logits(model, pack(EXAMPLES))
        loss, _ = completion_loss(model, pack(EXAMPLES))
    capped = CAPPED.items() <= MODELS[name][1].items()
    assert isinstance(logits, Tensor if capped else LazyLogits)
    assert tuple(logits.shape) == (21, 64)
    torch.testing.assert_close(logits[:], torch.cat(stock), atol=1e-4, rtol=1e-4)
    completions = [i for e in EXAMPLES for i in e.input_ids[e.n_prompt :]]
    assert labels_of(pack(EXAMPLES)).tolist() == completions
    assert torch.equal(logits_loss(logits, labels_of(pack(EXAMPLES))), loss)


# --- distillation -------------------------------------------------------------------------------


def draw(*shape: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_distillation_is_scipys_entropy_of_the_softened_teacher_to_the_student(
    temperature: float,
) -> None:
    student, teacher = draw(7, 11, seed=0), draw(7, 11, seed=1)
    divergences = entropy(
        softmax(teacher.double().numpy() / temperature, axis=1),
        softmax(student.double().numpy() / temperature, axis=1),
        axis=1,
    )
    found = float(distillation_loss(student, teacher, temperature))
    assert found == pytest.approx(temperature**2 * np.sum(divergences), rel=1e-5)


def test_distillation_asks_for_the_teachers_distribution_and_for_nothing_where_it_is_met() -> None:
    teacher = draw(7, 11, seed=1)
    student = (teacher + 5).requires_grad_()  # the same distribution
    loss = distillation_loss(student, teacher, 2.0)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-4
    torch.testing.assert_close(student.grad, torch.zeros(7, 11), atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_of_whole_logits_is_autograds(temperature: float) -> None:
    teacher = draw(7, 11, seed=1).requires_grad_()
    student = draw(7, 11, seed=0).requires_grad_()
    wanted = nn.functional.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher.detach() / temperature).softmax(-1),
        reduction="sum",
    )
    (theirs,) = torch.autograd.grad(wanted * temperature**2 * 0.3, student)
    (distillation_loss(student, teacher, temperature) * 0.3).backward()
    torch.testing.assert_close(student.grad, theirs, atol=1e-5, rtol=1e-4)
    assert teacher.grad is None


@pytest.mark.parametrize("per_chunk", [None, 1, 5])
@pytest.mark.parametrize("lazy_teacher", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_of_a_frozen_head_chunk_by_chunk_is_that_of_whole_logits(
    per_chunk: int | None,
    lazy_teacher: bool,
    temperature: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if per_chunk is not None:
        monkeypatch.setattr(elastune.losses, "_CHUNK_ELEMENTS", 2 * per_chunk * 40)
    hidden = draw(13, 6, seed=2, scale=1.0).requires_grad_()
    weight, bias = draw(40, 6, seed=3, scale=1.0), draw(40, seed=4, scale=1.0)
    # Another model's hidden states may be wider; only the vocabulary is shared.
    other = LazyLogits(draw(13, 9, seed=5, scale=1.0), draw(40, 9, seed=6, scale=1.0), None)
    teacher = other if lazy_teacher else other[:]
    wanted = distillation_loss(nn.functional.linear(hidden, weight, bias), other[:], temperature)
    (theirs,) = torch.autograd.grad(wanted, hidden)
    loss = distillation_loss(LazyLogits(hidden, weight, bias), teacher, temperature)
    (ours,) = torch.autograd.grad(loss * 0.5, hidden)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours, theirs * 0.5, atol=1e-5, rtol=1e-4)


def test_neither_lazy_logits_are_ever_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    stock = nn.functional.linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows.append(len(x))
        return stock(x, weight, bias)

    hidden, weight = draw(13, 6, seed=2).requires_grad_(), draw(40, 6, seed=3)
    logits = LazyLogits(hidden, weight, None)
    assert not logits.detach().hidden.requires_grad
    monkeypatch.setattr(elastune.losses, "_CHUNK_ELEMENTS", 2 * 4 * 40)
    monkeypatch.setattr(nn.functional, "linear", spy)
    distillation_loss(logits, logits.detach()).backward()
    assert rows == [4, 4, 4, 4, 4, 4, 1, 1]


def test_places_that_neither_thinks_possible_add_nothing() -> None:
    student, teacher = draw(5, 8, seed=0).requires_grad_(), draw(5, 8, seed=1)
    padding = torch.zeros(5, 8, dtype=torch.bool)
    padding[:, 6:] = True
    loss = distillation_loss(
        student.masked_fill(padding, -torch.inf), teacher.masked_fill(padding, -torch.inf), 2.0
    )
    loss.backward()
    alone = student.detach()[:, :6].clone().requires_grad_()
    short = distillation_loss(alone, teacher[:, :6], 2.0)
    short.backward()
    torch.testing.assert_close(loss, short)
    assert student.grad is not None
    torch.testing.assert_close(student.grad[:, :6], alone.grad)
    assert not student.grad[:, 6:].any()


def test_half_precision_distillation_is_summed_in_float32() -> None:
    student, teacher = draw(50, 40, seed=0).bfloat16(), draw(50, 40, seed=1).bfloat16()
    loss = distillation_loss(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, distillation_loss(student.float(), teacher.float()))


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(BadRecipe, match=r"teacher tells 12 .* at 7 places, the student 11 at 7"):
        distillation_loss(draw(7, 11, seed=0), draw(7, 12, seed=1))
