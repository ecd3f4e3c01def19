"""The records of model families, checked against models built from their own configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2Model,
    PreTrainedConfig,
    PreTrainedModel,
)

from elastune.errors import UnsupportedModel
from elastune.models.families import ARCHITECTURES, architecture, known_model_types, record_for

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 32, 48, 4, 2, 8, 64
DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]
ENCODERS = ["bert", "roberta", "distilbert"]

#: The name of the base model inside a model with a head, written down from the checkpoints.
PREFIX = {**dict.fromkeys(DECODERS, "model."), "bert": "bert.", "roberta": "roberta."}
PREFIX["distilbert"] = "distilbert."


def tiny_config(model_type: str, **changes: object) -> PreTrainedConfig:
    sizes: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
    }
    if model_type in DECODERS:
        sizes |= {"num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "bos_token_id": 1}
        sizes |= {"eos_token_id": 2}
    if model_type == "distilbert":
        sizes = {"vocab_size": VOCAB, "dim": HIDDEN, "hidden_dim": FFN, "n_layers": 2}
        sizes |= {"n_heads": HEADS, "max_position_embeddings": 40}
    return AutoConfig.for_model(model_type, **(sizes | changes))


def heads_of(model_type: str) -> list[type]:
    heads: list[type] = [AutoModel, AutoModelForSequenceClassification]
    if model_type in DECODERS:
        heads.append(AutoModelForCausalLM)
    if model_type not in ("gemma2", "gemma3_text"):  # transformers has no such head for these
        heads.append(AutoModelForQuestionAnswering)
    return heads


def build(auto: Any, config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    return auto.from_config(config).eval()


def test_every_known_type_is_tested_here() -> None:
    assert sorted(known_model_types()) == sorted(DECODERS + ENCODERS)


@pytest.mark.parametrize("model_type", DECODERS + ENCODERS)
def test_roles_lead_to_linear_layers_of_the_right_shape(model_type: str) -> None:
    model = build(AutoModel, tiny_config(model_type))
    record = architecture(model)
    kv = KV_HEADS * HEAD_DIM if model_type in DECODERS else HIDDEN
    shapes = {"q": (HIDDEN, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN), "o": (HIDDEN, HIDDEN)}
    shapes |= {"gate": (FFN, HIDDEN), "up": (FFN, HIDDEN), "down": (HIDDEN, FFN)}
    names = record.linear_names(model)
    assert len(names) == 2 * (7 if model_type in DECODERS else 6)
    for name, role in names.items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear), name
        assert tuple(module.weight.shape) == shapes[role], name


@pytest.mark.parametrize("model_type", DECODERS + ENCODERS)
def test_blocks_hold_no_linear_or_norm_that_the_record_leaves_out(model_type: str) -> None:
    model = build(AutoModel, tiny_config(model_type))
    record = architecture(model)
    listed = {*record.roles.values(), *record.norms, *record.head_norms}
    held = {name for name, m in record.blocks_of(model)[0].named_modules() if _is_leaf(m)}
    assert held == listed


def _sizes(block: nn.Module, names: Iterable[str]) -> set[int]:
    return {p.numel() for name in names for p in block.get_submodule(name).parameters()}


def _is_leaf(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


@pytest.mark.parametrize("model_type", DECODERS + ENCODERS)
def test_norm_widths_are_the_hidden_size_and_the_head_size(model_type: str) -> None:
    model = build(AutoModel, tiny_config(model_type))
    record = architecture(model)
    block = record.blocks_of(model)[0]
    assert _sizes(block, record.norms) == {HIDDEN}
    assert _sizes(block, record.head_norms) <= {HEAD_DIM}


@pytest.mark.parametrize("model_type", DECODERS + ENCODERS)
def test_names_carry_the_prefix_of_the_head_and_none_without_one(model_type: str) -> None:
    for auto in heads_of(model_type):
        model = build(auto, tiny_config(model_type))
        record = architecture(model)
        prefix = "" if auto is AutoModel else _prefix_of(model, model_type)
        assert record.block_names(model) == [f"{prefix}{record.blocks}.{i}" for i in (0, 1)]
        modules = dict(model.named_modules())
        assert set(record.linear_names(model)) <= set(modules)
        assert [modules[name] for name in record.block_names(model)] == list(
            record.blocks_of(model)
        )


def _prefix_of(model: PreTrainedModel, model_type: str) -> str:
    # Some families call the base of their question-answering model "transformer".
    if "QuestionAnswering" in type(model).__name__ and model_type in ("llama", "qwen2", "qwen3"):
        return "transformer."
    return PREFIX[model_type]


@pytest.mark.parametrize("model_type", DECODERS)
def test_plain_head_says_whether_logits_are_the_head_of_the_hidden_state(model_type: str) -> None:
    model = build(AutoModelForCausalLM, tiny_config(model_type))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)  # large logits, so that a cap shows
        ids = torch.arange(3, 13).unsqueeze(0)
        hidden = model.base_model(ids).last_hidden_state
        same = torch.allclose(model.get_output_embeddings()(hidden), model(ids).logits, atol=1e-4)
    assert same == architecture(model).plain_head
    assert same == (model_type != "gemma2")


def test_a_cap_set_in_the_configuration_makes_the_head_not_plain() -> None:
    config = tiny_config("gemma3_text", final_logit_softcapping=30.0)
    assert not architecture(build(AutoModelForCausalLM, config)).plain_head


def test_linear_names_go_in_block_order_and_then_role_order() -> None:
    model = build(AutoModelForCausalLM, tiny_config("llama"))
    names = architecture(model).linear_names(model, roles=["down", "q"])
    assert list(names.items()) == [
        ("model.layers.0.self_attn.q_proj", "q"),
        ("model.layers.0.mlp.down_proj", "down"),
        ("model.layers.1.self_attn.q_proj", "q"),
        ("model.layers.1.mlp.down_proj", "down"),
    ]


@pytest.mark.parametrize("model_type", DECODERS + ENCODERS)
def test_roles_that_share_an_input_receive_the_same_tensor(model_type: str) -> None:
    model = build(AutoModel, tiny_config(model_type))
    record = architecture(model)
    block = record.blocks_of(model)[0]
    seen: dict[str, torch.Tensor] = {}
    for role, path in record.roles.items():
        block.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, role=role: seen.__setitem__(role, args[0])
        )
    model(torch.arange(3, 13).unsqueeze(0))
    for group in record.shared_inputs:
        assert len({seen[role].data_ptr() for role in group}) == 1
    assert len({t.data_ptr() for t in seen.values()}) == 4


def test_unknown_type_lists_the_known_ones_and_the_way_to_add_one() -> None:
    model = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(UnsupportedModel) as caught:
        architecture(model)
    text = str(caught.value)
    assert "'gpt2'" in text
    for known in ("llama", "qwen3", "distilbert"):
        assert known in text
    assert "docs/add-a-family.md" in text
    assert "elastune/models/architecture.py" in text


def test_misspelt_type_gets_a_suggestion() -> None:
    with pytest.raises(UnsupportedModel, match="did you mean 'qwen3'"):
        record_for("qwen-3")


def test_unknown_role_names_the_roles_there_are() -> None:
    model = build(AutoModel, tiny_config("bert"))
    with pytest.raises(UnsupportedModel, match=r"gate.*it has q, k, v, o, up, down"):
        architecture(model).linear_names(model, roles=["gate", "up"])


@pytest.mark.parametrize(
    "wrong",
    [{"blocks": "h"}, {"norms": ("ln_1",)}, {"roles": {"q": "attn.q"}}, {"blocks": "norm"}],
)
def test_a_wrong_record_fails_with_the_path_and_the_file_to_correct(wrong: dict) -> None:
    model = build(AutoModel, tiny_config("llama"))
    record = dataclasses.replace(record_for("llama"), **wrong)
    with pytest.raises(UnsupportedModel, match=r"elastune/models/architecture\.py"):
        record.check(model)


def test_a_module_that_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="Linear"):
        architecture(nn.Linear(2, 2))


def test_no_model_type_has_two_records() -> None:
    types = [name for record in ARCHITECTURES for name in record.model_types]
    assert len(types) == len(set(types))
