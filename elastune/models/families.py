"""The records of the model families: where each keeps its blocks, projections and norms.

The one place that knows. Adding a family is one record in ``ARCHITECTURES`` and one line in
``tests/tiny_models.py`` (docs/add-a-family.md).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel

from elastune.errors import UnsupportedModel, nearest
from elastune.models.architecture import Architecture, Attention, Layout, type_of

HETERO_PREFIX = "elastune_"
"""What the model types of exported models begin with whose blocks differ in size."""

_LLAMA = Architecture(
    model_types=("llama", "mistral", "qwen2", "smollm3"),
    kind="decoder",
    blocks="layers",
    roles={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    norms=("input_layernorm", "post_attention_layernorm"),
    plain_head=True,
)

_QWEN3 = dataclasses.replace(
    _LLAMA, model_types=("qwen3",), head_norms=("self_attn.q_norm", "self_attn.k_norm")
)

# Granite scales its logits.
_GRANITE = dataclasses.replace(_LLAMA, model_types=("granite",), plain_head=False)

# OLMo 2 norms the outputs of its sub-layers, and the whole of q and of k at once.
_OLMO2 = dataclasses.replace(
    _LLAMA,
    model_types=("olmo2",),
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    attention=Attention("self_attn", followers={"self_attn.q_norm": "q", "self_attn.k_norm": "k"}),
)

_PHI3 = Architecture(
    model_types=("phi3",),
    kind="decoder",
    blocks="layers",
    roles={
        "qkv": "self_attn.qkv_proj",
        "o": "self_attn.o_proj",
        "gate_up": "mlp.gate_up_proj",
        "down": "mlp.down_proj",
    },
    norms=("input_layernorm", "post_attention_layernorm"),
    plain_head=True,
    shared_inputs=(),
    attention=Attention(
        "self_attn",
        sizes={"num_key_value_heads": "kv_heads", "config.num_attention_heads": "heads"},
    ),
)

# Gemma 2 caps its logits, 30 * tanh(logits / 30), so its head is not plain.
_GEMMA2 = dataclasses.replace(
    _LLAMA,
    model_types=("gemma2",),
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    plain_head=False,
)

_GEMMA3 = dataclasses.replace(
    _GEMMA2,
    model_types=("gemma3_text",),
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    plain_head=True,
)


def _scaled_by_number(config: Any, _: int) -> str | None:
    scaled = getattr(config, "scale_attn_by_inverse_layer_idx", False)
    return "its attention is scaled by the number of the block" if scaled else None


_GPT2 = Architecture(
    model_types=("gpt2",),
    kind="decoder",
    blocks="h",
    roles={
        "qkv": "attn.c_attn",
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
    norms=("ln_1", "ln_2"),
    plain_head=True,
    shared_inputs=(),
    attention=Attention("attn", sizes={"num_heads": "heads", "split_size": "width"}),
    fixed_depth=_scaled_by_number,
    config_names={"heads": "n_head", "ffn": "n_inner"},
)

_GPT_NEOX = Architecture(
    model_types=("gpt_neox",),
    kind="decoder",
    blocks="layers",
    roles={
        "qkv": "attention.query_key_value",
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    norms=("input_layernorm", "post_attention_layernorm"),
    plain_head=True,
    shared_inputs=(),
    attention=Attention("attention", head_dim="head_size", layout="by_group"),
    config_names={"heads": "num_attention_heads", "ffn": "intermediate_size"},
)

_OPT = Architecture(
    model_types=("opt",),
    kind="decoder",
    blocks="decoder.layers",
    roles={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
    },
    norms=("self_attn_layer_norm", "final_layer_norm"),
    plain_head=True,
    shared_inputs=(("q", "k", "v"),),
    attention=Attention("self_attn", sizes={"num_heads": "heads"}),
    config_names={"heads": "num_attention_heads", "ffn": "ffn_dim"},
)

_BLOOM = Architecture(
    model_types=("bloom",),
    kind="decoder",
    blocks="h",
    roles={
        "qkv": "self_attention.query_key_value",
        "o": "self_attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    norms=("input_layernorm", "post_attention_layernorm"),
    plain_head=True,
    shared_inputs=(),
    attention=Attention(
        "self_attention",
        sizes={"num_heads": "heads"},
        layout="by_group",
        alibi=True,
        adds_residual=True,
    ),
    returns_tuple=True,
    config_names={"heads": "n_head"},  # the feed-forward is always four times as wide
)

_MPT = Architecture(
    model_types=("mpt",),
    kind="decoder",
    blocks="blocks",
    roles={
        "qkv": "attn.Wqkv",
        "o": "attn.out_proj",
        "up": "ffn.up_proj",
        "down": "ffn.down_proj",
    },
    norms=("norm_1", "norm_2"),
    plain_head=True,
    shared_inputs=(),
    attention=Attention("attn", sizes={"n_heads": "heads"}, alibi=True),
    returns_tuple=True,
    config_names={"heads": "n_heads"},  # the feed-forward is a whole multiple of the hidden size
)


def _falcon_layout(config: Any) -> Layout:
    """Return how Falcon orders its fused rows: one key and value for all heads come last."""
    is_multi_query = config.multi_query and not config.new_decoder_architecture
    return "stacked" if is_multi_query else "by_group"


_FALCON = Architecture(
    model_types=("falcon",),
    kind="decoder",
    blocks="h",
    roles={
        "qkv": "self_attention.query_key_value",
        "o": "self_attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    norms=("input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp"),
    plain_head=True,
    shared_inputs=(),
    attention=Attention(
        "self_attention",
        sizes={"num_heads": "heads", "num_kv_heads": "kv_heads"},
        layout=_falcon_layout,
        alibi=lambda config: bool(config.alibi),
    ),
    returns_tuple=True,
    config_names={"heads": "num_attention_heads", "ffn": "ffn_hidden_size"},
)

_BERT = Architecture(
    model_types=("bert", "roberta", "electra"),
    kind="encoder",
    blocks="encoder.layer",
    roles={
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
    },
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    shared_inputs=(("q", "k", "v"),),
    attention=Attention(
        "attention.self",
        head_dim="attention_head_size",
        sizes={"num_attention_heads": "heads", "all_head_size": "width"},
    ),
    config_names={"heads": "num_attention_heads", "ffn": "intermediate_size"},
)


def _first_before_convolution(config: Any, index: int) -> str | None:
    has_convolution = getattr(config, "conv_kernel_size", 0) > 0
    is_fixed = has_convolution and index == 0
    return "the model's convolution follows its first block" if is_fixed else None


_DEBERTA = dataclasses.replace(
    _BERT,
    model_types=("deberta-v2",),
    roles={
        **_BERT.roles,
        "q": "attention.self.query_proj",
        "k": "attention.self.key_proj",
        "v": "attention.self.value_proj",
    },
    # Where q and k project the relative positions, too, v does not.
    shared_inputs=(("q", "k"),),
    # Projections of the relative positions, in models that do not share those of the words.
    attention=dataclasses.replace(
        _BERT.attention,
        followers={"attention.self.pos_query_proj": "q", "attention.self.pos_key_proj": "k"},
    ),
    returns_tuple=True,
    fixed_depth=_first_before_convolution,
)

_DISTILBERT = Architecture(
    model_types=("distilbert",),
    kind="encoder",
    blocks="transformer.layer",
    roles={
        "q": "attention.q_lin",
        "k": "attention.k_lin",
        "v": "attention.v_lin",
        "o": "attention.out_lin",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
    },
    norms=("sa_layer_norm", "output_layer_norm"),
    shared_inputs=(("q", "k", "v"),),
    attention=Attention("attention", head_dim="attention_head_size", sizes={"n_heads": "heads"}),
    config_names={"heads": "n_heads", "ffn": "hidden_dim"},
)

_VIT = Architecture(
    model_types=("vit",),
    kind="encoder",
    blocks="layers",
    roles={
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "o": "attention.o_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
    norms=("layernorm_before", "layernorm_after"),
    shared_inputs=(("q", "k", "v"),),
    attention=Attention("attention", sizes={"num_attention_heads": "heads"}),
    config_names={
        "heads": "num_attention_heads",
        "head_dim": "head_dim",
        "ffn": "intermediate_size",
    },
)

#: Every family the library knows. Add a family by adding its record here.
ARCHITECTURES: tuple[Architecture, ...] = (
    *(_LLAMA, _QWEN3, _GEMMA2, _GEMMA3, _PHI3, _OLMO2, _GRANITE),
    *(_GPT2, _GPT_NEOX, _OPT, _BLOOM, _MPT, _FALCON),
    *(_BERT, _DEBERTA, _DISTILBERT, _VIT),
)


def known_model_types() -> list[str]:
    """Return every ``config.model_type`` that has a record, in the order of ``ARCHITECTURES``."""
    return [name for record in ARCHITECTURES for name in record.model_types]


def record_for(model_type: str) -> Architecture:
    """Return the record of one ``config.model_type``, of stock classes or of our own exports.

    Raises:
        UnsupportedModel: no record serves this type.
    """
    stock_type = model_type.removeprefix(HETERO_PREFIX)
    for record in ARCHITECTURES:
        if stock_type in record.model_types:
            return record
    if stock_type in CONFIG_MAPPING and _has_experts(AutoConfig.for_model(stock_type)):
        raise _mixture(model_type)
    known = known_model_types()
    raise UnsupportedModel(
        f"models of type {model_type!r} are not known{nearest(model_type, known)}; "
        f"known types: {', '.join(known)}",
        try_="add one record to elastune/models/families.py, as docs/add-a-family.md shows",
    )


#: Fields of configurations that count experts.
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def _mixture(model_type: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"models of type {model_type!r} are mixtures of experts, whose layers are not supported: "
        "tokens are routed to experts by number, so that cutting experts or their widths needs a "
        "method of its own",
        try_=f"a dense model, of type {', '.join(known_model_types())}",
    )


def _has_experts(config: Any) -> bool:
    # Not by attribute: configurations with sizes of each layer refuse to name one size of all.
    counts = [vars(config.get_text_config()).get(name) for name in _EXPERT_COUNTS]
    return any(isinstance(count, int) and count > 1 for count in counts)


def architecture(model: nn.Module) -> Architecture:
    """Return the checked record of a built model, with any head or none.

    ``plain_head`` is settled by the model's own configuration: a family that may cap its logits
    has a plain head only where the cap is switched off.

    Raises:
        UnsupportedModel: no record for this model type, a mixture of experts, or the record does
            not fit the model.
    """
    record = record_for(type_of(model))
    if isinstance(model, PreTrainedModel):
        if _has_experts(model.config):
            raise _mixture(type_of(model))
        if getattr(model.config, "final_logit_softcapping", None) is not None:
            record = dataclasses.replace(record, plain_head=False)
    record.check(model)
    return record
