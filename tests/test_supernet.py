"""The super-network: what is active, what trains, what is refused."""

from __future__ import annotations

import pytest
import torch
from tiny_models import logits_of, tiny_model, tiny_net, token_ids
from torch import nn

from elastune.build_space import lora_space
from elastune.elastic import ElasticLoRALinear
from elastune.errors import BadArtifact, InvalidSpace, InvalidSubnet
from elastune.space import ElasticDim, SearchSpace, SubnetConfig
from elastune.supernet import SuperNetwork

IDS = torch.tensor(token_ids(11, 11))


def test_unwrap_puts_the_very_modules_back() -> None:
    model = tiny_model("llama")
    before = {name: id(module) for name, module in model.named_modules()}
    net = tiny_net(model)
    assert any(isinstance(module, ElasticLoRALinear) for module in model.modules())
    assert net.unwrap() is model
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_only_the_adapters_train() -> None:
    net = tiny_net(tiny_model("llama"))
    trainable = {name for name, p in net.model.named_parameters() if p.requires_grad}
    assert trainable == set(net.trained_state())
    assert all(name.endswith(("lora_A", "lora_B")) for name in trainable)


def test_a_dim_sets_all_modules_that_share_it_and_no_other() -> None:
    net = tiny_net(tiny_model("llama"))
    config = SubnetConfig(dict(net.space.largest()) | {"layers.1.qkv": 2})
    net.activate(config)
    ranks = {name: adapter.active_rank for name, adapter in net.adapters.items()}
    small = {f"model.layers.1.self_attn.{role}_proj" for role in "qkv"}
    assert {name for name, rank in ranks.items() if rank == 2} == small
    assert {rank for name, rank in ranks.items() if name not in small} == {8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.qkv": 5}, "rank 5 is not a choice of layers.0.qkv .* nearest is 4"),
        ({"layers.0.qvk": 4}, "unknown dim 'layers.0.qvk' .did you mean 'layers.0.qkv'"),
        (None, "missing dim 'layers.1.down'"),
    ],
)
def test_a_refused_configuration_leaves_everything_as_it_was(
    change: dict[str, int] | None, message: str
) -> None:
    net = tiny_net(tiny_model("llama"))
    net.activate(net.space.heuristic())
    ranks = [adapter.active_rank for adapter in net.adapters.values()]
    choices = dict(net.space.smallest()) | (change or {})
    if change is None:
        del choices["layers.1.down"]
    with pytest.raises(InvalidSubnet, match=message):
        net.activate(SubnetConfig(choices))
    assert net.config == net.space.heuristic()
    assert [adapter.active_rank for adapter in net.adapters.values()] == ranks


def test_active_puts_the_former_configuration_back_after_an_error_too() -> None:
    net = tiny_net(tiny_model("llama"))
    net.activate(net.space.heuristic())
    with net.active(net.space.smallest()):
        assert {a.active_rank for a in net.adapters.values()} == {2}
    with pytest.raises(KeyError), net.active(net.space.smallest()):
        raise KeyError
    assert net.config == net.space.heuristic()
    assert {a.active_rank for a in net.adapters.values()} == {4}


def test_trained_weights_make_the_round_trip() -> None:
    first = tiny_net(tiny_model("llama"), seed=1)
    second = tiny_net(tiny_model("llama"), seed=2)
    assert not torch.equal(logits_of(first, IDS), logits_of(second, IDS))
    second.load_trained_state({n: t.clone() for n, t in first.trained_state().items()})
    assert torch.equal(logits_of(first, IDS), logits_of(second, IDS))


def test_weights_of_another_super_network_are_refused_whole() -> None:
    net = tiny_net(tiny_model("llama"))
    before = {name: tensor.clone() for name, tensor in net.trained_state().items()}
    other = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    name = "model.layers.1.mlp.down_proj.lora_A"
    other[name] = other[name][:4]
    with pytest.raises(
        BadArtifact, match=r"down_proj.lora_A has shape \(4, 48\), expected \(8, 48"
    ):
        net.load_trained_state(other)
    del other[name]
    with pytest.raises(BadArtifact, match=r"missing model\.layers\.1\.mlp\.down_proj\.lora_A"):
        net.load_trained_state(other)
    with pytest.raises(BadArtifact, match="unexpected extra"):
        net.load_trained_state(before | {"extra": torch.zeros(1)})
    assert all(torch.equal(net.trained_state()[n], tensor) for n, tensor in before.items())


def test_the_seed_alone_decides_the_first_weights() -> None:
    def weights(seed: int, disturbance: int) -> dict[str, torch.Tensor]:
        model = tiny_model("llama")
        torch.manual_seed(disturbance)
        return SuperNetwork(model, lora_space(model), seed=seed).trained_state()

    first, same, other = weights(1, 5), weights(1, 6), weights(2, 5)
    assert all(torch.equal(first[name], same[name]) for name in first)
    changed = [name for name in first if not torch.equal(first[name], other[name])]
    assert changed == [name for name in first if name.endswith("lora_A")]
    a = [first[f"model.layers.{i}.self_attn.q_proj.lora_A"] for i in range(2)]
    assert not torch.equal(a[0], a[1])


def test_one_scale_holds_for_dims_of_different_largest_rank() -> None:
    model = tiny_model("llama")
    net = SuperNetwork(model, lora_space(model, {"*": [8, 4], "*.down": [4, 2]}), alpha=16)
    for config in (net.space.largest(), net.space.smallest()):
        with net.active(config):
            scales = {adapter.extract()[2] for adapter in net.adapters.values()}
        assert scales == {16 / 8}


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (("model.layers.0.mlp.up",), "no module 'model.layers.0.mlp.up' .did you mean"),
        (("model.layers.0.mlp",), "model.layers.0.mlp is a LlamaMLP, not linear"),
        (("model.layers.0.mlp.up_proj",) * 2, "up_proj stands in two dims"),
    ],
)
def test_spaces_that_do_not_fit_leave_the_model_untouched(
    modules: tuple[str, ...], message: str
) -> None:
    model = tiny_model("llama")
    good = ElasticDim("good", "rank", (4, 2), ("model.layers.0.mlp.down_proj",))
    space = SearchSpace([good, ElasticDim("bad", "rank", (4, 2), modules)])
    with pytest.raises(InvalidSpace, match=message):
        SuperNetwork(model, space)
    assert type(model.get_submodule("model.layers.0.mlp.down_proj")) is nn.Linear


def test_a_dim_that_is_always_off_is_refused_before_the_model_is_touched() -> None:
    model = tiny_model("llama")
    good = ElasticDim("good", "rank", (4, 2), ("model.layers.0.mlp.down_proj",))
    off = ElasticDim("off", "rank", (0,), ("model.layers.0.mlp.up_proj",))
    with pytest.raises(InvalidSpace, match="off: "):
        SuperNetwork(model, SearchSpace([good, off]))
    assert type(model.get_submodule("model.layers.0.mlp.down_proj")) is nn.Linear
    assert any(p.requires_grad for p in model.parameters())


def test_a_model_that_is_a_super_network_already_is_refused() -> None:
    net = tiny_net(tiny_model("llama"))
    with pytest.raises(InvalidSpace, match="already"):
        SuperNetwork(net.model, net.space)
