"""Write a model and its tokenizer as a checkpoint folder that old and new readers understand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.files import whole_folder


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path
) -> None:
    """Save ``model`` and ``tokenizer`` to ``folder``, replacing what was there.

    Weights are safetensors, exact zeros included. ``config.json`` repeats the rotary settings in
    the places where transformers 4 looks for them, and the tokenizer is spelled so that older
    ``tokenizers`` can read it. Everything is written to a temporary sibling and renamed, so a
    killed process leaves the old folder or the new one.
    """
    with whole_folder(folder) as temporary:
        write_model(model, tokenizer, temporary)


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write what `save_model` does into an existing folder, which the caller makes whole.

    Args:
        state: weights as they are to be stored, where that is not as the model has them.
    """
    model.save_pretrained(folder, state_dict=state)
    _write_tokenizer(tokenizer, folder)


def write_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write what `write_model` does but for the weights, which may be on the meta device."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    _write_tokenizer(tokenizer, folder)


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer, and spell it and the config so that older readers understand them."""
    # The template inside tokenizer_config.json is read by every version.
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    _repeat_rope_settings(folder / "config.json")
    _spell_tokenizer_plainly(folder)


def _repeat_rope_settings(config_file: Path) -> None:
    """Add ``rope_theta`` and kin to a config that has only the nested ``rope_parameters``.

    Without them transformers 4 falls back to its own default frequencies, silently.
    """
    config = json.loads(config_file.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    by_layer = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
    for layer_type, old_name in by_layer.items():
        if isinstance(rope.get(layer_type), dict) and "rope_theta" in rope[layer_type]:
            config[old_name] = rope[layer_type]["rope_theta"]
    _write_json(config_file, config)


def _spell_tokenizer_plainly(folder: Path) -> None:
    """Name the class and write the merges in the spelling that every ``tokenizers`` reads."""
    settings_file = folder / "tokenizer_config.json"
    if settings_file.exists():
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            _write_json(settings_file, settings)
    tokenizer_file = folder / "tokenizer.json"
    if tokenizer_file.exists():
        tokenizer = json.loads(tokenizer_file.read_text(encoding="utf-8"))
        merges = tokenizer["model"].get("merges")
        # A merge whose half holds a space can only be written as a pair.
        if merges and all(isinstance(m, list) and " " not in "".join(m) for m in merges):
            tokenizer["model"]["merges"] = [" ".join(merge) for merge in merges]
            _write_json(tokenizer_file, tokenizer)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
