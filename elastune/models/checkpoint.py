"""Check a checkpoint folder before loading it, so that damage is reported by file name."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from elastune.errors import BadArtifact


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
    _read_json(config_file)
    for file in weight_files(folder):
        _check_header(file)


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
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise BadArtifact(
                f"the index lists {file.name!r}, but {str(file)!r} is missing",
                try_="download or copy the checkpoint again",
            )
    return files


def _check_header(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise BadArtifact(
            f"{str(file)!r} is truncated or corrupt ({file.stat().st_size} bytes): {error}",
            try_="download or copy this file again",
        ) from error


def _read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
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
