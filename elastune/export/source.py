"""What is exported: a sub-network, a model or a folder, as one model with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from elastune.errors import BadArtifact, BadRecipe, UnsupportedModel
from elastune.files import read_json
from elastune.models.blocks import blocks
from elastune.models.checkpoint import check_folder
from elastune.models.registration import AUTO_CLASSES
from elastune.space import SubnetConfig
from elastune.subnetwork import Subnetwork

Exportable = Subnetwork | PreTrainedModel | str | Path


@dataclass(frozen=True)
class Loaded:
    """A folder's model, in float32.

    Attributes:
        model: with the folder's adapter merged, where it has one.
        tokenizer: of the folder, or of the base that an adapter names.
        name: for readers.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str


def load_folder(folder: str | Path) -> Loaded:
    """Load a checkpoint, a checkpoint with an adapter beside it, or an adapter and its base.

    Raises:
        BadArtifact: neither, or files that are missing or damaged.
        UnsupportedModel: no auto class makes such a model.
    """
    folder = Path(folder)
    if is_adapter(folder):
        base = base_of(folder)
        adapter, name = folder, f"{base.name} with the adapter {folder.name} merged"
    else:
        check_folder(folder)
        base = folder
        adapter, name = folder / "adapter", folder.resolve().name
        if is_adapter(adapter):
            name += " with its adapter merged"
    model = load_any(base)
    if is_adapter(adapter):
        check_adapter(adapter)
        try:
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        except Exception as error:  # each kind of adapter checks its config in its own way
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UnsupportedModel(
                f"PEFT cannot merge the adapter {adapter}: {lines[0]}",
                try_="the adapter and the base that were saved together",
            ) from error
    homes = (home for home in (folder, base) if (home / "tokenizer_config.json").is_file())
    home = next(homes, None)
    tokenizer = None if home is None else load_tokenizer(home)
    return Loaded(model, tokenizer, name)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder; code of its own is not run.

    Raises:
        BadArtifact: it cannot be loaded.
    """
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises plain Exception for a damaged tokenizer.json
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadArtifact(
            f"the tokenizer of {str(folder)!r} cannot be loaded: {lines[0]}",
            try_="put tokenizer.json and tokenizer_config.json beside config.json",
        ) from error
    return found


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder is an adapter as PEFT saves it."""
    return (folder / "adapter_config.json").is_file()


def check_adapter(folder: Path) -> None:
    """See that loading an adapter is reading safetensors, and imports nothing that it names.

    Raises:
        BadArtifact: its weights are pickled, missing or damaged.
        UnsupportedModel: its config names a module for PEFT to import.
    """
    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, dict):
        raise BadArtifact(f"{folder}/adapter_config.json is no JSON object", try_="copy it again")
    if config.get("megatron_config"):
        raise UnsupportedModel(
            f"the adapter {folder} is for Megatron, a module that its config names",
            try_="merge it with PEFT, where you trust it",
        )
    file = folder / "adapter_model.safetensors"
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise BadArtifact(
            f"{file} is missing or damaged; pickled weights are not loaded: {error}",
            try_="load it with PEFT and save_pretrained it again",
        ) from error


def base_of(adapter: Path) -> Path:
    """Return the folder of the base that an adapter names.

    Raises:
        BadArtifact: it names none, or one that is not on this machine.
    """
    config = read_json(adapter / "adapter_config.json")
    named = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not named or not isinstance(named, str) or not Path(named).is_dir():
        raise BadArtifact(
            f"the base of the adapter {adapter} is {named or 'not named'}, which is no folder here",
            try_="put the folder of the base into its adapter_config.json as "
            "base_model_name_or_path",
        )
    check_folder(Path(named))
    return Path(named)


def read_model(
    source: Exportable, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, str]:
    """Return a float32 model on the CPU, its tokenizer and its name.

    Raises:
        BadRecipe: a sub-network whose adapter is not merged, or a model in half precision.
        BadArtifact: a folder that holds no model, or one that is damaged.
    """
    if isinstance(source, Subnetwork | PreTrainedModel):
        model = source.model if isinstance(source, Subnetwork) else source
        name = Path(str(model.config.name_or_path or "")).name or type(model).__name__
        if isinstance(source, Subnetwork) and source.adapter is not None:
            raise BadRecipe(
                f"the adapter of {name} is not merged, and this format holds one model",
                try_="extract_model(net, config, merge=True)",
            )
    else:
        loaded = load_folder(source)
        model, name = loaded.model, loaded.name
        tokenizer = tokenizer or loaded.tokenizer
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise BadRecipe(
            f"the model is {model.dtype} on {model.device}; it is exported from float32 on the CPU",
            try_='model.to("cpu", torch.float32)',
        )
    model.eval()
    return model, tokenizer, name


def read_subnetwork(
    source: Exportable, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Subnetwork, PreTrainedTokenizerBase]:
    """Return a source as a sub-network, whose blocks are counted as they are now.

    Raises:
        BadRecipe: no tokenizer.
    """
    if isinstance(source, Subnetwork):
        sub = source
    else:
        config = SubnetConfig({})
        if isinstance(source, PreTrainedModel):
            model = source
        else:
            loaded = load_folder(source)
            model, tokenizer = loaded.model, tokenizer or loaded.tokenizer
            file = Path(source) / "subnet.json"
            if file.is_file():
                config = SubnetConfig.from_json(file.read_text(encoding="utf-8"))
        model.eval()
        shapes = tuple(block.shape for block in blocks(model))
        sub = Subnetwork(config, model, shapes, tuple(range(len(shapes))))
    if tokenizer is None:
        raise BadRecipe("there is no tokenizer, which is part of this format", try_="tokenizer=")
    return sub, tokenizer


def load_any(folder: Path) -> PreTrainedModel:
    """Load a checkpoint with the head that its config names, in float32.

    Raises:
        UnsupportedModel: no auto class makes that class.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a config may break in the class of any model
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedModel(
            f"{folder} cannot be loaded: {lines[0]}",
            try_="a folder that elastune or save_pretrained wrote whole",
        ) from error
    wanted = (config.architectures or [None])[0]
    for name in AUTO_CLASSES:
        auto = getattr(transformers, name)
        found = auto._model_mapping.get(type(config), ())
        for cls in found if isinstance(found, tuple) else (found,):
            if cls.__name__ == wanted:
                try:
                    model: PreTrainedModel = auto.from_pretrained(
                        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
                    )
                except Exception as error:
                    lines = str(error).strip().splitlines() or [type(error).__name__]
                    raise BadArtifact(
                        f"{folder} cannot be loaded: {lines[0]}",
                        try_="a folder that elastune or save_pretrained wrote whole",
                    ) from error
                return model
    raise UnsupportedModel(
        f"{folder} holds a {wanted}, which no class here loads",
        try_="a model with a head for language modelling, classification or question answering",
    )
