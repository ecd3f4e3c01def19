"""Slopes towards each choice, in any sub-network, against autograd on the way there."""

from __future__ import annotations

import gc
import weakref
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
from elastune.choice_slopes import ESTIMATED_KINDS, choice_changes
from elastune.heads import HEADS
from elastune.importance.passes import Passes, gradients_of
from elastune.models.families import architecture
from elastune.space import ElasticDim, SearchSpace, SubnetConfig
from elastune.supernet import SuperNetwork

CAUSAL = HEADS["causal-lm"]
FAMILIES = ["llama", "gpt2", "phi3", "bloom", "falcon-alibi", "opt"]


def elastic(
    name: str, head: str = "causal-lm", ffn: tuple[float, ...] = (1.0, 0.75, 0.25)
) -> SuperNetwork:
    """Return a super-network with a dim of every kind that has estimates."""
    model = tiny_variant(name, head)
    heads = [1.0, 0.0] if name in ("bloom", "falcon-alibi") else [1.0, 0.5]
    space = lora_space(model, (8, 4, 0))
    space += structure_space(model, ffn=[*ffn], heads=heads, depth="all", round_to=4)
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
    """Return dL/dg at g = 0, token by token; outputs of a dim's modules are (1 - g) own + g other.

    Of several dims the gate is the same. Own are those of ``at``, by default the largest
    sub-network. The wider of both runs, so that each has what it needs.
    """
    at = at or net.space.largest()
    other = SubnetConfig({**at, dims[0].name: choice})
    wide, narrow = (at, other) if choice <= at[dims[0].name] else (other, at)
    gate = torch.zeros(batch["input_ids"].numel(), requires_grad=True)

    def mixing(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        there = getattr(module, "columns", None)
        with net.active(narrow):
            x = scattered(args[0], there)
            columns = getattr(module, "columns", None)
            if columns:
                x = torch.cat([x[..., start:stop] for start, stop in columns], dim=-1)
            cut = module.forward(x, *args[1:], **kwargs)
        cut = cut[0] if isinstance(cut, tuple) else cut
        own, others = (y, cut) if wide is at else (cut, y)
        new = own + gate.view(*y.shape[:-1], 1) * (others - own).detach()
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with ExitStack() as stack:
        stack.enter_context(net.active(wide))
        for dim in dims:
            for module in _concerned(net, dim):
                hook = module.register_forward_hook(mixing, with_kwargs=True)
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


def changes_of(
    net: SuperNetwork, at: SubnetConfig, items: Any, head: Any = CAUSAL
) -> dict[str, list[float]]:
    """Return the estimated changes of the mean loss per target."""
    passes = Passes(net.model, [head.collate(items)], head, 0, None)
    with net.active(net.space.largest()), gradients_of(net.model, ()), torch.enable_grad():
        for batch in passes:
            found, n_targets = choice_changes(net, passes, batch, at)
    return {name: (change / n_targets).tolist() for name, change in found.items()}


@pytest.mark.parametrize(
    ("name", "ffn"),
    [*((name, (1.0, 0.75, 0.25)) for name in FAMILIES), ("phi3", (0.75, 0.5, 0.25))],
)
def test_changes_are_slopes_towards_each_choice_and_half_their_squares(
    name: str, ffn: tuple[float, ...]
) -> None:
    net = elastic(name, ffn=ffn)
    items = encoded(9, 14, 6, n_prompt=2)
    n_targets = sum(len(item.input_ids) - item.n_prompt for item in items)
    rng = np.random.default_rng(0)
    up = down = 0
    for at in (net.space.largest(), net.space.smallest(), *(net.space.sample(rng) for _ in "abc")):
        found = changes_of(net, at, items)
        net.model.requires_grad_(False)
        gone = {dim.name for dim in net.space.dims if is_gone(net, dim, at)}
        assert set(found) == {dim.name for dim in net.space.dims} - gone
        for dim in net.space.dims:
            if dim.name in gone:
                continue
            assert found[dim.name][dim.choices.index(at[dim.name])] == 0
            for choice, value in zip(dim.choices, found[dim.name], strict=True):
                changes = [
                    change(slopes_on_the_way(net, [dim], choice, CAUSAL.collate([i]), CAUSAL, at))
                    for i in items
                ]
                expected = sum(changes) / n_targets
                assert value == pytest.approx(expected, rel=3e-3, abs=2e-6)
                up += choice > at[dim.name]
                down += choice < at[dim.name]
    assert up >= 20
    assert down >= 20
    assert {dim.kind for dim in net.space.dims} == set(ESTIMATED_KINDS)


def test_a_batch_leaves_nothing_of_its_graph_behind() -> None:
    net = elastic("llama")
    outputs: list[weakref.ref[torch.Tensor]] = []
    for block in net.blocks:
        block.module.register_forward_hook(
            lambda module, args, output: outputs.append(weakref.ref(output))
        )
    gc.disable()
    try:
        changes_of(net, net.space.largest(), encoded(9, 14))
        assert outputs
        assert [ref for ref in outputs if ref() is not None] == []
    finally:
        gc.enable()


def is_gone(net: SuperNetwork, dim: ElasticDim, at: SubnetConfig) -> bool:
    """Tell whether a dim is of parts that a sub-network leaves out."""
    effective = EffectiveChoices(net)
    lower = [SubnetConfig({**at, dim.name: choice}) for choice in dim.choices]
    return len({effective(config) for config in lower}) == 1


def test_one_dim_over_several_blocks_adds_their_slopes_before_it_squares_them() -> None:
    model = tiny_variant("llama", "causal-lm")
    apart = structure_space(model, ffn=[1.0, 0.5], round_to=4)
    names = [module for dim in apart.dims for module in dim.modules]
    shared = SearchSpace([ElasticDim("layers.ffn", "ffn", apart.dims[0].choices, tuple(names))])
    net = SuperNetwork(model, shared)
    items = encoded(9, 14)
    found = changes_of(net, shared.largest(), items)
    n_targets = sum(len(item.input_ids) - item.n_prompt for item in items)
    choices = shared.dims[0].choices
    parts = [ElasticDim("layers.ffn", "ffn", choices, (f"{b.name}.mlp",)) for b in net.blocks]
    changes = [
        change(slopes_on_the_way(net, parts, choices[-1], CAUSAL.collate([item]), CAUSAL))
        for item in items
    ]
    assert found["layers.ffn"][-1] == pytest.approx(sum(changes) / n_targets, rel=2e-3)
