"""Taylor scores of single weights against autograd on a plain copy of the model."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from tiny_models import encoded, inputs_of, stir, tiny_model, tiny_net, tiny_variant, token_ids
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from elastune.errors import BadData, UnsupportedModel
from elastune.heads import HEADS, SequenceClassification
from elastune.heads.sequence_classification import EncodedText
from elastune.importance import Importance, structure_scores, taylor_scores, units_from_weights

ROWS = torch.tensor(token_ids(*[12] * 8))


def products(model: Any, names: list[str]) -> dict[str, Tensor]:
    """Return w dL/dw of the mean next-token loss, (out, in), by autograd on a copy."""
    plain = deepcopy(model).requires_grad_(True)
    logits = plain(input_ids=ROWS).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1), ROWS[:, 1:].flatten()).backward()
    found = {}
    for name in names:
        weight = plain.get_parameter(name)
        product = (weight * weight.grad).detach()
        is_turned = isinstance(plain.get_submodule(name.removesuffix(".weight")), Conv1D)
        found[name] = product.T if is_turned else product
    return found


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gemma2", "opt", "falcon-multi-query"])
def test_scores_are_weight_times_slope_of_the_mean_loss_over_all_batches(name: str) -> None:
    model = stir(tiny_variant(name, "causal-lm"))
    scores = taylor_scores(model, ROWS, tokens_per_batch=30)
    for weight, product in products(model, list(scores)).items():
        assert scores[weight].dtype == torch.float32
        assert not scores[weight].requires_grad
        torch.testing.assert_close(scores[weight], product.abs(), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(("name", "count"), [("llama", 14), ("phi3", 8), ("gpt2", 8), ("bert", 12)])
def test_every_linear_layer_of_the_blocks_is_scored_and_no_other(name: str, count: int) -> None:
    model = tiny_variant(name, "classifier")
    batch = {"input_ids": ROWS, "labels": torch.tensor([0, 1] * 4)}
    scores = taylor_scores(model, [batch])
    assert len(scores) == count
    assert not any("score" in name or "classifier" in name or "embed" in name for name in scores)
    assert set(units_from_weights(model, scores)) == {
        f"layers.{index}.{part}" for index in (0, 1) for part in ("heads", "ffn")
    }


@pytest.mark.parametrize(
    ("name", "o", "down"),
    [
        ("llama", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"),
        ("gpt2", "transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"),
    ],
)
def test_the_signed_sum_over_a_units_columns_is_the_units_own_taylor_score(
    name: str, o: str, down: str
) -> None:
    model = tiny_variant(name, "causal-lm")
    scores = taylor_scores(model, ROWS)
    of_units = structure_scores(model, ROWS, "taylor")
    signs = products(model, list(scores))
    for part, path in (("heads", o), ("ffn", down)):
        units = of_units[f"layers.1.{part}"]
        signed = scores[f"{path}.weight"] * signs[f"{path}.weight"].sign()
        per_unit = signed.sum(0).view(len(units), -1).sum(1).abs()
        torch.testing.assert_close(per_unit, units, rtol=1e-3, atol=1e-6)


def test_scores_of_a_head_are_per_example_however_they_are_batched() -> None:
    model = tiny_variant("bert", "classifier")
    head = SequenceClassification()
    items = [
        EncodedText({"input_ids": ids}, number % 2, 0)
        for number, ids in enumerate(token_ids(5, 9, 7, 9))
    ]
    one = taylor_scores(model, [head.collate(items)], head=head)
    batches = [head.collate(items[:1]), head.collate(items[1:])]
    apart = taylor_scores(model, batches, head=head)
    batch = head.collate(items)
    plain = deepcopy(model)
    logits = plain(batch["input_ids"], batch["attention_mask"]).logits
    cross_entropy(logits, batch["labels"].long()).backward()
    for name, score in one.items():
        weight = plain.get_parameter(name)
        expected = (weight * weight.grad).abs().detach()
        torch.testing.assert_close(score, expected, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(apart[name], score, rtol=1e-3, atol=1e-6)


def test_packed_batches_of_a_language_model_have_scores() -> None:
    head = HEADS["causal-lm"]
    batch = head.collate(encoded(9, 12, 5))
    scores = taylor_scores(tiny_model("llama"), [batch], head=head)
    assert all(float(score.max()) > 0 for score in scores.values())


def test_gradients_are_summed_in_single_precision() -> None:
    model = tiny_model("llama").bfloat16()
    name = "model.layers.0.mlp.up_proj.weight"
    batch = {"input_ids": ROWS[:1], "labels": ROWS[:1]}
    once = taylor_scores(model, [batch])[name]
    # In bfloat16 a sum of 300 alike stops growing at 256.
    often = taylor_scores(model, [batch] * 300)[name]
    assert once.dtype == torch.float32
    torch.testing.assert_close(often / 300, once, rtol=1e-4, atol=0)


def test_scoring_leaves_weights_flags_and_gradients_as_they_were() -> None:
    model = tiny_model("llama").train()
    up = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    gate = model.model.layers[0].mlp.gate_proj.weight
    gate.grad = own = torch.ones_like(gate)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    asked = [p.requires_grad for p in model.parameters()]
    counted: list[int] = []
    scores = taylor_scores(model, ROWS, tokens_per_batch=24, progress=counted.append)
    assert "model.layers.0.mlp.up_proj.weight" in scores
    assert not up.requires_grad
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == asked
    assert gate.grad is own
    assert torch.equal(own, torch.ones_like(gate))
    assert all(p.grad is None for p in model.parameters() if p is not gate)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert counted == [1, 2, 3, 4]


def test_taylor_is_an_importance() -> None:
    importance: Importance = taylor_scores
    model = tiny_variant("vit", "image-classifier")
    batch = {**inputs_of(model), "labels": torch.tensor([0, 1])}
    assert all(float(score.max()) > 0 for score in importance(model, [batch]).values())


def test_what_cannot_be_scored_says_why() -> None:
    model = tiny_model("llama")
    with pytest.raises(BadData, match="no calibration batches"):
        taylor_scores(model, [])
    with pytest.raises(BadData, match="the loss does not depend on model"):
        taylor_scores(model, [{"input_ids": ROWS}], head=_Indifferent())
    nothing = {"input_ids": ROWS, "labels": torch.full_like(ROWS, -100)}
    with pytest.raises(BadData, match="the loss of batch 2 is nan"):
        taylor_scores(model, [{"input_ids": ROWS, "labels": ROWS}, nothing])
    assert all(p.grad is None for p in model.parameters())
    net = tiny_net(model)
    with pytest.raises(UnsupportedModel, match="score the plain model"):
        taylor_scores(net.model, ROWS)


class _Indifferent(SequenceClassification):
    """A head whose loss is the same whatever the model says."""

    def loss(self, model: Any, batch: dict[str, Any]) -> Tensor:
        return torch.ones((), requires_grad=True) * 2

    def n_targets(self, batch: dict[str, Any]) -> Tensor:
        return torch.tensor(1)
