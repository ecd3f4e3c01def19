"""Estimated losses of single choices: slopes against autograd along the way to each choice."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import encoded, fill_adapters, tiny_variant

from elastune.block_choices import EffectiveChoices
from elastune.build_space import lora_space
from elastune.build_sparsity import sparsity_levels, sparsity_space
from elastune.build_structure import structure_space
from elastune.errors import BadData
from elastune.estimate_losses import ESTIMATED_KINDS, estimate_choice_losses
from elastune.heads import HEADS, SequenceClassification
from elastune.heads.sequence_classification import EncodedText
from elastune.models.families import architecture
from elastune.space import ElasticDim, SearchSpace, SubnetConfig
from elastune.supernet import SuperNetwork

CAUSAL = HEADS["causal-lm"]


def elastic(name: str, head: str = "causal-lm") -> SuperNetwork:
    """Return a super-network with a dim of every kind that has estimates."""
    model = tiny_variant(name, head)
    heads = [1.0, 0.0] if name in ("bloom", "falcon-alibi") else [1.0, 0.5]
    space = lora_space(model, (8, 4, 0))
    space += structure_space(model, ffn=[1.0, 0.75, 0.25], heads=heads, depth="all", round_to=4)
    sparsities = sparsity_space(model, (0.0, 0.5, 0.75))
    levels = sparsity_levels(model, sparsities, "magnitude")
    net = SuperNetwork(model, space + sparsities, levels=levels, alpha=16)
    fill_adapters(net)
    return net


def slopes_on_the_way(
    net: SuperNetwork,
    dims: list[ElasticDim],
    choice: int,
    batch: dict[str, Any],
    head: Any,
    at: SubnetConfig | None = None,
) -> torch.Tensor:
    """Return dL/dg at g = 0, token by token; outputs of a dim's modules are (1 - g) whole + g cut.

    Of several dims the gate is the same. Cut from ``at``, by default the largest sub-network.
    """
    at = at or net.space.largest()
    gate = torch.zeros(batch["input_ids"].numel(), requires_grad=True)

    def mixing(dim: ElasticDim) -> Any:
        single = SubnetConfig({**at, dims[0].name: choice})

        def mixed(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            there = getattr(module, "columns", None)
            with torch.no_grad(), net.active(single):
                x = scattered(args[0], there)
                columns = getattr(module, "columns", None)
                if columns:
                    x = torch.cat([x[..., start:stop] for start, stop in columns], dim=-1)
                cut = module.forward(x, *args[1:], **kwargs)
            cut = cut[0] if isinstance(cut, tuple) else cut
            new = y + gate.view(*y.shape[:-1], 1) * (cut - y).detach()
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return mixed

    with ExitStack() as stack:
        stack.enter_context(net.active(at))
        for dim in dims:
            for module in _concerned(net, dim):
                hook = module.register_forward_hook(mixing(dim), with_kwargs=True)
                stack.callback(hook.remove)
        with head.training(net.model):
            head.loss(net.model, batch).backward()
    assert gate.grad is not None
    return gate.grad


def scattered(x: torch.Tensor, columns: Any) -> torch.Tensor:
    """Return features at the places that they have in the whole input, zeros elsewhere."""
    if not columns:
        return x
    places = torch.cat([torch.arange(start, stop) for start, stop in columns])
    whole = x.new_zeros(*x.shape[:-1], 4096)
    whole[..., places] = x
    return whole


def _concerned(net: SuperNetwork, dim: ElasticDim) -> list[Any]:
    if dim.kind in ("rank", "density", "depth"):
        return [net.model.get_submodule(name) for name in dim.modules]
    role = "o" if dim.kind == "heads" else "down"
    block = next(b for b in net.blocks if any(m.startswith(f"{b.name}.") for m in dim.modules))
    return [block.module.get_submodule(architecture(net.model).roles[role])]


def change(slopes: torch.Tensor) -> float:
    """Return the second-order change that slopes of tokens stand for."""
    return float((slopes + slopes * slopes / 2).sum())


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "bloom", "falcon-alibi", "opt"])
def test_estimates_are_slopes_towards_each_choice_and_half_their_squares(name: str) -> None:
    net = elastic(name)
    items = encoded(9, 14, 6, n_prompt=2)
    found = estimate_choice_losses(net, [CAUSAL.collate(items)], CAUSAL)
    n_targets = sum(len(item.input_ids) - item.n_prompt for item in items)
    net.model.requires_grad_(False)
    for dim in net.space.dims:
        for choice in dim.choices:
            changes = [
                change(slopes_on_the_way(net, [dim], choice, CAUSAL.collate([item]), CAUSAL))
                for item in items
            ]
            expected = sum(changes) / n_targets
            assert found[dim.name][choice] == pytest.approx(expected, rel=2e-3, abs=1e-6)
    assert {dim.kind for dim in net.space.dims} == set(ESTIMATED_KINDS)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "bloom", "falcon-alibi", "opt"])
def test_at_a_sub_network_they_are_slopes_from_there_down(name: str) -> None:
    net = elastic(name)
    items = encoded(9, 14, 6, n_prompt=2)
    n_targets = sum(len(item.input_ids) - item.n_prompt for item in items)
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(3):
        at = net.space.sample(rng)
        found = estimate_choice_losses(net, [CAUSAL.collate(items)], CAUSAL, at=at)
        net.model.requires_grad_(False)
        gone = [d for d in net.space.dims if is_gone(net, d, at)]
        assert set(found) == {dim.name for dim in net.space.dims} - {dim.name for dim in gone}
        for dim in net.space.dims:
            if dim in gone:
                continue
            assert list(found[dim.name]) == [c for c in dim.choices if c <= at[dim.name]]
            for choice in found[dim.name]:
                changes = [
                    change(slopes_on_the_way(net, [dim], choice, CAUSAL.collate([i]), CAUSAL, at))
                    for i in items
                ]
                expected = sum(changes) / n_targets
                assert found[dim.name][choice] == pytest.approx(expected, rel=2e-3, abs=1e-6)
                seen += choice != at[dim.name]
    assert seen >= 10


def is_gone(net: SuperNetwork, dim: ElasticDim, at: SubnetConfig) -> bool:
    """Tell whether a dim is of parts that a sub-network leaves out."""
    effective = EffectiveChoices(net)
    lower = [SubnetConfig({**at, dim.name: choice}) for choice in dim.choices]
    return len({effective(config) for config in lower}) == 1


def test_padded_rows_give_what_single_rows_give() -> None:
    net = elastic("bert", "classifier")
    head = SequenceClassification()
    rows = [item.input_ids for item in encoded(5, 9, 12)]
    items = [EncodedText({"input_ids": row}, k % 2, 0) for k, row in enumerate(rows)]
    together = estimate_choice_losses(net, [head.collate(items)], head)
    apart = estimate_choice_losses(net, [head.collate([item]) for item in items], head)
    for name, losses in together.items():
        assert losses == pytest.approx(apart[name], rel=1e-3, abs=1e-6)
        assert losses[max(losses)] == 0
        assert len(set(losses.values())) == len(losses)


def test_one_dim_over_several_blocks_adds_their_slopes_before_it_squares_them() -> None:
    model = tiny_variant("llama", "causal-lm")
    apart = structure_space(model, ffn=[1.0, 0.5], round_to=4)
    names = [module for dim in apart.dims for module in dim.modules]
    shared = SearchSpace([ElasticDim("layers.ffn", "ffn", apart.dims[0].choices, tuple(names))])
    net = SuperNetwork(model, shared)
    items = encoded(9, 14)
    found = estimate_choice_losses(net, [CAUSAL.collate(items)], CAUSAL)
    n_targets = sum(len(item.input_ids) - item.n_prompt for item in items)
    choices = shared.dims[0].choices
    parts = [ElasticDim("layers.ffn", "ffn", choices, (f"{b.name}.mlp",)) for b in net.blocks]
    changes = [
        change(slopes_on_the_way(net, parts, choices[-1], CAUSAL.collate([item]), CAUSAL))
        for item in items
    ]
    assert found["layers.ffn"][choices[-1]] == pytest.approx(sum(changes) / n_targets, rel=2e-3)


def test_nothing_of_the_super_network_changes_and_no_batches_are_an_error() -> None:
    net = elastic("llama")
    before = {name: p.clone() for name, p in net.named_parameters()}
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    smallest = net.space.smallest()
    net.activate(smallest)
    estimate_choice_losses(net, [CAUSAL.collate(encoded(9, 5))], CAUSAL)
    assert net.config == smallest
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    for name, parameter in net.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    with pytest.raises(BadData, match="no calibration batches"):
        estimate_choice_losses(net, [], CAUSAL)
