"""Shared work: hidden states used again, and merged adapters, against the plain way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import AUTO, fill_adapters, heads_of, stir, tiny_model, tiny_variant, token_ids
from torch import Tensor, nn

from elastune.block_choices import EffectiveChoices
from elastune.build_space import lora_space
from elastune.build_sparsity import sparsity_levels, sparsity_space
from elastune.build_structure import structure_space
from elastune.merged import MergedAdapters
from elastune.models.families import known_model_types
from elastune.prefix_reuse import PrefixReuse
from elastune.space import SubnetConfig
from elastune.supernet import SuperNetwork

#: All families that read text; layouts that differ in what their blocks are given or return.
FAMILIES = [name for name in known_model_types() if name != "vit"]
VARIANTS = ["deberta-convolution", "deberta-own-keys", "falcon-alibi", "falcon-old"]
HEADS = {"own", "classifier"}
INPUTS = {
    "input_ids": torch.tensor([*token_ids(11, seed=1), token_ids(8, seed=2)[0] + [0] * 3]),
    "attention_mask": torch.tensor([[1] * 11, [1] * 8 + [0] * 3]),
}


def deep_net(n_layers: int = 5, seed: int = 0) -> SuperNetwork:
    """Return a Llama whose ranks, heads, channels, densities and blocks are elastic."""
    model = tiny_model("llama", num_hidden_layers=n_layers, seed=seed)
    space = lora_space(model, (8, 4, 0)) + structure_space(
        model, heads=[1.0, 0.5, 0.0], ffn=[1.0, 0.5, 0.0], depth=range(n_layers), round_to=8
    )
    space = space + sparsity_space(model, (0.0, 0.5))
    net = SuperNetwork(model, space, alpha=16, levels=sparsity_levels(model, space, "magnitude"))
    fill_adapters(net)
    return net


@torch.inference_mode()
def output(net: SuperNetwork, inputs: dict[str, Tensor] = INPUTS, **options: Any) -> Tensor:
    """Return the first output, at tokens that are no padding."""
    out = net.model(**inputs, **options)[0]
    return out[inputs["attention_mask"].bool()] if out.dim() == 3 else out


def reused(net: SuperNetwork, prefix: PrefixReuse, config: SubnetConfig) -> Tensor:
    with net.active(config), prefix.using(config):
        return output(net)


def plain(net: SuperNetwork, config: SubnetConfig) -> Tensor:
    with net.active(config):
        return output(net)


def changed(net: SuperNetwork, block: int, base: SubnetConfig | None = None) -> SubnetConfig:
    """Return a configuration with smaller choices in one block, which stays there."""
    base = base or net.space.largest()
    choices = {
        dim.name: dim.choices[len(dim.choices) // 2]
        for dim in net.space.dims
        if dim.name.startswith(f"layers.{block}.") and dim.kind != "depth"
    }
    return SubnetConfig({**base, **choices})


@contextmanager
def blocks_run(net: SuperNetwork) -> Iterator[list[int]]:
    """Note the numbers of the blocks whose first norm runs."""
    found: list[int] = []
    hooks = [
        block.module.get_submodule(block.record.norms[0]).register_forward_hook(
            lambda *_, number=block.index: found.append(number)
        )
        for block in net.blocks
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


# --- hidden states used again ---------------------------------------------------------------------


CASES = [
    *((name, head) for name in FAMILIES for head in ("own", *heads_of(name)) if head in HEADS),
    *((name, head) for name in VARIANTS for head in sorted(HEADS)),
]


@pytest.mark.parametrize(("family", "head"), CASES)
def test_what_is_reused_gives_the_same_result_in_every_family(family: str, head: str) -> None:
    options = {"pad_token_id": 0} if head == "classifier" else {}
    if family in VARIANTS:
        model = tiny_variant(family, "base" if head == "own" else head, **options)
    else:
        model = tiny_model(family, auto=AUTO.get(head), **options)
    stir(model)
    cuts = structure_space(model, ffn=[1.0, 0.5], round_to=8)
    net = SuperNetwork(model, lora_space(model, (8, 4)) + cuts)
    fill_adapters(net)
    largest, other = net.space.largest(), changed(net, 1)
    prefix = PrefixReuse(net)
    for config in (largest, other, largest, changed(net, 0), other):
        assert torch.allclose(reused(net, prefix, config), plain(net, config), rtol=0, atol=1e-5)
    assert prefix.is_on
    assert prefix.take_share() < 1
    assert not torch.allclose(plain(net, largest), plain(net, other), atol=1e-4)


def test_only_blocks_from_the_first_difference_on_are_run() -> None:
    net = deep_net()
    prefix = PrefixReuse(net)
    largest = net.space.largest()
    reused(net, prefix, largest)
    reused(net, prefix, changed(net, 4))  # the first reuse is compared with the plain way
    for block in (4, 3, 1):
        config = changed(net, block, SubnetConfig({**largest, "layers.4.ffn": 0}))
        with blocks_run(net) as found:
            reused(net, prefix, config)
        assert found == list(range(block, 5))
    prefix.take_share()
    reused(net, prefix, changed(net, 2))
    assert prefix.take_share() == 3 / 5


def test_random_walks_give_the_plain_results() -> None:
    net = deep_net()
    prefix = PrefixReuse(net)
    rng = np.random.default_rng(0)
    config = net.space.heuristic()
    config = SubnetConfig({**config, **{f"layers.{i}.block": 1 for i in range(5)}})
    for _ in range(60):
        found = reused(net, prefix, config)
        expected = plain(net, config)
        assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        neighbours = net.space.neighbours(config)
        config = neighbours[rng.integers(len(neighbours))]
    assert prefix.take_share() < 0.7


def test_the_states_in_front_are_those_of_the_sub_network_with_the_longest_common_part() -> None:
    net = deep_net()
    prefix = PrefixReuse(net)
    first, second = changed(net, 1), changed(net, 3, changed(net, 1))
    for config in (net.space.largest(), first, second):
        reused(net, prefix, config)
    for base, block in ((second, 4), (first, 4), (net.space.largest(), 2)):
        with blocks_run(net) as found:
            reused(net, prefix, SubnetConfig({**base, f"layers.{block}.ffn": 0}))
        assert found == list(range(block, 5))


def test_other_inputs_reuse_nothing() -> None:
    net = deep_net()
    prefix = PrefixReuse(net)
    reused(net, prefix, net.space.largest())
    reused(net, prefix, changed(net, 4))
    others = [
        {**INPUTS, "input_ids": INPUTS["input_ids"].flip(1)},
        {**INPUTS, "attention_mask": torch.ones_like(INPUTS["attention_mask"])},
        {**INPUTS, "position_ids": torch.arange(1, 12)[None]},
    ]
    for inputs in others:
        config = changed(net, 3)
        with net.active(config), prefix.using(config), blocks_run(net) as found:
            given = output(net, inputs)
        assert found == [0, 1, 2, 3, 4]
        with net.active(config):
            assert torch.equal(given, output(net, inputs))


def test_memory_keeps_its_bound_and_states_are_thinned_before_they_are_lost() -> None:
    net = deep_net()
    per_block = 2 * 11 * 32 * 4
    prefix = PrefixReuse(net)
    # Room for two sub-networks at every second block: 2 and 4.
    prefix._room = 4 * per_block
    configs = [net.space.largest(), changed(net, 4), changed(net, 3), changed(net, 1)]
    for config in [*configs, *configs]:
        expected = plain(net, config)
        assert torch.allclose(reused(net, prefix, config), expected, rtol=0, atol=1e-5)
        assert 0 < prefix.n_bytes <= prefix._room
    reused(net, prefix, net.space.largest())
    with blocks_run(net) as found:
        reused(net, prefix, SubnetConfig({**net.space.largest(), "layers.3.ffn": 0}))
    assert found == [2, 3, 4]


def test_the_base_of_a_sweep_is_not_crowded_out() -> None:
    net = deep_net()
    prefix = PrefixReuse(net)
    prefix._room = 2 * 4 * 2 * 11 * 32 * 4  # two sub-networks at all four inner boundaries
    base = net.space.largest()
    reused(net, prefix, base)
    reused(net, prefix, changed(net, 4))
    prefix.take_share()
    for dim in net.space.dims:
        for choice in dim.choices[1:]:
            reused(net, prefix, SubnetConfig({**base, dim.name: choice}))
    assert prefix.take_share() < 0.65


def test_models_whose_blocks_hand_on_more_go_the_plain_way() -> None:
    net = deep_net()
    first, last = (net.blocks[i].module for i in (0, 4))
    seen: list[Tensor] = []

    def leave(module: nn.Module, args: Any, out: Tensor) -> None:
        seen[:] = [out]

    def take(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out + seen[0] * len(seen)

    # Inside of the block's own forward, so that a block passed over does not say what it said.
    first.mlp.register_forward_hook(leave)
    last.mlp.register_forward_hook(take)
    prefix = PrefixReuse(net)
    configs = [net.space.largest(), changed(net, 2), changed(net, 4), net.space.largest()]
    for config in configs:
        with net.active(config):
            expected = output(net)
        seen[:] = [torch.ones(1)]
        assert torch.equal(reused(net, prefix, config), expected)
    assert not prefix.is_on
    assert prefix.n_bytes == 0


def test_caches_gradients_training_and_inner_states_get_every_block() -> None:
    net = deep_net()
    prefix = PrefixReuse(net)
    config = changed(net, 4)
    reused(net, prefix, net.space.largest())
    reused(net, prefix, config)
    with net.active(config), prefix.using(config), blocks_run(net) as found:
        cached = net.model(**INPUTS, use_cache=True)
        net.model(**INPUTS)  # gradients are wanted
        with torch.inference_mode():
            inner = net.model(**INPUTS, use_cache=False, output_hidden_states=True)
            net.model.train()
            net.model(**INPUTS)
            net.model.eval()
    assert found == [0, 1, 2, 3, 4] * 4
    assert cached.past_key_values.get_seq_length() == 11
    assert len(inner.hidden_states) == 6
    with net.active(config):
        ids = INPUTS["input_ids"][:1]
        alone = net.model.generate(ids, max_new_tokens=6, do_sample=False)
        with prefix.using(config):
            assert torch.equal(net.model.generate(ids, max_new_tokens=6, do_sample=False), alone)


def test_nothing_of_it_stays_in_the_model() -> None:
    net = deep_net()
    before = {name: set(vars(module)) for name, module in net.model.named_modules()}
    prefix, merged = PrefixReuse(net), MergedAdapters(net.adapters.values())
    reused(net, prefix, net.space.largest())
    stops = pytest.raises(RuntimeError, match="stop")
    with stops, prefix.using(changed(net, 2)), merged.in_force():
        raise RuntimeError("stop")
    assert {name: set(vars(module)) for name, module in net.model.named_modules()} == before


def test_no_room_is_no_reuse() -> None:
    net = deep_net()
    prefix = PrefixReuse(net, 0)
    assert not prefix.is_on
    for config in (net.space.largest(), changed(net, 4)):
        assert torch.equal(reused(net, prefix, config), plain(net, config))
    assert prefix.take_share() == 1


# --- choices without effect -----------------------------------------------------------------------


def test_choices_in_what_is_left_out_have_no_effect() -> None:
    net = deep_net(3)
    effective = EffectiveChoices(net)
    base = net.space.largest()
    cases = {
        "layers.1.block": ["layers.1.heads", "layers.1.ffn", "layers.1.qkv", "layers.1.down"],
        "layers.1.heads": ["layers.1.qkv"],
        "layers.1.ffn": ["layers.1.up_gate", "layers.1.down"],
    }
    for switch, without in cases.items():
        cut = SubnetConfig({**base, switch: 0})
        for name in without:
            dim = next(d for d in net.space.dims if d.name == name)
            other = SubnetConfig({**cut, name: dim.choices[1]})
            assert effective(other) == effective(cut)
            assert torch.equal(plain(net, other), plain(net, cut))
            whole = SubnetConfig({**base, name: dim.choices[1]})
            assert effective(whole) != effective(base)
    assert effective(SubnetConfig({**base, "layers.1.block": 0})).present_blocks() == [
        True,
        False,
        True,
    ]
    assert all(effective(base).present_blocks())


def test_the_same_effective_choices_are_the_same_network() -> None:
    net = deep_net(3)
    effective = EffectiveChoices(net)
    rng = np.random.default_rng(0)
    same = other = 0
    for _ in range(12):
        config = net.space.sample(rng)
        expected = plain(net, config)
        for neighbour in net.space.neighbours(config):
            if effective(neighbour) == effective(config):
                assert torch.equal(plain(net, neighbour), expected)
                same += 1
            else:
                other += 1
    assert same > 50
    assert other > 50


def test_dims_outside_of_the_blocks_leave_nothing_in_common() -> None:
    model = tiny_model("bert", auto=AUTO["classifier"])
    net = SuperNetwork(
        model, lora_space(model, (8, 4)) + structure_space(model, embedding=[1.0, 0.5])
    )
    fill_adapters(net)
    table = next(dim for dim in net.space.dims if dim.kind == "embedding")
    base, effective = net.space.largest(), EffectiveChoices(net)
    other = SubnetConfig({**base, table.name: table.choices[1]})
    assert effective(base).common_blocks(effective(other)) == 0
    assert effective(other).common_blocks(effective(changed(net, 1, other))) == 1
    prefix = PrefixReuse(net)
    for config in (base, other, changed(net, 1, other), changed(net, 1)):
        assert torch.allclose(reused(net, prefix, config), plain(net, config), rtol=0, atol=1e-5)
    assert prefix.take_share() == 6 / 8


# --- merged adapters ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bert"])
def test_merged_adapters_give_the_same_result(family: str) -> None:
    model = tiny_model(family)
    space = lora_space(model, (8, 4, 0)) + structure_space(model, ffn=[1.0, 0.5, 0.0], round_to=8)
    space = space + sparsity_space(model, (0.0, 0.5))
    net = SuperNetwork(model, space, alpha=16, levels=sparsity_levels(model, space, "magnitude"))
    fill_adapters(net)
    weights = {name: p.clone() for name, p in net.model.named_parameters()}
    merged = MergedAdapters(net.adapters.values())
    rng = np.random.default_rng(0)
    long = {
        "input_ids": torch.tensor(token_ids(40, 40)),
        "attention_mask": torch.ones(2, 40).long(),
    }
    for config in [space.largest(), *(space.sample(rng) for _ in range(12)), space.largest()]:
        with net.active(config):
            expected = output(net, long)
            with merged.in_force():
                found = output(net, long)
        size = float(expected.abs().max())
        assert torch.allclose(found, expected, rtol=0, atol=1e-5 * size)
    assert merged._merged
    assert all(torch.equal(p, weights[name]) for name, p in net.model.named_parameters())


def test_adapters_are_merged_once_for_a_rank_and_anew_when_weights_change(monkeypatch: Any) -> None:
    net = deep_net(2)
    merged = MergedAdapters(net.adapters.values())
    calls: list[int] = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: calls.append(1) or addmm(*a, **k))
    long = {"input_ids": torch.tensor(token_ids(60)), "attention_mask": torch.ones(1, 60).long()}

    def measured(config: SubnetConfig) -> int:
        calls.clear()
        with net.active(config), merged.in_force():
            output(net, long)
        return len(calls)

    largest = net.space.largest()
    assert measured(largest) == len(net.adapters)
    assert measured(largest) == 0
    assert measured(SubnetConfig({**largest, "layers.1.qkv": 4})) == 3
    assert measured(SubnetConfig({**largest, "layers.1.qkv": 0})) == 0  # the base alone
    assert measured(SubnetConfig({**largest, "layers.1.qkv": 4})) == 0
    with torch.no_grad():
        net.adapters["model.layers.0.mlp.down_proj"].lora_B.mul_(2)
    assert measured(SubnetConfig({**largest, "layers.1.qkv": 4})) == 1
    with net.active(largest):
        expected = output(net, long)
        with merged.in_force():
            assert torch.allclose(output(net, long), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["few tokens", "half precision", "gradients", "hooks"])
def test_adapters_are_not_merged_where_it_would_not_pay_or_not_be_exact(case: str) -> None:
    net = deep_net(2)
    merged = MergedAdapters(net.adapters.values())
    length = 5 if case == "few tokens" else 60
    inputs = {"input_ids": torch.tensor(token_ids(length)), "attention_mask": torch.ones(1, length)}
    if case == "half precision":
        for adapter in net.adapters.values():
            adapter.base.to(torch.bfloat16)
        net.model.to(torch.bfloat16)
    if case == "hooks":
        for adapter in net.adapters.values():
            adapter.base.register_forward_hook(lambda *_: None)
    net.activate(net.space.largest())
    context = nullcontext() if case == "gradients" else torch.inference_mode()
    with context, merged.in_force():
        found = net.model(**inputs).logits.detach()
    with context:
        assert torch.equal(found, net.model(**inputs).logits.detach())
    assert not merged._merged
