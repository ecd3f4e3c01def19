"""Random two-layer models of every family, and super-networks over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from elastune.build_space import lora_space
from elastune.data import Encoded
from elastune.models.families import record_for
from elastune.supernet import SuperNetwork

VOCAB = 64

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
_DECODER: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
_GROUPED: dict[str, Any] = {**_DECODER, "num_key_value_heads": 2, "head_dim": 8}

#: What a family's configuration needs beside or in place of `_SIZES`, in its own field names.
#: Families that are missing here need nothing.
OWN_SIZES: dict[str, Mapping[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"), _GROUPED),
    **dict.fromkeys(("smollm3", "olmo2", "granite"), _GROUPED),
    # Of this family the sliding window, too, must be given where there is to be none.
    "phi3": {**_GROUPED, "sliding_window": None},
    "gpt2": {**_DECODER, "n_inner": 48},
    "gpt_neox": {**_DECODER, "rotary_pct": 0.5},
    "opt": {**_DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    "bloom": _DECODER,
    "mpt": {**_DECODER, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "falcon": {**_DECODER, "ffn_hidden_size": 48, "num_kv_heads": 2, "alibi": False}
    | {"new_decoder_architecture": True},
    "electra": {"embedding_size": 16},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    | {"position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "vit": {"image_size": 12, "patch_size": 4, "num_channels": 3},
}

#: name -> model type and changes: the layouts that some families come in, beside the usual one.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 16}),
    "phi3-one-kv-head": ("phi3", {"num_key_value_heads": 1}),
    "falcon-multi-query": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "falcon-one-kv-head": ("falcon", {"num_kv_heads": 1}),
    "falcon-old": (
        "falcon",
        {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4}
        | {"parallel_attn": False, "bias": True},
    ),
    "falcon-alibi": (
        "falcon",
        {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4}
        | {"parallel_attn": False, "alibi": True},
    ),
    "opt-norm-after": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "bloom-residual-after": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "deberta-own-keys": ("deberta-v2", {"share_att_key": False}),
    "deberta-convolution": ("deberta-v2", {"conv_kernel_size": 3}),
    "deberta-absolute": ("deberta-v2", {"relative_attention": False, "pos_att_type": []}),
}

AUTO: dict[str, Any] = {
    "base": AutoModel,
    "causal-lm": AutoModelForCausalLM,
    "classifier": AutoModelForSequenceClassification,
    "reader": AutoModelForQuestionAnswering,
    "image-classifier": AutoModelForImageClassification,
}


def heads_of(model_type: str) -> list[str]:
    """Return the names in `AUTO` of the classes that transformers has for a model type."""
    config = type(AutoConfig.for_model(model_type))
    found = [name for name, auto in AUTO.items() if config in auto._model_mapping]
    is_encoder = record_for(model_type).kind == "encoder"
    return [name for name in found if not (is_encoder and name == "causal-lm")]


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Return a configuration of two small layers."""
    own = OWN_SIZES.get(model_type, {})
    skipped: set[str] = set()
    if model_type in ("mpt", "distilbert"):
        skipped = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    sizes = {name: value for name, value in _SIZES.items() if name not in skipped}
    return AutoConfig.for_model(model_type, **(sizes | dict(own) | changes))


def tiny_model(model_type: str, *, auto: Any = None, seed: int = 0, **changes: Any) -> Any:
    """Build a model whose random weights are large enough for its logits to differ clearly."""
    is_encoder = record_for(model_type).kind == "encoder"
    auto = auto or (AutoModel if is_encoder else AutoModelForCausalLM)
    torch.manual_seed(seed)
    return auto.from_config(tiny_config(model_type, **changes)).eval()


def tiny_variant(name: str, head: str, **changes: Any) -> Any:
    """Build a model of `VARIANTS`, or of a model type as it usually is, with a head of `AUTO`."""
    model_type, own = VARIANTS.get(name, (name, {}))
    return tiny_model(model_type, auto=AUTO[head], **(own | changes))


def inputs_of(model: Any, *, rows: int = 2, length: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """Return what a model reads: token ids, or pixels of a model that sees."""
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        generator = torch.Generator().manual_seed(seed)
        shape = (rows, model.config.num_channels, size, size)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    return {"input_ids": torch.tensor(token_ids(*[length] * rows, seed=seed))}


def outputs_of(model: Any, inputs: Mapping[str, Tensor], **options: Any) -> Tensor:
    """Return logits, hidden states of a model without a head, start and end logits of a reader."""
    with torch.no_grad():
        out = model(**inputs, **options)
    if "start_logits" in out:
        return torch.stack([out["start_logits"], out["end_logits"]])
    first: Tensor = out[0]
    return first


def tiny_net(model: Any, *, ranks: Any = (8, 4, 2), seed: int = 0, **options: Any) -> SuperNetwork:
    """Make a model elastic, with adapters that do something."""
    net = SuperNetwork(model, lora_space(model, ranks), seed=seed, **({"alpha": 16} | options))
    fill_adapters(net, seed)
    return net


def fill_adapters(net: SuperNetwork, seed: int = 0) -> None:
    """Move every B away from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in net.adapters.values():
            noise = torch.randn(adapter.lora_B.shape, generator=generator)
            adapter.lora_B.copy_(noise * 0.05)


def stir(model: Any, seed: int = 0) -> Any:
    """Move biases and the weights of norms away from their zeros and ones, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def token_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Draw random sequences without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def encoded(*lengths: int, seed: int = 0, n_prompt: int = 2) -> list[Encoded]:
    """Draw random training examples."""
    return [Encoded(ids, n_prompt) for ids in token_ids(*lengths, seed=seed)]


def logits_of(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Return logits, or the hidden states of a model without a head."""
    with torch.no_grad():
        return model(input_ids=ids, **options)[0]
