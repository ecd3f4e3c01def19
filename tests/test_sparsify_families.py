"""Calibrated sparsity in every family: fused projections, turned weights, tuples of blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import VARIANTS, inputs_of, outputs_of, tiny_model, tiny_variant, token_ids
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from elastune.errors import UnsupportedModel
from elastune.models.families import architecture, known_model_types
from elastune.sparsify import Method, Sparsity, sparsify_, sparsity_report

ROWS = torch.tensor(token_ids(*[16] * 6))
READERS = [n for n in (*known_model_types(), *VARIANTS) if n not in ("vit", "deberta-convolution")]


@torch.no_grad()
def inputs_by_path(model: Any, block: nn.Module, paths: list[str]) -> dict[str, Tensor]:
    """Run the whole model; return all that each layer of a block reads, ``(tokens, I)``."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    handles = [
        block.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen[path].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for path in paths
    ]
    model(input_ids=ROWS)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(parts) for path, parts in seen.items()}


@pytest.mark.parametrize("name", READERS)
def test_wanda_is_its_formula_in_every_family(name: str) -> None:
    model = tiny_variant(name, "base")
    expected = copy.deepcopy(model)
    record = architecture(expected)
    for block in record.blocks_of(expected):
        inputs = inputs_by_path(expected, block, list(record.roles.values()))
        for path, x in inputs.items():
            linear = block.get_submodule(path)
            weight: Any = linear.weight.data
            weight = weight.T if isinstance(linear, Conv1D) else weight  # rows are out features
            scores = weight.abs() * x.square().sum(dim=0).sqrt()
            smallest = scores.topk(weight.shape[1] // 2, dim=1, largest=False).indices
            weight.scatter_(1, smallest, 0)
    masks = sparsify_(model, "wanda", Sparsity.parse(0.5), ROWS)
    found = model.state_dict()
    for key, value in expected.state_dict().items():
        assert torch.equal(found[key], value), key
    for key, mask in masks.items():
        kept = found[key] != 0
        assert torch.equal(mask, kept.T if name == "gpt2" else kept)


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "bloom", "falcon", "deberta-v2"])
def test_every_out_feature_has_its_share_of_zeros(name: str, method: Method) -> None:
    model = tiny_variant(name, "base")
    sparsify_(model, method, Sparsity.parse(pattern="2:4"), ROWS)
    record = architecture(model)
    for path in record.linear_names(model):
        linear = model.get_submodule(path)
        weight: Any = linear.weight.T if name == "gpt2" else linear.weight
        groups = (weight == 0).reshape(weight.shape[0], -1, 4).sum(dim=2)
        assert (groups == 2).all(), path
    report = sparsity_report(model, method=method, sparsity=Sparsity.parse(pattern="2:4"))
    assert report["total"]["sparsity"] == 0.5


def test_models_that_see_are_pruned_by_magnitude_and_by_nothing_that_needs_text() -> None:
    model = tiny_model("vit")
    with pytest.raises(UnsupportedModel, match="'vit' read pixel_values") as caught:
        sparsify_(model, "wanda", Sparsity.parse(0.5), ROWS)
    assert "magnitude" in str(caught.value)
    before = outputs_of(model, inputs_of(model))
    sparsify_(model, "magnitude", Sparsity.parse(0.5))
    assert not torch.allclose(outputs_of(model, inputs_of(model)), before)


def test_a_change_between_two_blocks_is_noticed_and_refused() -> None:
    model = tiny_variant("deberta-convolution", "base")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedModel, match="between blocks 0 and 1"):
        sparsify_(model, "wanda", Sparsity.parse(0.5), ROWS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
