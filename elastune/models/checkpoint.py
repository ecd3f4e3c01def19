"""Check a checkpoint folder before loading it, so that damage is reported by file name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from elastune.errors import BadArtifact, UnsupportedModel
from elastune.files import refuse_outside
from elastune.json_text import parse_json

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_MOST_LABELS = 10**6
_ROOM = 16
_MARGIN = 2**26
"""Weights that a model may always have beyond `_ROOM` times those in its files."""


def check_folder(folder: Path) -> None:
    """Raise unless ``folder`` holds a config and complete safetensors files.

    Only headers are read: a header tells the length the file must have.

    Raises:
        BadArtifact: a file is missing, truncated or not what its name says; the file is named.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise BadArtifact(
            f"the folder {str(folder)!r} has no config.json, so it is not a model checkpoint"
            + ("; it holds a PEFT adapter" if adapter else ""),
            try_="give the base model's folder and merge or load the adapter onto it"
            if adapter
            else "give the folder written by save_pretrained",
        )
    config = _read_json(config_file)
    n_tensors = sum(map(_check_header, weight_files(folder)))
    for name, most in {**dict.fromkeys(_LAYERS, n_tensors), "num_labels": _MOST_LABELS}.items():
        count = config.get(name)
        # transformers counts up to these before it sees a weight.
        if isinstance(count, int) and count > most:
            raise BadArtifact(
                f"{str(config_file)!r} says {name} {count}, of {n_tensors} tensors in all",
                try_="download or copy the checkpoint again",
            )


def check_numel(model: nn.Module, folder: Path) -> None:
    """Make sure that a model is no larger than its files make likely, before memory is taken.

    Args:
        model: built of the folder's config on the meta device.
        folder: of a checkpoint that `check_folder` found good.

    Raises:
        BadArtifact: it is.
    """
    stored = 0
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            shapes = (tensors.get_slice(name).get_shape() for name in tensors.keys())  # noqa: SIM118
            stored += sum(map(math.prod, shapes))
    wanted = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    # A packed weight of 4 bits stands for eight; heads and tied tables may be made anew.
    if wanted > _ROOM * stored + _MARGIN:
        raise BadArtifact(
            f"the config of {str(folder)!r} asks for {wanted:,} weights, its files hold {stored:,}",
            try_="download or copy the checkpoint again",
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that make up the checkpoint, each of them present.

    Raises:
        BadArtifact: there are none, or a shard that the index lists is missing.
    """
    index_file = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index_file.is_file():
        pickled = any(folder.glob("pytorch_model*.bin"))
        raise BadArtifact(
            f"the folder {str(folder)!r} has no model.safetensors"
            + ("; pickled weights (pytorch_model.bin) are not loaded" if pickled else ""),
            try_="save it again with save_pretrained of a current transformers",
        )
    weight_map = _read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadArtifact(
            f"{str(index_file)!r} has no weight_map",
            try_="download or copy the checkpoint again",
        )
    refuse_outside(folder, weight_map.values())
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise BadArtifact(
                f"the index lists {file.name!r}, but {str(file)!r} is missing",
                try_="download or copy the checkpoint again",
            )
    return files


def _check_header(file: Path) -> int:
    """Return how many tensors a file holds."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return len(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise BadArtifact(
            f"{str(file)!r} is truncated or corrupt ({file.stat().st_size} bytes): {error}",
            try_="download or copy this file again",
        ) from error


def refuse_kernels(config: Any, source: str) -> None:
    """Make sure that a config asks for no attention from the hub: that would be code of others.

    Raises:
        UnsupportedModel: it does.
    """
    named = str(getattr(config, "_attn_implementation", None) or "")
    if "/" in named:
        raise UnsupportedModel(
            f"the config of {source!r} asks for the attention code {named!r} of the hub",
            try_="remove attn_implementation from its config.json",
        )


def _read_json(file: Path) -> dict:
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadArtifact(
            f"{str(file)!r} is not readable JSON: {error}", try_="copy this file again"
        ) from error
    if not isinstance(value, dict):
        raise BadArtifact(
            f"{str(file)!r} holds a {type(value).__name__}, not an object",
            try_="copy this file again",
        )
    return value
