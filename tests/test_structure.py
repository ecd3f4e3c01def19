"""Elastic structure piece by piece: slices, spaces, refusals, what extraction leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import (
    VARIANTS,
    fill_adapters,
    inputs_of,
    outputs_of,
    stir,
    tiny_model,
    tiny_variant,
)
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from elastune.build_space import lora_space
from elastune.build_structure import structure_space
from elastune.elastic.absent import AbsentAttention, AbsentLinear
from elastune.elastic.linear import can_slice, make_sliceable, to_ranges, unmake_sliceable
from elastune.errors import InvalidSpace, InvalidSubnet
from elastune.models.blocks import blocks
from elastune.models.families import architecture, known_model_types
from elastune.space import ElasticDim, SearchSpace, SubnetConfig
from elastune.subnetwork import extract_model
from elastune.supernet import SuperNetwork

NAMES = [*known_model_types(), *VARIANTS]
WITH_HEADS = [n for n in NAMES if n.partition("-")[0] not in ("bloom", "mpt")]
# Its norms are over all heads at once, and so over fewer where fewer are left.
WITH_HEADS = [n for n in WITH_HEADS if n not in ("olmo2", "falcon-alibi")]


def largest_but(space: SearchSpace, **choices: int) -> SubnetConfig:
    """Return the largest sub-network but for dims whose name ends in one of the names given."""
    config = dict(space.largest())
    for name in config:
        config[name] = choices.get(name.rpartition(".")[2], config[name])
    return SubnetConfig(config)


# Slices


def test_ranges_are_the_runs_of_consecutive_numbers() -> None:
    assert to_ranges(torch.tensor([0, 1, 2, 6, 7, 9])) == ((0, 3), (6, 8), (9, 10))
    assert to_ranges(torch.tensor([], dtype=torch.long)) == ()
    assert to_ranges(torch.tensor([2, 1])) == ((2, 3), (1, 2))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_sliced_layer_multiplies_with_the_rows_and_columns_it_is_given(kind: str) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Linear(6, 8) if kind == "linear" else Conv1D(8, 6)
    nn.init.normal_(layer.bias)
    weight = layer.weight.detach().clone()
    weight = weight if kind == "linear" else weight.T
    bias = layer.bias.detach().clone()
    x = torch.randn(2, 3, 6)
    plain = layer(x)
    make_sliceable(layer)
    torch.testing.assert_close(layer(x), plain)
    rows, columns = [0, 1, 5, 6], [1, 2, 3]
    layer.set_active(rows=((0, 2), (5, 7)), columns=((1, 4),))
    expected = x[..., columns] @ weight[rows][:, columns].T + bias[rows]
    torch.testing.assert_close(layer(x[..., columns]), expected)
    layer.set_active(rows=((0, 2),), columns=())
    assert torch.equal(layer(x[..., :0]), torch.zeros(2, 3, 2))
    unmake_sliceable(layer)
    assert type(layer) is (nn.Linear if kind == "linear" else Conv1D)
    assert torch.equal(layer(x), plain)


def test_a_sliced_norm_is_the_norm_of_the_features_that_are_left() -> None:
    torch.manual_seed(0)
    norm, small = LlamaRMSNorm(8), LlamaRMSNorm(4)
    x = torch.randn(3, 4)
    before = norm.weight
    with torch.no_grad():
        norm.weight.add_(torch.randn(8))
        small.weight.copy_(norm.weight[:4])
    make_sliceable(norm)
    norm.set_active(rows=((0, 4),))
    torch.testing.assert_close(norm(x), small(x))
    assert norm.weight is before
    unmake_sliceable(norm)
    assert type(norm) is LlamaRMSNorm
    assert not can_slice(nn.LayerNorm(8))


# What is cut is what is meant: the same as leaving everything there and zeroing what flows on


@torch.no_grad()
def masked_outputs(model: Any, inputs: dict[str, Tensor], role: str, kept: int) -> Tensor:
    """Run the stock model with the inputs of every block's ``role`` zeroed from ``kept`` on."""
    path = architecture(model).roles[role]
    handles = [
        block.get_submodule(path).register_forward_pre_hook(
            lambda _, args: (args[0] * (torch.arange(args[0].shape[-1]) < kept),)
        )
        for block in architecture(model).blocks_of(model)
    ]
    found = outputs_of(model, inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", WITH_HEADS)
def test_fewer_heads_compute_what_masked_heads_compute(name: str) -> None:
    model = stir(tiny_variant(name, "base"))
    inputs = inputs_of(model)
    size = blocks(model)[0].head_dim
    whole = outputs_of(model, inputs)
    expected = masked_outputs(model, inputs, "o", 2 * size)
    space = structure_space(model, heads=[4, 2])
    net = SuperNetwork(model, space)
    net.activate(space.smallest())
    torch.testing.assert_close(outputs_of(net, inputs), expected, atol=1e-5, rtol=0)
    assert (expected - whole).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_fewer_channels_compute_what_masked_channels_compute(name: str) -> None:
    model = stir(tiny_variant(name, "base"))
    inputs = inputs_of(model)
    expected = masked_outputs(model, inputs, "down", 20)
    space = structure_space(model, ffn=[1.0, 20])
    net = SuperNetwork(model, space)
    net.activate(space.smallest())
    torch.testing.assert_close(outputs_of(net, inputs), expected, atol=1e-5, rtol=0)


def test_fewer_heads_are_normed_among_themselves_where_a_norm_is_over_all_of_them() -> None:
    model = stir(tiny_model("olmo2"))
    space = structure_space(model, heads=[4, 2])
    net = SuperNetwork(model, space)
    net.activate(space.smallest())
    norm = model.base_model.layers[0].self_attn.q_norm
    assert norm.weight.shape == (32,)
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    outputs_of(net, inputs_of(model))
    x, out = seen[:2]
    eps = model.config.rms_norm_eps
    expected = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight[:16]
    torch.testing.assert_close(out, expected.detach())


# Spaces


def test_dims_are_named_by_block_and_sizes_are_rounded() -> None:
    model = tiny_model("llama")
    space = structure_space(
        model, ffn=[0.5, 1.0, 0.3, 0], heads=[1.0, 0.3, 0], depth="all", round_to=8
    )
    found = {dim.name: (dim.kind, dim.choices) for dim in space.dims}
    assert found == {
        "layers.0.heads": ("heads", (4, 2, 0)),  # 1.2 heads, rounded up to a key/value group
        "layers.0.ffn": ("ffn", (48, 24, 16, 0)),
        "layers.0.block": ("depth", (1, 0)),
        "layers.1.heads": ("heads", (4, 2, 0)),
        "layers.1.ffn": ("ffn", (48, 24, 16, 0)),
        "layers.1.block": ("depth", (1, 0)),
    }
    assert space.dims[1].modules == tuple(
        f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
    )


def test_patterns_choose_blocks_and_the_last_that_matches_wins() -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    space = structure_space(
        model, ffn={"*": [48, 32], "layers.2.*": [48], "layers.0.*": [48, 16]}, depth=[1]
    )
    assert {dim.name: dim.choices for dim in space.dims} == {
        "layers.0.ffn": (48, 16),
        "layers.1.ffn": (48, 32),
        "layers.1.block": (1, 0),
    }


def test_shared_dims_cut_all_blocks_alike() -> None:
    model = tiny_model("llama")
    space = structure_space(model, ffn=[48, 16], heads=[4, 2], shared=True)
    assert [dim.name for dim in space.dims] == ["layers.ffn", "layers.heads"]
    net = SuperNetwork(model, space)
    assert net.shapes(space.smallest()) == [(2, 1, 16)] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing of the structure is elastic"),
        ({"ffn": [1.0]}, "nothing of the structure is elastic"),
        ({"ffn": [64]}, "has 48 channels, not 64"),
        ({"ffn": [-1]}, "cannot be negative"),
        ({"ffn": [2.5]}, "neither a part of the full size"),
        ({"ffn": []}, "no sizes given"),
        ({"ffn": [0.5], "round_to": 0}, "round_to must be at least 1"),
        ({"heads": [4, 3]}, "every key/value head serves 2 query heads"),
        ({"ffn": {"layers.7.ffn": [0.5]}}, "matches no dim"),
        ({"depth": [2]}, "there is no block"),
        ({"depth": "some"}, "depth is 'all' or a list"),
    ],
)
def test_spaces_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpace, match=message):
        structure_space(tiny_model("llama"), **options)


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon-alibi"])
def test_heads_with_slopes_go_all_or_none(name: str) -> None:
    model = tiny_variant(name, "base")
    with pytest.raises(InvalidSpace, match="ALiBi"):
        structure_space(model, heads=[4, 2])
    assert structure_space(model, heads=[4, 0]).dims[0].choices == (4, 0)


def test_blocks_that_must_stay_are_passed_over_or_refused() -> None:
    model = tiny_variant("deberta-convolution", "base")
    space = structure_space(model, depth="all")
    assert [dim.name for dim in space.dims] == ["layers.1.block"]
    with pytest.raises(InvalidSpace, match="convolution follows its first block"):
        structure_space(model, depth=[0, 1])
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(InvalidSpace, match="scaled by the number of the block"):
        structure_space(model, depth="all")


def test_a_weight_that_cannot_be_cut_is_refused_before_any_is_touched() -> None:
    model = tiny_model("llama")
    space = structure_space(model, ffn=[1.0, 0.5], round_to=8)
    packed = nn.Module()
    packed.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    packed.in_features, packed.out_features = 32, 48
    model.model.layers[1].mlp.up_proj = packed
    before = [type(module) for module in model.modules()]
    with pytest.raises(InvalidSpace, match=r"layers\.1\.ffn: .*up_proj is a Module"):
        SuperNetwork(model, space)
    assert [type(module) for module in model.modules()] == before


def test_a_refused_space_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    before = {name: type(module) for name, module in model.named_modules()}
    dim = ElasticDim("a", "heads", (4, 2), ("model.layers.0.self_attn.q_proj",))
    twice = SearchSpace([dim, ElasticDim("b", "heads", (4, 2), dim.modules)])
    with pytest.raises(InvalidSpace, match="stands in two heads dims: a, b"):
        SuperNetwork(model, twice)
    outside = SearchSpace([ElasticDim("a", "ffn", (48, 16), ("lm_head",))])
    with pytest.raises(InvalidSpace, match="is in no block of the model"):
        SuperNetwork(model, outside)
    assert {name: type(module) for name, module in model.named_modules()} == before


# Adapters of fused projections


@pytest.mark.parametrize(
    "targets", [("q", "k", "v", "up", "gate"), ("q", "up"), ("qkv", "gate_up")]
)
def test_targets_mean_the_fused_projection_where_there_is_one(targets: tuple[str, ...]) -> None:
    space = lora_space(tiny_model("phi3"), [4, 2], targets=targets)
    assert [(dim.name, dim.modules) for dim in space.dims[:2]] == [
        ("layers.0.qkv", ("model.layers.0.self_attn.qkv_proj",)),
        ("layers.0.up_gate", ("model.layers.0.mlp.gate_up_proj",)),
    ]
    assert len(space) == 4


def test_groups_that_split_a_fused_projection_are_refused() -> None:
    groups = {"query": ("q",), "others": ("k", "v")}
    with pytest.raises(InvalidSpace, match=r"qkv stands in more than one group.*holds q, k, v"):
        lora_space(tiny_model("gpt2"), [4, 2], targets=("q", "k", "v"), groups=groups)
    assert len(lora_space(tiny_model("llama"), [4, 2], targets=("q", "k"), groups=groups)) == 4


def test_an_unknown_target_is_told_what_there_is() -> None:
    with pytest.raises(InvalidSpace, match=r"'qvk' \(did you mean 'qkv'\?\).*down, gate, k, o, q"):
        lora_space(tiny_model("gpt2"), [4, 2], targets=("qvk",))


# Extracted models


def test_an_extracted_model_holds_its_own_weights_alone() -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    space = structure_space(model, ffn=[48, 16, 0], heads=[4, 2, 0], depth="all", round_to=8)
    net = SuperNetwork(model, space)
    before = copy.deepcopy(model.state_dict())
    config = SubnetConfig(
        dict(space.largest()) | {"layers.0.block": 0, "layers.1.ffn": 16, "layers.2.heads": 0}
    )
    sub = extract_model(net, config)
    assert sub.shapes == ((4, 2, 16), (0, 0, 48))
    assert sub.kept_blocks == (1, 2)
    assert sub.model.config.num_hidden_layers == 2
    first, second = sub.model.base_model.layers
    assert first.mlp.up_proj.weight.shape == (16, 32)
    assert (first.mlp.up_proj.out_features, first.mlp.down_proj.in_features) == (16, 16)
    assert isinstance(second.self_attn, AbsentAttention)
    assert not list(second.self_attn.parameters())
    with torch.no_grad():
        for parameter in sub.model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InvalidSubnet, match="every block of this sub-network is left out"):
        extract_model(net, largest_but(space, block=0))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_sub_network_with_absent_halves_can_be_cut_again(family: str) -> None:
    model = tiny_model(family, num_hidden_layers=3)
    net = SuperNetwork(model, structure_space(model, ffn=[1.0, 0], heads=[1.0, 0]))
    choices = dict(net.space.largest()) | {"layers.0.heads": 0, "layers.1.ffn": 0}
    small = extract_model(net, SubnetConfig(choices)).model

    again = SuperNetwork(small, structure_space(small, ffn={"layers.2.*": [1.0, 0.5]}, round_to=8))
    again.activate(again.space.smallest())
    ids = torch.arange(3, 13)[None]
    smaller = extract_model(again, again.space.smallest()).model
    with torch.no_grad():
        assert torch.allclose(smaller(input_ids=ids)[0], again(input_ids=ids)[0], atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "deberta-v2"])
def test_a_model_with_absent_halves_is_read_and_adapted_like_any_other(name: str) -> None:
    model = tiny_variant(name, "base")
    space = structure_space(model, ffn=[48, 16, 0], heads=[4, 2, 0])
    net = SuperNetwork(model, space)
    config = SubnetConfig(dict(space.largest()) | {"layers.0.heads": 0, "layers.1.ffn": 0})
    sub = extract_model(net, config)
    assert tuple(block.shape for block in blocks(sub.model)) == sub.shapes
    record = architecture(sub.model)
    left = record.linear_names(sub.model)
    assert left
    assert not [n for n in left if isinstance(sub.model.get_submodule(n), AbsentLinear)]
    attention = [record.roles[role] for role in blocks(sub.model)[0].roles_of("heads")]
    assert not [n for n in left for path in attention if n.endswith(f"0.{path}")]

    inputs = inputs_of(sub.model)
    before = outputs_of(sub.model, inputs)
    adapted = SuperNetwork(sub.model, lora_space(sub.model, [4, 2]))
    assert torch.equal(outputs_of(adapted, inputs), before)
    assert set(adapted.adapters) <= set(left)
    fill_adapters(adapted)
    assert not torch.allclose(outputs_of(adapted, inputs), before)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("gemma2", {"layer_types": ["full_attention"] + ["sliding_attention"] * 3}),
        ("deberta-v2", {"num_hidden_layers": 2}),
        ("gpt2", {}),
        ("falcon", {}),
        ("vit", {}),
    ],
)
def test_fewer_blocks_are_a_stock_model_with_a_shorter_configuration(
    model_type: str, changes: dict[str, Any]
) -> None:
    window = {"sliding_window": 4} if "gemma" in model_type else {}
    model = tiny_model(model_type, **({"num_hidden_layers": 4} | window | changes))
    space = structure_space(model, depth=[0])
    net = SuperNetwork(model, space)
    sub = extract_model(net, space.smallest())
    config = type(sub.model.config).from_dict(sub.model.config.to_dict())
    stock = type(sub.model)(config).eval()
    stock.load_state_dict(sub.model.state_dict(), strict=True)
    inputs = inputs_of(stock)
    torch.testing.assert_close(outputs_of(stock, inputs), outputs_of(sub.model, inputs))
    net.activate(space.smallest())
    torch.testing.assert_close(outputs_of(stock, inputs), outputs_of(net, inputs))


# Gradients


NO_DROPOUT = {"gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}}


def gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradients of a language model's loss, of the parameters that got one."""
    model.zero_grad()
    ids = inputs_of(model)["input_ids"]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "falcon-old", "gemma3_text"])
def test_gradients_are_those_of_the_extracted_model_with_and_without_checkpointing(
    name: str,
) -> None:
    changes = NO_DROPOUT.get(name, {})
    model = stir(tiny_variant(name, "causal-lm", num_hidden_layers=3, **changes)).train()
    heads = [4, 0] if blocks(model)[0].fixed_heads else [4, 2, 0]
    space = structure_space(model, ffn=[1.0, 0.5, 0], heads=heads, depth="all", round_to=4)
    net = SuperNetwork(model, space, train_base=True)
    half = next(dim for dim in space.dims if dim.name == "layers.0.ffn").choices[1]
    cuts = {"layers.0.heads": heads[-2], "layers.0.ffn": half, "layers.1.block": 0}
    cuts |= {"layers.2.heads": 0}
    config = SubnetConfig(dict(space.largest()) | cuts)
    net.activate(config)

    found = gradients(model)
    expected = gradients(extract_model(net, config).model.train())
    of_block_2 = {path for path in expected if ".1." in path}
    assert of_block_2
    for path, gradient in expected.items():
        mine = found[path.replace(".1.", ".2.") if path in of_block_2 else path]
        # What is cut off gets zeros, or none at all.
        torch.testing.assert_close(mine.norm(), gradient.norm(), atol=1e-6, rtol=1e-4)
        if mine.shape == gradient.shape:
            torch.testing.assert_close(mine, gradient, atol=1e-5, rtol=1e-4)
    assert not [path for path in found if ".1." in path and found[path].any()]

    # transformers renames the method.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    again = gradients(model)
    assert again.keys() == found.keys()
    for path, gradient in found.items():
        torch.testing.assert_close(again[path], gradient, atol=1e-6, rtol=1e-4)
