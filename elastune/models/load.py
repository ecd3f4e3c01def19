"""Load a model and its tokenizer: a built-in name, a folder, a .gguf file or a hub id."""

from __future__ import annotations

import contextlib
import copy
import re
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from elastune.errors import BadArtifact, BadRecipe, ElastuneError, UnsupportedModel, nearest
from elastune.models.builtin import BUILTIN, builtin_path
from elastune.models.checkpoint import check_folder, check_numel, refuse_kernels
from elastune.models.families import record_for
from elastune.models.four_bit import compute_as_trained, nf4_config
from elastune.models.gguf import gguf_path
from elastune.models.save import save_model

__all__ = ["Head", "load_model", "save_model"]

Head = Literal["causal-lm", "base", "sequence-classification", "question-answering"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_AUTO: dict[Head, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "base": AutoModel,
    "sequence-classification": AutoModelForSequenceClassification,
    "question-answering": AutoModelForQuestionAnswering,
}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load_model(
    name: str | Path,
    *,
    dtype: str = "float32",
    device: str | None = None,
    head: Head | None = None,
    num_labels: int | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in eval mode and its tokenizer, which always has a pad token.

    Args:
        name: a built-in name (``smollm2-135m``, ``minilm-l6``), a checkpoint folder, a ``.gguf``
            file (converted once, then cached) or a hub id. A ``Path`` is never a name.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: a torch device; None leaves the model on the CPU. ``"meta"`` reads no weights: the
            model has names and shapes alone.
        head: None means ``"causal-lm"`` for decoders and ``"base"`` for encoders.
        num_labels: classes of a sequence-classification head; None keeps the checkpoint's.
        attn_implementation: as in transformers: ``"eager"``, ``"sdpa"``, ...
        trust_remote_code: run Python code that comes with the checkpoint. Off by default.
        load_in_4bit: pack the linear layers of the blocks as NF4 (bitsandbytes) while loading;
            they compute in ``dtype``. Checkpoints that are packed already need no such word.

    Raises:
        BadRecipe: an option with a value that is not allowed.
        BadArtifact: the checkpoint is missing, incomplete, corrupt or out of reach.
        UnsupportedModel: a model type that is not known, or that has no such head.
    """
    _check_options(dtype, device, head, num_labels)
    source = _resolve(name)
    config = _config(source, trust_remote_code)
    if head is None:
        is_decoder = record_for(config.model_type).kind == "decoder"
        head = "causal-lm" if is_decoder else "base"
    if head == "causal-lm" and record_for(config.model_type).kind == "encoder":
        raise UnsupportedModel(
            f"{str(name)!r} is an encoder ({config.model_type}), which generates no text",
            try_="a decoder such as smollm2-135m, or a classification or reading task",
        )
    if num_labels is not None:
        config.num_labels = num_labels
    options: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "attn_implementation": attn_implementation,
    }
    if load_in_4bit:
        options["quantization_config"] = nf4_config(DTYPES[dtype])
    if device is not None and (load_in_4bit or hasattr(config, "quantization_config")):
        options["device_map"] = {"": device}  # packed weights are placed while they are read
    if device == "meta":
        model, device = _outline(source, head, config, DTYPES[dtype], attn_implementation), None
    else:
        model = _weights(source, head, config, dtype=DTYPES[dtype], **options)
    tokenizer = _tokenizer(source, trust_remote_code)
    _ensure_pad_token(model, tokenizer)
    compute_as_trained(model)
    model.eval()
    return (model if device is None or "device_map" in options else model.to(device)), tokenizer  # type: ignore[arg-type]


def checkpoint_folder(name: str | Path) -> Path:
    """Return the folder that a model's safetensors files lie in; of the hub they are downloaded.

    Raises:
        BadArtifact: it is missing, incomplete or out of reach.
    """
    source = _resolve(name)
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        raise _explain(source, error) from error


def _check_options(
    dtype: str, device: str | None, head: str | None, num_labels: int | None
) -> None:
    if dtype not in DTYPES:
        raise BadRecipe(
            f"unknown dtype {dtype!r}{nearest(str(dtype), DTYPES)}; allowed: {', '.join(DTYPES)}",
            try_="leave dtype out to load in float32",
        )
    heads = get_args(Head)
    if head is not None and head not in heads:
        raise BadRecipe(
            f"unknown head {head!r}{nearest(str(head), heads)}; allowed: {', '.join(heads)}",
            try_="leave head out: causal-lm for decoders, base for encoders",
        )
    if num_labels is not None and (head != "sequence-classification" or num_labels < 1):
        raise BadRecipe(
            f"num_labels={num_labels} with head {head!r}: it is a count of at least 1, and only "
            "a sequence-classification head has it",
            try_='pass head="sequence-classification", or leave num_labels out',
        )
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise BadRecipe(
                f"device {device!r} cannot be used here: {_first_line(error)}", try_='device="cpu"'
            ) from error


def _resolve(name: str | Path) -> str:
    """Return a checkpoint folder on this machine, or else a hub id."""
    if isinstance(name, str) and name in BUILTIN:
        return str(builtin_path(name))
    if not isinstance(name, str | Path):
        raise BadRecipe(
            f"a model is a name or a path, got {str(name)[:80]!r}",
            try_="a built-in name, a hub id, a folder or a .gguf file",
        )
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise BadArtifact(
            f"no model at {str(name)!r}: {error}", try_="a folder that save_pretrained wrote"
        ) from error
    if path.is_file():
        if path.suffix == ".gguf":
            return str(gguf_path(path))
        raise BadArtifact(
            f"{str(path)!r} is a single file and not a .gguf file",
            try_="give the folder that holds config.json and model.safetensors",
        )
    if path.is_dir():
        check_folder(path)
        return str(path)
    text = str(name)
    if isinstance(name, Path) or path.suffix == ".gguf" or not _HUB_ID.fullmatch(text):
        raise BadArtifact(
            f"no model at {text!r}: there is no such file or folder "
            f"(looked for {str(path.absolute())!r})",
            try_=f"a checkpoint folder, a .gguf file, a hub id, or {', '.join(BUILTIN)}",
        )
    return text


def _config(source: str, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # each class of configs checks its fields in its own way
        raise _explain(source, error) from error
    if not trust_remote_code:
        refuse_kernels(config, source)
    return config


def _outline(
    source: str, head: Head, config: PreTrainedConfig, dtype: torch.dtype, attention: str | None
) -> PreTrainedModel:
    """Build a model without weights; buffers that are computed, such as frequencies, are there."""
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = _AUTO[head].from_config(
                config, dtype=dtype, attn_implementation=attention
            )
    except Exception as error:  # sizes that fit no model break wherever they are used first
        raise _explain(source, error) from error
    model.name_or_path = source
    if model.can_generate():
        with contextlib.suppress(OSError):  # most checkpoints have no such file
            model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def _weights(source: str, head: Head, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    if Path(source).is_dir() and not options["trust_remote_code"]:
        _check_size(source, head, config)
    try:
        model, found = _AUTO[head].from_pretrained(
            source,
            config=config,
            key_mapping=_renamed(head, config),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # judged below, where a new head is told from damage
            output_loading_info=True,
            **options,
        )
    except SafetensorError as error:
        raise BadArtifact(
            f"the weights of {source!r} cannot be read: {_first_line(error)}",
            try_="download or copy the checkpoint again",
        ) from error
    except Exception as error:  # sizes that fit no model break wherever they are used first
        raise _explain(source, error) from error
    _check_complete(source, model, head, found)
    return model


def _check_size(source: str, head: Head, config: PreTrainedConfig) -> None:
    """Refuse a config that asks for far more weights than the files hold."""
    try:
        with torch.device("meta"):
            model = _AUTO[head].from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception as error:
        raise _explain(source, error) from error
    check_numel(model, Path(source))


def _renamed(head: Head, config: PreTrainedConfig) -> dict[str, str] | None:
    """Return how a language model's weights are called below this head, if not as they are."""
    if head != "question-answering" or record_for(config.model_type).kind == "encoder":
        return None
    with torch.device("meta"):
        prefix = _AUTO[head].from_config(config).base_model_prefix
    # transformers calls Llama's base "transformer" here, and "model" with every other head.
    return None if prefix == "model" else {r"^model\.": f"{prefix}."}


def _check_complete(source: str, model: PreTrainedModel, head: Head, found: dict[str, Any]) -> None:
    """Refuse a checkpoint that left weights at random values, but for a head that is new."""
    prefix = f"{model.base_model_prefix}."
    wrong_shape = {entry[0] for entry in found["mismatched_keys"]}
    random = sorted(set(found["missing_keys"]) | wrong_shape)
    if head in ("sequence-classification", "question-answering"):
        random = [key for key in random if key.startswith(prefix)]
    # Checkpoints of masked language models have no pooler, and no task here needs a trained one.
    random = [key for key in random if not key.removeprefix(prefix).startswith("pooler.")]
    if random:
        shown = ", ".join(random[:4]) + (", ..." if len(random) > 4 else "")
        raise BadArtifact(
            f"the checkpoint {source!r} lacks {len(random)} tensors of a "
            f"{type(model).__name__} (or has them in another shape): {shown}",
            try_="download or copy the checkpoint again, or ask for the head it was saved with",
        )


def _tokenizer(source: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises plain Exception for a damaged tokenizer.json
        raise BadArtifact(
            f"the tokenizer of {source!r} cannot be loaded: {_first_line(error)}",
            try_="put tokenizer.json and tokenizer_config.json beside config.json",
        ) from error


def _ensure_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise BadArtifact(
            "the tokenizer has no pad, eos or unk token, so sequences cannot be padded",
            try_="set pad_token in its tokenizer_config.json",
        )
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id


def _explain(source: str, error: Exception) -> ElastuneError:
    """Return the error of this library that says what a loading error of transformers means."""
    text = str(error)
    if "trust_remote_code" in text:
        return UnsupportedModel(
            f"{source!r} comes with Python code of its own, which is not run by default",
            try_="trust_remote_code=True, if you have read that code and trust it",
        )
    if isinstance(error, OSError) and not Path(source).exists():
        return BadArtifact(
            f"no folder {source!r} here, and the hub gives no model of that name"
            f"{nearest(source, BUILTIN)}: {_first_line(error)}",
            try_="check the spelling and the network (HF_HUB_OFFLINE must not be set), or use a "
            f"folder, a .gguf file, or one of {', '.join(BUILTIN)}",
        )
    if isinstance(error, OSError):
        return BadArtifact(
            f"{source!r} cannot be loaded: {_first_line(error)}",
            try_="a checkpoint that the installed transformers loads",
        )
    return UnsupportedModel(
        f"{source!r} cannot be loaded with these options: {_first_line(error)}",
        try_="see whether its config.json names a model type, head and attention that "
        "the installed transformers has",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
