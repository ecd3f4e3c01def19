"""Write a Llama-shaped model as one GGUF file, for llama.cpp."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elastune.errors import UnsupportedModel
from elastune.export.gguf_tokenizer import GgufVocabulary
from elastune.models.blocks import BlockShape
from elastune.models.llama_shaped import (
    LlamaShaped,
    is_rotated,
    with_channels,
    with_heads,
    without_absent,
)

#: How weights are kept -> the names that GGUF has for that: of a tensor, and of a file.
WEIGHTS: Mapping[str, tuple[str, str]] = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}

_GROUP = 32
"""Inputs that share a scale in q8_0 and q4_0."""


@dataclass(frozen=True)
class Written:
    """A GGUF file.

    Attributes:
        architecture: llama.cpp's name of it.
        blocks: the sizes as written.
        digests: tensor -> SHA-256 of its kind, shape and bytes.
        rounded: weights as the file holds them, by their names in transformers.
        fallbacks: tensors kept in float16 because a row is no whole number of groups.
    """

    architecture: str
    blocks: tuple[BlockShape, ...]
    digests: Mapping[str, str]
    rounded: Mapping[str, Tensor]
    fallbacks: tuple[str, ...]


def for_llama_cpp(model: LlamaShaped) -> tuple[LlamaShaped, str]:
    """Return a model whose blocks llama.cpp can hold, and the name of its architecture.

    Only ``deci`` reads the sizes of each block (llama, qwen2 and qwen3 refuse a file whose blocks
    differ). It cannot do without attention in the first block, of which it takes the size of a
    head; and it forgets the attention of a block that has no feed-forward. Both get zeros.

    Raises:
        UnsupportedModel: q and k are normalised, which ``deci`` does not do.
    """
    stock = {"mistral": "llama"}.get(model.family, model.family)
    if model.is_uniform:
        return model, stock
    if model.family == "qwen3":
        raise UnsupportedModel(
            "llama.cpp reads qwen3 only with blocks of one size",
            try_="pad the sub-network: save_subnetwork(..., format='hf-padded'), then export that",
        )
    first = next((b for b in model.blocks if b.heads), None)
    if first is None:
        raise UnsupportedModel("no block of this model has attention")
    if not model.blocks[0].heads:
        model = with_heads(model, 0, first.heads // first.kv_heads, 1)
    for index, block in enumerate(model.blocks):
        if not block.ffn:
            model = with_channels(model, index, _GROUP)
    return model, "deci"


def write_gguf(
    model: LlamaShaped,
    vocabulary: GgufVocabulary,
    file: Path,
    *,
    weights: str,
    name: str,
) -> Written:
    """Write the file.

    Args:
        model: any of `LlamaShaped`.
        vocabulary: of its tokenizer.
        file: to be written.
        weights: one of `WEIGHTS`; norms, biases and other vectors are always float32, and with
            ``q4_0`` the embedding and the head are ``q8_0``.
        name: of the model, for readers.

    Raises:
        UnsupportedModel: sizes or settings that llama.cpp cannot hold.
    """
    from gguf import GGUFWriter

    held, architecture = for_llama_cpp(model)
    if held.frequency_factors is not None and architecture not in ("llama", "deci"):
        raise UnsupportedModel(
            f"llama.cpp reads no rotary frequencies of {model.family} models",
            try_="format onnx, openvino or hf",
        )
    writer = GGUFWriter(file, architecture)
    _settings(writer, held, weights, name)
    _vocabulary(writer, vocabulary)
    digests, rounded, fallbacks = {}, {}, []
    for there, own, tensor in _tensors(held, architecture):
        stored, kind = _stored(there, tensor, weights)
        if kind == "F16" and WEIGHTS[weights][0].startswith("Q"):
            fallbacks.append(there)
        if own is not None:
            rounded[own] = _read(stored, kind, tensor.shape)
        if own is not None and architecture in ("llama", "deci"):
            stored = _interleaved(own, stored, held.head_dim)
        writer.add_tensor(there, stored, raw_dtype=_kind(kind))
        digests[there] = digest(kind, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(architecture, held.blocks, digests, rounded, tuple(fallbacks))


def digest(kind: str, stored: Any) -> str:
    """Return the SHA-256 of a tensor as it is stored."""
    made = hashlib.sha256(f"{kind} {list(stored.shape)}".encode())
    made.update(np.ascontiguousarray(stored).view(np.uint8).data)
    return made.hexdigest()


def _settings(writer: Any, model: LlamaShaped, weights: str, name: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_name(name)
    writer.add_file_type(LlamaFileType[WEIGHTS[weights][1]])
    if weights.startswith("q"):
        writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(len(model.blocks))
    writer.add_context_length(model.usable_context)
    writer.add_embedding_length(model.hidden)
    writer.add_vocab_size(model.vocab_size)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    by_block = [list(sizes) for sizes in zip(*model.blocks, strict=True)]
    heads, kv_heads, ffn = ([s[0]] if len(set(s)) == 1 else s for s in by_block)
    writer.add_head_count(heads[0] if len(heads) == 1 else heads)
    writer.add_head_count_kv(kv_heads[0] if len(kv_heads) == 1 else kv_heads)
    writer.add_feed_forward_length(ffn[0] if len(ffn) == 1 else ffn)


def _vocabulary(writer: Any, vocabulary: GgufVocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _tensors(model: LlamaShaped, architecture: str) -> Iterator[tuple[str, str | None, Tensor]]:
    """Yield name in the file, name in transformers, values."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, len(model.blocks))
    for own, tensor in without_absent(model).state.items():
        path, _, suffix = own.rpartition(".")
        yield f"{names.get_name(path)}.{suffix}", own, tensor
    if model.frequency_factors is not None:
        yield "rope_freqs.weight", None, model.frequency_factors


def _stored(name: str, tensor: Tensor, weights: str) -> tuple[np.ndarray, str]:
    """Return a tensor as it is stored, and the name of the kind."""
    from gguf import quantize

    values = tensor.float().contiguous().numpy()
    kind = WEIGHTS[weights][0]
    if values.ndim == 1:
        kind = "F32"
    elif kind == "Q4_0" and name.startswith(("token_embd.", "output.")):
        kind = "Q8_0"
    if kind.startswith("Q") and values.shape[-1] % _GROUP:
        kind = "F16"
    stored: np.ndarray = quantize(values, _kind(kind))
    return stored, kind


def _read(stored: np.ndarray, kind: str, shape: torch.Size) -> Tensor:
    """Return the values of what is stored."""
    from gguf import dequantize

    values = dequantize(stored, _kind(kind)).astype(np.float32).reshape(shape)
    if not np.isfinite(values).all():
        raise UnsupportedModel(f"weights are too large for {kind}", try_="weights='bfloat16'")
    return torch.from_numpy(values.copy())


def _interleaved(name: str, stored: np.ndarray, head_dim: int) -> np.ndarray:
    """Order rows as llama.cpp rotates them: (2i, 2i + 1) of a head, not (i, i + half)."""
    if not is_rotated(name):
        return stored
    halves = stored.reshape(-1, 2, head_dim // 2, *stored.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(stored.shape))


def _kind(name: str) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[name]
