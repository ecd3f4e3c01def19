"""Turn a GGUF file (llama.cpp) into a checkpoint folder with float32 weights.

transformers can read GGUF, but cannot save what it read, loses how some tokenizers split digits,
and takes half a minute for a small model. Here the result is an ordinary checkpoint with the
token ids of llama.cpp, made once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from elastune.errors import BadArtifact, ElastuneError, UnsupportedModel
from elastune.models.cache import build_once, cache_folder
from elastune.models.gguf_header import check_gguf_header
from elastune.models.save import save_model

logger = logging.getLogger("elastune")

#: Raise this when the result of a conversion changes, so that cached ones are made again.
CONVERSION = 1

#: Architectures (``general.architecture``) whose tensors are those of transformers, renamed.
_RENAMED_ONLY = ("llama", "qwen2", "qwen3")

#: ``tokenizer.ggml.pre`` values for which llama.cpp cuts every digit off before the GPT-2 split.
_SINGLE_DIGITS = (
    "smollm",
    "starcoder",
    "refact",
    "command-r",
    "codeshell",
    "exaone",
    "minerva-7b",
)

#: Values whose split transformers rebuilds itself, compared with llama.cpp on the same vocabulary.
_SPLIT_RIGHT = (
    *("gpt-2", "olmo", "mpt", "llama-bpe", "llama3", "llama-v3", "qwen2", "deepseek-r1-qwen"),
    *("qwen35", "tekken", "gpt-4o"),
)


def gguf_path(gguf_file: str | Path) -> Path:
    """Return the checkpoint folder of a GGUF file, converted at first use and then cached.

    Raises:
        ElastuneError: as ``convert_gguf``.
    """
    file = Path(gguf_file).expanduser().resolve()
    stat = file.stat()
    identity = f"{file}\n{stat.st_size}\n{stat.st_mtime_ns}\n{CONVERSION}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = cache_folder() / "gguf" / f"{file.stem}-{key}"
    return build_once(folder, lambda temporary: convert_gguf(file, temporary))


def convert_gguf(gguf_file: str | Path, out_folder: str | Path) -> None:
    """Write the model and tokenizer of a GGUF file as a checkpoint with float32 weights.

    Token ids, special tokens, chat template and rotary frequencies are those of the file.

    Raises:
        ElastuneError: the ``gguf`` package is missing.
        BadArtifact: the file is missing, truncated or not GGUF.
        UnsupportedModel: an architecture that is not known, or a tensor that would be lost.
    """
    file = Path(gguf_file).absolute()
    logger.info("converting %s to safetensors (once)", file.name)
    reader = _reader(file)
    here = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    blocks = f"{_field(reader, 'general.architecture')}.block_count"
    with _fitting(file):
        if int(_field(reader, blocks) or 0) > len(reader.tensors):
            raise ValueError(f"{blocks} is {_field(reader, blocks)}")
    try:
        config = AutoConfig.from_pretrained(**here, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(**here, trust_remote_code=False)
    except Exception as error:  # fields of other kinds than it expects break it anywhere
        raise UnsupportedModel(
            f"{file.name!r} is GGUF of architecture {_field(reader, 'general.architecture')!r}, "
            f"which the installed transformers cannot read: {error}",
            try_="use the model's safetensors checkpoint",
        ) from error
    with _fitting(file):
        _split_as_llama_cpp(tokenizer, reader)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        _check_numel(reader, config, file)
        if _field(reader, "general.architecture") in _RENAMED_ONLY:
            model = _model(reader, config)
        else:
            model = _model_through_transformers(here, config)
    save_model(model, tokenizer, out_folder)


@contextmanager
def _fitting(file: Path) -> Iterator[None]:
    """Turn what is raised where header and tensors do not fit each other into one message."""
    try:
        yield
    except ElastuneError:
        raise
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadArtifact(
            f"the header of {str(file)!r} does not fit its tensors: {said}",
            try_="download or copy this file again",
        ) from error


def _check_numel(reader: Any, config: PreTrainedConfig, file: Path) -> None:
    """Refuse a header that asks for more weights than the file holds, before memory is taken."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(int(tensor.n_elements) for tensor in reader.tensors)
    if wanted > 2 * stored:  # the head may be the word embedding once more
        raise BadArtifact(
            f"the header of {str(file)!r} asks for {wanted:,} weights, the file holds {stored:,}",
            try_="download or copy this file again",
        )


def _reader(file: Path) -> Any:
    if importlib.util.find_spec("gguf") is None:
        raise ElastuneError(
            f"reading {file.name!r} needs the package gguf, which is not installed",
            try_="pip install 'elastune[gguf]'",
        )
    from gguf import GGUFReader

    if not file.is_file():
        raise BadArtifact(f"no GGUF file at {str(file)!r}", try_="check the path")
    try:
        check_gguf_header(file)
        return GGUFReader(file)
    except Exception as error:  # its reader checks nothing, and breaks in numpy
        raise BadArtifact(
            f"{str(file)!r} is truncated or not a GGUF file ({file.stat().st_size} bytes): {error}",
            try_="download or copy this file again",
        ) from error


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _split_as_llama_cpp(tokenizer: PreTrainedTokenizerBase, reader: Any) -> None:
    """Give a byte-level BPE tokenizer the split that the file names in ``tokenizer.ggml.pre``."""
    if _field(reader, "tokenizer.ggml.model") != "gpt2":
        return
    split = _field(reader, "tokenizer.ggml.pre")
    if split in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif split not in _SPLIT_RIGHT:
        logger.warning(
            "the tokenizer's pre-tokenizer %r is not one that was compared with llama.cpp; "
            "token ids may differ from it",
            split,
        )


def _model(reader: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model with every tensor of the file dequantised into it.

    transformers builds the table of names once per submodule and parses the header three times;
    doing both once is most of the difference in speed.
    """
    from gguf import MODEL_ARCH_NAMES, dequantize, get_tensor_name_map

    architecture = _field(reader, "general.architecture")
    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    state = model.state_dict()
    for name, parameter in state.items():
        module, _, suffix = name.rpartition(".")
        tensor = stored.pop(f"{names.get_name(module)}.{suffix}", None)
        if tensor is None:
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            raise BadArtifact(
                f"the GGUF file has no tensor for {name!r}", try_="download the file again"
            )
        # A copy: what the reader returns for unquantised tensors is the read-only file itself.
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        if architecture == "llama":
            values = _undo_interleaving(name, values, config)
        parameter.copy_(values)
    if stored:
        raise UnsupportedModel(
            f"the GGUF file has tensors with no place in a {type(model).__name__}, which the "
            f"conversion would lose: {', '.join(sorted(stored)[:4])}",
            try_="use the model's safetensors checkpoint",
        )
    return model


def _undo_interleaving(name: str, values: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Put the rows of q and k back in the order of transformers.

    llama.cpp rotates neighbouring rows (2i, 2i+1) of a head, transformers rows (i, i + half).
    """
    if ".q_proj." in name:
        heads = config.num_attention_heads
    elif ".k_proj." in name:
        heads = config.num_key_value_heads
    else:
        return values
    half = values.shape[0] // heads // 2
    pairs = values.reshape(heads, half, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


def _model_through_transformers(here: dict[str, str], config: PreTrainedConfig) -> PreTrainedModel:
    """Return a fresh, savable model with the weights that transformers reads from the file."""
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            **here, dtype=torch.float32, trust_remote_code=False
        )
    except (ValueError, NotImplementedError) as error:
        raise UnsupportedModel(
            f"transformers cannot read {here['gguf_file']!r}: {error}",
            try_="use the model's safetensors checkpoint",
        ) from error
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    return model
