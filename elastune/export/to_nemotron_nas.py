"""``nemotron-nas``: a Llama-shaped decoder as NVIDIA's Puzzle models are saved (DeciLM).

vLLM, TensorRT-LLM and MLX read such checkpoints: the feed-forward of each block has its own width,
its attention its own number of key/value heads, and either may be missing. Query heads are the same
number in all blocks, so heads that a block lacks are zeros.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.errors import BadArtifact, ElastuneError, UnsupportedModel
from elastune.export import nemotron_nas_config, nemotron_nas_run
from elastune.export.card import CardText, card
from elastune.export.card_facts import CardFacts
from elastune.export.decoder import decoder_of, source_model
from elastune.export.saved import Saved
from elastune.export.verify import example_inputs
from elastune.files import file_digest, read_json, whole_folder, write_json, write_text
from elastune.models.blocks import BlockShape
from elastune.models.llama_shaped import (
    LlamaShaped,
    has_biases,
    with_all_biases,
    with_channels,
    with_heads,
    without_absent,
)
from elastune.subnetwork import Subnetwork
from elastune.version import __version__

_FAMILIES = ("llama", "mistral", "qwen2")
_LOADS_WITH = "vLLM (trust_remote_code=True), not run here: the check follows vLLM's rules"
_MULTIPLE = 256
_TOLERANCE = 1e-3
"""Largest difference of a logit in float32, for logits up to 10 in size; in proportion beyond."""


def export_nemotron_nas(
    source: Subnetwork | PreTrainedModel | str | Path,
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ffn_mult: bool | None = None,
    facts: CardFacts | None = None,
) -> Saved:
    """Save a Llama-shaped decoder for readers of nemotron-nas checkpoints.

    The folder is replaced whole, once a fresh process that builds every block from config.json
    alone, by vLLM's rules, computes what the model does. vLLM itself is not run.

    Args:
        source: a sub-network, a folder that `save_subnetwork` or transformers wrote, or a model;
            in float32 on the CPU.
        out: where to.
        tokenizer: saved beside it; None takes the folder's.
        ffn_mult: say widths as a multiple of the hidden size, which all readers know, but which
            allows multiples of 256 only: others are padded with zeros. False says them as
            ``intermediate_size``, which vLLM reads. None: as a multiple where nothing is padded.
        facts: for the README.md: recipe, figures and licence, as far as they are known.

    Raises:
        BadRecipe: no tokenizer, or an adapter that is not merged.
        UnsupportedModel: a family or sizes that the format cannot hold.
        ElastuneError: what was written computes something else; nothing is left of it.
    """
    model, tokenizer, name = source_model(source, tokenizer)
    shaped = decoder_of(model, _FAMILIES)
    if shaped.usable_context < shaped.context:
        raise UnsupportedModel(
            f"attention of this model looks back {shaped.window} tokens only, of nemotron-nas all",
            try_="format gguf, onnx or openvino",
        )
    held = _fitting(shaped, ffn_mult)
    by_mult = ffn_mult if ffn_mult is not None else all(b.ffn % _MULTIPLE == 0 for b in held.blocks)
    with whole_folder(out) as partial:
        _write(partial, model, held, by_mult, tokenizer)
        worst = _proved(partial)
        notes = _notes(shaped, held, by_mult)
        text = _card(Path(out).absolute().name, name, worst, notes)
        write_text(partial / "README.md", card(text, facts))
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        digests = {p.name: file_digest(p) for p in files if p.name != "README.md"}
        about = {
            "elastune": __version__,
            "format": "nemotron-nas",
            "runtime": "vllm",
            "largest_difference": worst,
            "sha256": digests,
        }
        write_json(partial / "export.json", about)
        names = tuple(sorted([*(p.name for p in files), "export.json"]))
        n_bytes = sum(p.stat().st_size for p in files if p.name != "reference.safetensors")
    n_params = sum(t.numel() for t in held.state.values())
    return Saved(
        Path(out).absolute(),
        "nemotron-nas",
        f"loads with {_LOADS_WITH}",
        worst,
        n_params,
        n_bytes,
        names,
        notes,
    )


def check_nemotron_nas(folder: str | Path) -> float:
    """Read an export in a fresh process again, and return the largest difference of a logit.

    Raises:
        BadArtifact: no such export, or one that lacks a file.
        ElastuneError: it cannot be read or computes something else, or a file changed.
    """
    folder = Path(folder).absolute()
    about = read_json(folder / "export.json")
    if about.get("format") != "nemotron-nas":
        raise BadArtifact(
            f"{folder} is an export of format {about.get('format')}",
            try_="elastune check takes an export of any format",
        )
    missing = [name for name in about["sha256"] if not (folder / name).is_file()]
    if missing:
        raise BadArtifact(f"{folder} lacks {', '.join(missing)}", try_="export it again")
    worst = _proved(folder)
    changed = [
        name for name, digest in about["sha256"].items() if file_digest(folder / name) != digest
    ]
    if changed:
        raise ElastuneError(
            f"{', '.join(changed)} changed since the export, by too little to show in its outputs",
            try_="export it again",
        )
    return worst


def _fitting(model: LlamaShaped, ffn_mult: bool | None) -> LlamaShaped:
    """Return a model with as many query heads in all blocks, padded by zeros.

    Raises:
        UnsupportedModel: no number of heads fits the config.
    """
    most = max(block.heads for block in model.blocks)
    full = model.config.num_attention_heads
    for heads in range(most, full + 1):
        # Llama's config insists on the latter.
        wanted = [_kv_heads(block, heads) for block in model.blocks]
        if heads and all(wanted) and model.hidden % heads == 0:
            break
    else:
        raise UnsupportedModel(
            f"no number of heads up to {full} holds all blocks and divides the hidden size "
            f"{model.hidden}",
            try_="format hf-hetero, onnx or openvino",
        )
    for index, kv_heads in enumerate(wanted):
        block = model.blocks[index]
        # vLLM's reader cannot begin with a block that has no attention.
        if block.heads or index == 0:
            model = with_heads(model, index, heads, kv_heads)
        if block.ffn and ffn_mult:
            model = with_channels(model, index, -(-block.ffn // _MULTIPLE) * _MULTIPLE)
    # Readers make no room for the norm of a half that is missing, and have biases in all or none.
    return without_absent(with_all_biases(model))


def _kv_heads(block: BlockShape, heads: int) -> int:
    """Return the fewest key/value heads that divide the query heads and serve a block; 0: none."""
    if not block.heads:
        return 1
    group = block.heads // block.kv_heads
    fitting = (n for n in range(block.kv_heads, heads + 1) if heads % n == 0)
    return next((n for n in fitting if heads // n >= group), 0)


def _write(
    folder: Path,
    model: PreTrainedModel,
    held: LlamaShaped,
    by_mult: bool,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write config, weights, tokenizer, and the inputs and logits of the torch model."""
    state = {n: t.contiguous().clone() for n, t in held.state.items()}
    text = json.dumps(_config(held, by_mult), indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    source = Path(nemotron_nas_config.__file__).read_text(encoding="utf-8")
    (folder / "configuration_decilm.py").write_text(source, encoding="utf-8")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    ids = example_inputs(model)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    save_file({"input_ids": ids, "logits": logits}, folder / "reference.safetensors")


def _config(model: LlamaShaped, by_mult: bool) -> dict[str, Any]:
    stock = model.config
    rope = dict(stock.rope_parameters)
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
    config = {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "model_type": "nemotron-nas",
        "attention_bias": has_biases(model, "attention"),
        "mlp_bias": has_biases(model, "feed-forward"),
        "block_configs": [_block(model, block, by_mult) for block in model.blocks],
        "dtype": "float32",
        "torch_dtype": "float32",
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "max_position_embeddings": model.context,
        "num_attention_heads": max(block.heads for block in model.blocks),
        "num_hidden_layers": len(model.blocks),
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "tie_word_embeddings": model.is_tied,
        "vocab_size": model.vocab_size,
    }
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return config | {name: getattr(stock, name, None) for name in kept}


def _block(model: LlamaShaped, block: BlockShape, by_mult: bool) -> dict[str, Any]:
    """Return what a block's entry says, in the words of NVIDIA's own checkpoints."""
    ffn: dict[str, Any] = {"no_op": not block.ffn, "replace_with_linear": False, "sparsify": None}
    if by_mult:
        ffn["ffn_mult"] = 3 * block.ffn / (2 * model.hidden) if block.ffn else None
    else:
        ffn["intermediate_size"] = block.ffn or None
    return {
        "attention": {
            "n_heads_in_group": block.heads // block.kv_heads if block.heads else None,
            "no_op": not block.heads,
            "num_sink_tokens": None,
            "replace_with_linear": False,
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        },
        "ffn": ffn,
    }


def _proved(folder: Path) -> float:
    """Compute in a fresh process, and return the largest difference from the torch model."""
    try:
        expected = load_file(folder / "reference.safetensors")["logits"]
    except Exception as error:
        raise BadArtifact(
            f"{folder}/reference.safetensors cannot be read: {error}", try_="export it again"
        ) from error
    found = _fresh_logits(folder)
    worst = float((expected - found).abs().max())
    allowed = _TOLERANCE * max(1.0, float(expected.abs().max()) / 10)
    if not worst <= allowed:  # NaN, too
        raise ElastuneError(
            f"the checkpoint does not compute what the model does: logits differ by up to "
            f"{worst:.1e}, {allowed:.0e} is allowed",
            try_="export it again",
        )
    return worst


def _fresh_logits(folder: Path) -> torch.Tensor:
    """Return what a fresh process reads the folder to compute."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "found.safetensors"
        command = [sys.executable, "-IB", nemotron_nas_run.__file__, str(folder), str(out)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=dict(os.environ)
        )
        if done.returncode != 0 or not out.is_file():
            lines = done.stderr.strip().splitlines()
            said = lines[-1] if lines else f"exit code {done.returncode}"
            raise ElastuneError(
                f"the checkpoint cannot be read as it was written: {said}",
                try_="free disk space, and export it again",
            )
        return load_file(out)["logits"]


def _notes(model: LlamaShaped, held: LlamaShaped, by_mult: bool) -> tuple[str, ...]:
    notes = ["vLLM was not run: the check reads the folder by vLLM's rules, in plain torch."]
    padded = sum(a[:2] != b[:2] for a, b in zip(model.blocks, held.blocks, strict=True))
    if padded:
        notes.append(
            f"All blocks have {max(b.heads for b in held.blocks)} query heads here; {padded} of "
            f"{len(held.blocks)} are padded with heads of zeros, which cost what others do."
        )
    wider = sum(a.ffn != b.ffn for a, b in zip(model.blocks, held.blocks, strict=True))
    if wider:
        notes.append(f"{wider} feed-forwards are padded with zeros to a multiple of {_MULTIPLE}.")
    if not by_mult:
        notes.append(
            "Widths are written as intermediate_size, which vLLM reads; TensorRT-LLM, MLX and the "
            "converter of llama.cpp know ffn_mult only (ffn_mult=True pads widths to 256)."
        )
    return tuple(notes)


def _card(title: str, name: str, worst: float, notes: tuple[str, ...]) -> CardText:
    proof = (
        f"Built block by block from config.json in a fresh process: largest difference of a logit "
        f"from the torch model {worst:.1e}."
    )
    return CardText(
        title=title,
        about=f"{name}, exported with elastune {__version__} as a nemotron-nas checkpoint "
        "(DeciLM).",
        loads_with="vLLM, which reads the config by the file configuration_decilm.py in this "
        "folder",
        code=f"vllm serve {title} --trust-remote-code",
        language="sh",
        parts=[proof, *notes],
        tags=["nemotron-nas"],
    )
