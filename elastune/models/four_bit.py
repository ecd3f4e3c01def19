"""Linear layers packed in 4 bits by bitsandbytes: how they are made, and what they stand for.

NF4: 16 levels for numbers of a normal distribution, zero among them, scaled block by block
(Dettmers et al. 2023, QLoRA). Layers multiply with what their bits stand for, in the model's dtype.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from elastune.errors import BadRecipe


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return how transformers packs a model while it loads it.

    Raises:
        BadRecipe: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadRecipe(
            "4-bit weights need bitsandbytes, which is not installed",
            try_="pip install 'elastune[4bit]'",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def compute_as_trained(model: nn.Module) -> None:
    """Have packed layers compute in evaluation what they compute in training.

    On CPUs with AVX512-BF16, bitsandbytes would repack weights at the first evaluation, for
    products in bfloat16: their scales are rounded for good, so that another model trains on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def unpacked(tensor: Tensor) -> Tensor:
    """Return the numbers that a parameter's bits stand for; of one that is not packed, itself."""
    state = getattr(tensor, "quant_state", None)
    if state is None:
        return tensor
    from bitsandbytes.functional import dequantize_4bit

    found: Tensor = dequantize_4bit(tensor.data, state)
    return found
