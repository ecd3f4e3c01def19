"""A Llama-shaped decoder from a sub-network, a model or a folder, with its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from elastune.errors import BadRecipe, UnsupportedModel
from elastune.export.base import stock_class, stock_config, stock_state
from elastune.export.runtimes import load_any
from elastune.models.checkpoint import check_folder
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
    if isinstance(source, Subnetwork | PreTrainedModel):
        model = source.model if isinstance(source, Subnetwork) else source
        has_adapter = isinstance(source, Subnetwork) and source.adapter is not None
        name = Path(str(model.config.name_or_path or "")).name or type(model).__name__
    else:
        folder = Path(source)
        check_folder(folder)
        has_adapter, name = (folder / "adapter").is_dir(), folder.name
        model = load_any(folder)
        if tokenizer is None and (folder / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder)
    if has_adapter:
        raise BadRecipe(
            f"the adapter of {name} is not merged, and this format holds one model",
            try_="extract_model(net, config, merge=True)",
        )
    if tokenizer is None:
        raise BadRecipe("there is no tokenizer, which is part of this format", try_="tokenizer=")
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise BadRecipe(
            f"the model is {model.dtype} on {model.device}; it is exported from float32 on the CPU",
            try_='model.to("cpu", torch.float32)',
        )
    model.eval()
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
