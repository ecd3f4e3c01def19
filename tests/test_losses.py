"""The completion loss against torch's cross entropy over the stock model's logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import encoded, tiny_model, tiny_net
from torch import Tensor, nn

import elastune.losses
from elastune.data import Encoded, pack
from elastune.losses import completion_loss
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
