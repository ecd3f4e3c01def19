"""The records of model families, checked against models built from their own configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch
from tiny_models import VARIANTS, heads_of, inputs_of, tiny_model, tiny_variant
from torch import nn
from transformers import (
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)
from transformers.pytorch_utils import Conv1D

from elastune.errors import UnsupportedModel
from elastune.models.blocks import blocks
from elastune.models.families import ARCHITECTURES, architecture, known_model_types, record_for

HIDDEN, FFN, HEAD_DIM = 32, 48, 8
NAMES = [*known_model_types(), *VARIANTS]

#: The name of the base model inside a model with a head, written down from the checkpoints.
PREFIX = {
    **dict.fromkeys(["gpt2", "bloom", "mpt", "falcon"], "transformer."),
    **{
        name: f"{name}." for name in ("bert", "roberta", "electra", "distilbert", "vit", "gpt_neox")
    },
    "deberta-v2": "deberta.",
}
FUSED = {
    "phi3": ["qkv", "o", "gate_up", "down"],
    **{n: ["qkv", "o", "up", "down"] for n in ("gpt2", "gpt_neox", "bloom", "mpt", "falcon")},
}
UNGATED = ["opt", "bert", "roberta", "electra", "deberta-v2", "distilbert", "vit"]
SCALED = ["granite", "gemma2"]


def type_of(name: str) -> str:
    return VARIANTS.get(name, (name,))[0]


def decoders() -> list[str]:
    return [name for name in NAMES if "causal-lm" in heads_of(type_of(name))]


@pytest.mark.parametrize("name", NAMES)
def test_roles_lead_to_linear_layers_of_the_right_shape(name: str) -> None:
    model = tiny_variant(name, "base")
    (shape, *_) = [block.shape for block in blocks(model)]
    size = 16 if name == "llama-wide-heads" else HEAD_DIM
    q, kv = shape.heads * size, shape.kv_heads * size
    ffn = 4 * HIDDEN if type_of(name) in ("bloom", "mpt") else FFN
    shapes = {"q": (q, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN), "o": (HIDDEN, q)}
    shapes |= {"gate": (ffn, HIDDEN), "up": (ffn, HIDDEN), "down": (HIDDEN, ffn)}
    shapes |= {"qkv": (q + 2 * kv, HIDDEN), "gate_up": (2 * ffn, HIDDEN)}
    assert shape.heads == 4
    found = architecture(model).linear_names(model)
    gate = [] if type_of(name) in UNGATED else ["gate"]
    roles = FUSED.get(type_of(name), ["q", "k", "v", "o", *gate, "up", "down"])
    assert list(found.values()) == roles * 2
    for path, role in found.items():
        module = model.get_submodule(path)
        if type_of(name) == "gpt2":
            assert isinstance(module, Conv1D), path
            assert (module.nf, module.nx) == shapes[role], path
        else:
            assert isinstance(module, nn.Linear), path
            assert tuple(module.weight.shape) == shapes[role], path


@pytest.mark.parametrize("name", NAMES)
def test_blocks_hold_no_weights_that_the_record_leaves_out(name: str) -> None:
    model = tiny_variant(name, "base")
    record = architecture(model)
    listed = {*record.roles.values(), *record.norms, *record.head_norms}
    listed |= set(record.attention.followers)
    held = {path for path, m in record.blocks_of(model)[0].named_modules() if _is_leaf(m)}
    assert held <= listed
    # Layouts of one family differ in their norms alone.
    assert set(record.roles.values()) <= held
    if len([n for n in NAMES if type_of(n) == type_of(name)]) == 1:
        assert held == listed


def _is_leaf(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


@pytest.mark.parametrize("name", NAMES)
def test_norm_widths_are_the_hidden_size_and_the_head_size(name: str) -> None:
    record = architecture(tiny_variant(name, "base"))
    modules = dict(record.blocks_of(tiny_variant(name, "base"))[0].named_modules())
    assert _sizes(modules, record.norms) == {HIDDEN}
    assert _sizes(modules, record.head_norms) == ({HEAD_DIM} if record.head_norms else set())


def _sizes(modules: dict[str, nn.Module], names: Iterable[str]) -> set[int]:
    return {p.numel() for name in names if name in modules for p in modules[name].parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_names_carry_the_prefix_of_the_head_and_none_without_one(name: str) -> None:
    for head in heads_of(type_of(name)):
        model = tiny_variant(name, head)
        record = architecture(model)
        prefix = "" if head == "base" else _prefix_of(model, type_of(name))
        assert record.block_names(model) == [f"{prefix}{record.blocks}.{i}" for i in (0, 1)]
        modules = dict(model.named_modules())
        assert set(record.linear_names(model)) <= set(modules)
        assert [modules[path] for path in record.block_names(model)] == list(
            record.blocks_of(model)
        )


def _prefix_of(model: PreTrainedModel, model_type: str) -> str:
    # Some families call the base of their question-answering model "transformer".
    other = ("llama", "qwen2", "qwen3", "smollm3")
    if "QuestionAnswering" in type(model).__name__ and model_type in other:
        return "transformer."
    return PREFIX.get(model_type, "model.")


@pytest.mark.parametrize("name", decoders())
def test_plain_head_says_whether_logits_are_the_head_of_the_hidden_state(name: str) -> None:
    changes = {"logits_scaling": 4.0} if name == "granite" else {}
    model = tiny_variant(name, "causal-lm", **changes)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)  # large logits, so that a cap shows
        ids = torch.arange(3, 13).unsqueeze(0)
        hidden = model.base_model(ids).last_hidden_state
        logits = model(ids).logits
        same = torch.allclose(
            model.get_output_embeddings()(hidden), logits, atol=1e-6 * float(logits.abs().max())
        )
    assert same == architecture(model).plain_head
    assert same == (type_of(name) not in SCALED)


def test_a_cap_set_in_the_configuration_makes_the_head_not_plain() -> None:
    assert not architecture(tiny_model("gemma3_text", final_logit_softcapping=30.0)).plain_head


def test_linear_names_go_in_block_order_and_then_role_order() -> None:
    model = tiny_model("llama")
    names = architecture(model).linear_names(model, roles=["down", "q"])
    assert list(names.items()) == [
        ("model.layers.0.self_attn.q_proj", "q"),
        ("model.layers.0.mlp.down_proj", "down"),
        ("model.layers.1.self_attn.q_proj", "q"),
        ("model.layers.1.mlp.down_proj", "down"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_roles_that_share_an_input_receive_the_same_tensor(name: str) -> None:
    model = tiny_variant(name, "base")
    record = architecture(model)
    block = record.blocks_of(model)[0]
    seen: dict[str, list[int]] = {role: [] for role in record.roles}
    for role, path in record.roles.items():
        block.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, role=role: seen[role].append(args[0].data_ptr())
        )
    model(**inputs_of(model))
    for group in record.shared_inputs:
        assert len({tuple(seen[role]) for role in group}) == 1
    assert all(seen.values())


def test_unknown_type_lists_the_known_ones_and_the_way_to_add_one() -> None:
    model = T5EncoderModel(T5Config(num_layers=1, d_model=8, d_kv=4, num_heads=2, vocab_size=16))
    with pytest.raises(UnsupportedModel) as caught:
        architecture(model)
    text = str(caught.value)
    assert "'t5'" in text
    for known in ("llama", "qwen3", "distilbert"):
        assert known in text
    assert "docs/add-a-family.md" in text
    assert "elastune/models/families.py" in text


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"])
def test_mixtures_of_experts_are_refused_with_the_reason(model_type: str) -> None:
    with pytest.raises(UnsupportedModel, match="routed to experts by number") as caught:
        record_for(model_type)
    assert "a dense model, of type llama" in str(caught.value)


def test_a_known_type_with_experts_in_its_configuration_is_refused() -> None:
    model = tiny_model("llama")
    assert architecture(model)
    model.config.num_local_experts = 1
    assert architecture(model)
    model.config.num_local_experts = 8
    with pytest.raises(UnsupportedModel, match="'llama' are mixtures of experts"):
        architecture(model)


def test_misspelt_type_gets_a_suggestion() -> None:
    with pytest.raises(UnsupportedModel, match="did you mean 'qwen3'"):
        record_for("qwen-3")


def test_unknown_role_names_the_roles_there_are() -> None:
    model = tiny_model("bert")
    with pytest.raises(UnsupportedModel, match=r"gate.*it has q, k, v, o, up, down"):
        architecture(model).linear_names(model, roles=["gate", "up"])


@pytest.mark.parametrize(
    "wrong",
    [{"blocks": "h"}, {"norms": ("ln_1",)}, {"roles": {"q": "attn.q"}}, {"blocks": "norm"}],
)
def test_a_wrong_record_fails_with_the_path_and_the_file_to_correct(wrong: dict) -> None:
    model = tiny_model("llama")
    record = dataclasses.replace(record_for("llama"), **wrong)
    with pytest.raises(UnsupportedModel, match=r"elastune/models/families\.py"):
        record.check(model)


def test_a_module_that_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="Linear"):
        architecture(nn.Linear(2, 2))


def test_no_model_type_has_two_records() -> None:
    types = [name for record in ARCHITECTURES for name in record.model_types]
    assert len(types) == len(set(types))
