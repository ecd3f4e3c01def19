"""Costs against parameters counted one by one and against torch's own FLOP counter."""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import (
    VARIANTS,
    VOCAB,
    fill_adapters,
    inputs_of,
    tiny_model,
    tiny_net,
    tiny_variant,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from elastune.build_space import lora_space
from elastune.build_structure import structure_space
from elastune.cost import CostModel, model_cost
from elastune.errors import InvalidSubnet
from elastune.extract import extract
from elastune.models.blocks import blocks
from elastune.models.families import record_for
from elastune.space import SubnetConfig
from elastune.sparsify import Sparsity, sparsify_
from elastune.subnetwork import extract_model
from elastune.supernet import SuperNetwork

TOKENS = 24
#: Families and layouts that compute in ways of their own.
NAMES = (
    *("llama", "llama-biases", "llama-one-kv-head", "qwen3", "gemma2", "olmo2", "phi3", "gpt2"),
    *("gpt_neox", "opt", "bloom", "mpt", "falcon", "falcon-multi-query", "falcon-old", "bert"),
    *("distilbert", "deberta-v2", "deberta-own-keys", "deberta-convolution", "vit"),
)
TARGETS = ("q", "k", "v", "o", "up", "gate", "down")
HEADS = (AutoModel, AutoModelForQuestionAnswering, AutoModelForSequenceClassification)


def counted_macs(model: Any) -> int:
    """Half of torch's FLOPs of a forward pass."""
    ids = torch.randint(3, VOCAB, (1, TOKENS))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    return counter.get_total_flops() // 2


@pytest.fixture
def no_peft_warning() -> None:
    """PEFT still asks for a property that transformers renamed."""
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)


def stock_peft(net: SuperNetwork, config: SubnetConfig, model: Any) -> Any:
    """Let PEFT put adapters of the configuration's ranks on a plain model."""
    ranks = {name: config[d.name] for d in net.space.dims for name in d.modules if config[d.name]}
    return get_peft_model(model, LoraConfig(r=1, target_modules=sorted(ranks), rank_pattern=ranks))


def test_macs_of_a_llama_are_the_sum_written_by_hand() -> None:
    model = tiny_model("llama")  # hidden 32, ffn 48, 4 heads and 2 kv heads of 8, 2 blocks
    projections = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    attention = 2 * TOKENS * 32  # a token's query and its weights, over all positions
    per_token = 2 * (projections + attention) + 32 * VOCAB
    assert model_cost(model, TOKENS).macs == TOKENS * per_token


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 16}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 2}),
    ],
)
def test_macs_of_decoders_are_those_that_torch_counts(family: str, changes: dict[str, Any]) -> None:
    # Eager attention computes masked pairs, as the definition of MACs here says.
    model = tiny_model(family, attn_implementation="eager", **changes)
    assert model_cost(model, TOKENS).macs == counted_macs(model)


@pytest.mark.parametrize("auto", HEADS)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_macs_of_encoders_are_those_that_torch_counts(family: str, auto: Any) -> None:
    # A classifier, and the pooler below it, read one token, and a reader's head every token.
    model = tiny_model(family, auto=auto, attn_implementation="eager")
    assert model_cost(model, TOKENS).macs == counted_macs(model)


@pytest.mark.usefixtures("no_peft_warning")
@pytest.mark.parametrize("family", ["llama", "qwen3", "distilbert"])
def test_parameters_and_macs_are_those_of_the_same_adapter_made_by_peft(family: str) -> None:
    net = tiny_net(tiny_model(family), ranks=(8, 3, 0))
    cost = CostModel(net, TOKENS)
    mixed = SubnetConfig({d.name: d.choices[i % 3] for i, d in enumerate(net.space.dims)})
    for config in (net.space.largest(), net.space.heuristic(), mixed):
        stock = stock_peft(net, config, tiny_model(family, attn_implementation="eager"))
        assert cost(config).params == sum(p.numel() for p in stock.parameters())
        assert cost(config).macs == counted_macs(stock)
        adapter = sum(a.numel() + b.numel() for a, b, _ in extract(net, config).weights.values())
        assert cost(config).params == model_cost(tiny_model(family), TOKENS).params + adapter
    assert cost(net.space.smallest()) == model_cost(net.unwrap(), TOKENS)


def test_tied_weights_count_once() -> None:
    tied = model_cost(tiny_model("llama", tie_word_embeddings=True), TOKENS)
    untied = model_cost(tiny_model("llama", tie_word_embeddings=False), TOKENS)
    assert untied.params - tied.params == VOCAB * 32
    assert untied.macs == tied.macs


def test_zeros_leave_parameters_and_macs_as_they_are() -> None:
    model = tiny_model("llama")
    dense = model_cost(model, TOKENS)
    sparsify_(model, "magnitude", Sparsity(0.5))
    sparse = model_cost(model, TOKENS)
    assert (sparse.params, sparse.macs) == (dense.params, dense.macs)
    assert dense.nonzero - sparse.nonzero == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) // 2
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert sparse.nonzero == sparse.params - zeros
    net = tiny_net(model, ranks=(4, 2))
    cost = CostModel(net, TOKENS)(net.space.smallest())
    assert cost.params - cost.nonzero == zeros


def test_the_cost_depends_on_the_configuration_asked_for_not_on_the_active_one() -> None:
    net = tiny_net(tiny_model("llama"))
    cost = CostModel(net, TOKENS)
    before = cost(net.space.heuristic())
    net.activate(net.space.smallest())
    assert cost(net.space.heuristic()) == before
    assert CostModel(net, TOKENS)(net.space.heuristic()) == before
    sizes = [cost(c).params for c in (net.space.largest(), net.space.heuristic())]
    assert sizes[0] > sizes[1] > cost(net.space.smallest()).params


def structure_net(name: str, head: str, **options: Any) -> SuperNetwork:
    """Make all that can be cut of three blocks elastic, each half down to nothing."""
    layers = {"mpt": "n_layers", "distilbert": "n_layers"}.get(name, "num_hidden_layers")
    model = tiny_variant(name, head, attn_implementation="eager", **{layers: 3})
    first = blocks(model)[0]
    space = lora_space(model, [4, 2, 0], targets=TARGETS) + structure_space(
        model,
        heads=[4, 0] if first.fixed_heads else [4, 2, 0],
        ffn=[1.0, 0.5, 0.25, 0],
        depth="all" if first.fixed_depth is None else None,
        round_to=4,
    )
    # With dropout the adapter's products are torch operators that are counted.
    net = SuperNetwork(model, space, alpha=16, dropout=0.1, **options).eval()
    fill_adapters(net)
    return net


def some_config(net: SuperNetwork) -> SubnetConfig:
    """Return a random sub-network that has more than one block."""
    drawn = (net.space.sample(np.random.default_rng(seed)) for seed in range(99))
    return next(config for config in drawn if sum(map(bool, net.shapes(config))) > 1)


def flops(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[int, Any]:
    """Half of torch's FLOPs of a forward pass, and what it returned."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = model(**inputs, **options)
    return counter.get_total_flops() // 2, out


@pytest.mark.parametrize("name", NAMES)
def test_the_cost_of_a_configuration_is_that_of_the_model_extracted_for_it(name: str) -> None:
    is_decoder = record_for(VARIANTS.get(name, (name,))[0]).kind == "decoder"
    net = structure_net(name, "causal-lm" if is_decoder else "base")
    inputs = inputs_of(net.model, rows=1, length=10)
    merged, beside = CostModel(net, 10, merged=True), CostModel(net, 10)
    config = some_config(net)
    sub = extract_model(net, config)
    found = merged(config)
    assert found == model_cost(sub.model, 10)
    assert found.params == sum(p.numel() for p in sub.model.parameters())
    assert found.nonzero == sum(int((p != 0).sum()) for p in sub.model.parameters())
    options = {"use_cache": True} if is_decoder else {}
    macs, out = flops(sub.model, inputs, **options)
    assert found.macs == macs
    if is_decoder:
        token = {"input_ids": inputs["input_ids"][:, :1]}
        macs, _ = flops(sub.model, token, past_key_values=out.past_key_values, **options)
    assert found.decode_macs == (macs if is_decoder else 0)

    plain = extract_model(net, config, merge=False)
    adapter = plain.adapter.weights.values() if plain.adapter else ()
    rank_params = sum(a.numel() + b.numel() for a, b, _ in adapter)
    base = model_cost(plain.model, 10)
    assert beside(config).params == base.params + rank_params
    assert beside(config).nonzero == base.nonzero + rank_params
    with net.active(config):
        assert beside(config).macs == flops(net.model, inputs)[0]


def test_zeros_of_a_sparse_base_are_counted_where_they_are() -> None:
    model = tiny_model("llama", intermediate_size=64, num_hidden_layers=3)
    sparsify_(model, "magnitude", Sparsity(0.5))
    with torch.no_grad():  # the later channels and heads hold more zeros than the first
        model.model.layers[0].mlp.down_proj.weight[:, 40:] = 0
        model.model.layers[1].self_attn.o_proj.weight[:, 16:] = 0
    space = structure_space(model, ffn=[64, 32, 8], heads=[4, 2], depth="all")
    space = space + lora_space(model, [4, 0], targets=["q", "down"])
    net = SuperNetwork(model, space)
    fill_adapters(net)
    for seed in range(8):
        config = space.sample(np.random.default_rng(seed))
        if not any(net.shapes(config)):
            continue
        for merge in (True, False):
            sub = extract_model(net, config, merge=merge)
            left = sum(int((p != 0).sum()) for p in sub.model.parameters())
            adapter = sub.adapter.weights.values() if sub.adapter else ()
            left += sum(a.numel() + b.numel() for a, b, _ in adapter)
            assert CostModel(net, TOKENS, merged=merge)(config).nonzero == left


def test_block_macs_leave_out_what_is_not_in_a_block() -> None:
    model = tiny_model("llama")
    cost = model_cost(model, TOKENS)
    assert cost.macs - cost.block_macs == TOKENS * 32 * VOCAB
    net = SuperNetwork(model, structure_space(model, depth=[0], ffn=[1.0]))
    without = CostModel(net, TOKENS)(net.space.smallest())
    assert without.block_macs == cost.block_macs // 2
    assert cost.macs - without.macs == cost.block_macs // 2


def test_a_sliding_window_bounds_the_keys_of_a_decoded_token_and_nothing_else() -> None:
    kinds = ["sliding_attention", "full_attention"]
    changes = {"sliding_window": 8, "layer_types": kinds, "attn_implementation": "eager"}
    model = tiny_model("gemma2", **changes)
    ids = torch.randint(3, VOCAB, (1, TOKENS))
    macs, out = flops(model, {"input_ids": ids}, use_cache=True)
    decode, _ = flops(model, {"input_ids": ids[:, :1]}, past_key_values=out.past_key_values)
    cost = model_cost(model, TOKENS)
    assert (cost.macs, cost.decode_macs) == (macs, decode)
    whole = model_cost(tiny_model("gemma2", layer_types=["full_attention"] * 2), TOKENS)
    assert whole.decode_macs - cost.decode_macs == 2 * (TOKENS + 1 - 8) * 32


def test_shared_dims_cut_all_blocks() -> None:
    model = tiny_model("gpt2")
    net = SuperNetwork(model, structure_space(model, ffn=[48, 12], heads=[4, 2], shared=True))
    config = net.space.smallest()
    assert len(config) == 2
    cost = CostModel(net, TOKENS)(config)
    assert cost == model_cost(extract_model(net, config).model, TOKENS)


def test_a_configuration_of_another_space_is_refused() -> None:
    model = tiny_model("llama")
    net = SuperNetwork(model, structure_space(model, ffn=[48, 16], heads=[4, 2]))
    cost = CostModel(net, TOKENS)
    with pytest.raises(InvalidSubnet, match="missing dim"):
        cost(SubnetConfig({"layers.0.ffn": 16}))
    with pytest.raises(InvalidSubnet, match="nearest is 16"):
        cost(SubnetConfig({**net.space.largest(), "layers.0.ffn": 20}))


def test_a_cost_is_looked_up_in_microseconds() -> None:
    model = tiny_model("llama", num_hidden_layers=30)
    space = structure_space(model, ffn=[48, 32, 16], heads=[4, 2], depth="all", round_to=8)
    space = space + lora_space(model, [8, 4, 2], targets=["q"])
    assert len(space) == 120
    net = SuperNetwork(model, space)
    cost = CostModel(net, TOKENS)
    configs = [space.sample(np.random.default_rng(seed)) for seed in range(200)]
    for config in configs:
        cost(config)
    seconds = []
    for config in configs:
        started = time.process_time()
        cost(config)
        seconds.append(time.process_time() - started)
    assert statistics.median(seconds) < 500e-6  # 35 microseconds on an idle machine
