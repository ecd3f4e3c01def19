"""Load a saved folder as its users will, and compare what it computes."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from elastune.errors import ElastuneError
from elastune.extract import PeftAdapter
from elastune.models.families import HETERO_PREFIX
from elastune.models.registration import AUTO_CLASSES, register

TOLERANCE = 1e-4
"""Largest difference of a logit in float32, for logits up to 10 in size; in proportion beyond."""

_OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")
_SHARE = 1e-5


def verify(
    folder: Path, model: PreTrainedModel, auto: Any, *, adapter: PeftAdapter | None = None
) -> float:
    """Return the largest difference between outputs of a saved folder and of a model in memory.

    Both run in float32 on the same random inputs, on the CPU.

    Args:
        folder: a checkpoint; its adapter is in ``folder/adapter``.
        model: what was to be saved.
        auto: the auto class to load the folder with.
        adapter: compare the model with this adapter and the folder with its own.

    Raises:
        ElastuneError: they differ by more than rounding.
    """
    loaded = auto.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    expected: Any = model
    if model.dtype != torch.float32 or model.device.type != "cpu" or adapter is not None:
        expected = copy.deepcopy(expected).to("cpu", torch.float32)
    if adapter is not None:
        with tempfile.TemporaryDirectory() as temporary:
            adapter.save(Path(temporary) / "adapter")
            expected = PeftModel.from_pretrained(expected, str(Path(temporary) / "adapter"))
        loaded = PeftModel.from_pretrained(loaded, str(folder / "adapter"))
    _round_buffers(loaded, model)
    inputs = example_inputs(model)
    pairs = list(zip(_outputs(expected, inputs), _outputs(loaded, inputs), strict=True))
    worst = max(float((a - b).abs().max()) for a, b in pairs)
    allowed = max(TOLERANCE, _SHARE * max(float(a.abs().max()) for a, _ in pairs))
    if not worst <= allowed:  # NaN, too
        raise ElastuneError(
            f"the saved model does not compute what the sub-network does: outputs differ by up to "
            f"{worst:.1e}, {allowed:.0e} is rounding; nothing was kept",
            try_="another format, and report this",
        )
    return worst


def _round_buffers(loaded: Any, model: PreTrainedModel) -> None:
    """Round what is computed from the config as a model has it that was cast as a whole."""
    rounded = {name: b.dtype for name, b in model.named_buffers() if b.is_floating_point()}
    for name, buffer in loaded.named_buffers():
        if rounded.get(name, torch.float32) != torch.float32:
            buffer.copy_(buffer.to(rounded[name]))


def auto_class(model: PreTrainedModel) -> Any:
    """Return the auto class that makes models of this class from a checkpoint."""
    config = type(model.config)
    stock_type = str(config.model_type)
    if stock_type.startswith(HETERO_PREFIX):
        register(stock_type.removeprefix(HETERO_PREFIX))
    for name in AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        if config in mapping:
            found = mapping[config]
            if type(model) in (found if isinstance(found, tuple) else (found,)):
                return getattr(transformers, name)
    return AutoModel if type(model) is type(model.base_model) else type(model)


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return random inputs: 24 tokens, or an image."""
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {
            "pixel_values": torch.randn(1, config.num_channels, height, width, generator=generator)
        }
    length = min(24, getattr(config, "max_position_embeddings", 24) or 24)
    return {"input_ids": torch.randint(config.vocab_size, (1, length), generator=generator)}


@torch.no_grad()
def _outputs(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    was_training = model.training
    model.eval()
    found = model(**inputs)
    model.train(was_training)
    return [found[name] for name in _OUTPUTS if name in found]
