"""A Llama-shaped decoder from a sub-network, a model or a folder, with its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.errors import BadRecipe, UnsupportedModel
from elastune.export.base import stock_class, stock_config, stock_state
from elastune.export.source import read_model
from elastune.models.llama_shaped import FAMILIES, LlamaShaped, llama_shaped
from elastune.subnetwork import Subnetwork


def source_model(
    source: Subnetwork | PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Return a float32 model, its tokenizer and its name.

    Raises:
        BadRecipe: an adapter that is not merged, no tokenizer, or a model in half precision.
    """
    model, tokenizer, name = read_model(source, tokenizer)
    if tokenizer is None:
        raise BadRecipe("there is no tokenizer, which is part of this format", try_="tokenizer=")
    return model, tokenizer, name


def decoder_of(model: PreTrainedModel, families: Sequence[str] = FAMILIES) -> LlamaShaped:
    """Return a model's sizes and weights; embeddings of low rank are multiplied out.

    Raises:
        UnsupportedModel: it is no causal language model of these families, or none that is
            Llama-shaped.
    """
    name = stock_class(model).__name__
    if not name.endswith("ForCausalLM"):
        raise UnsupportedModel(
            f"a {name} is no causal language model; known are {', '.join(families)}",
            try_="format onnx, openvino or torch-export, which hold any model",
        )
    rotary: Any = getattr(model.base_model, "rotary_emb", None)
    return llama_shaped(stock_config(model), stock_state(model), rotary, families)
