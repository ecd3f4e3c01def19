"""Costs against parameters counted one by one and against torch's own FLOP counter."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB, tiny_model, tiny_net
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from elastune.cost import CostModel, model_cost, prefill_latency_ms
from elastune.extract import extract
from elastune.space import SubnetConfig
from elastune.sparsify import Sparsity, sparsify_
from elastune.supernet import SuperNetwork

TOKENS = 24
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


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_latency_is_measured_in_milliseconds(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))  # every look at the clock is one second later
    monkeypatch.setattr("elastune.cost.time.perf_counter", lambda: float(next(ticks)))
    assert prefill_latency_ms(tiny_model(family), TOKENS, repeats=3, warmup=1) == 1000.0


def test_latency_runs_the_head_on_the_last_token_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", auto=AutoModelForCausalLM)
    rows: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    prefill_latency_ms(model, TOKENS, repeats=2, warmup=1)
    assert rows == [1, 1, 1]
