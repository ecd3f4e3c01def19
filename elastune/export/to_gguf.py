"""``gguf``: one file for llama.cpp and what is built on it, proved by llama.cpp.

Blocks of one size are written as the family's own architecture, others as ``deci``, the only one
of llama.cpp's Llama-shaped architectures that reads a size for each block.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.errors import BadArtifact, BadRecipe, ElastuneError, nearest
from elastune.export import gguf_run
from elastune.export.base import factorised_embedding
from elastune.export.card import CardText, card
from elastune.export.card_facts import CardFacts
from elastune.export.decoder import decoder_of, source_model
from elastune.export.gguf_check import (
    TEXTS,
    TOLERANCES,
    Found,
    agreement,
    complaint,
    run_fresh,
)
from elastune.export.gguf_file import WEIGHTS, Written, write_gguf
from elastune.export.gguf_tokenizer import GgufVocabulary, gguf_vocabulary
from elastune.export.reference import N_NEW, PROMPTS, Agreement
from elastune.export.runtimes import RuntimeExport
from elastune.files import file_digest, read_json, whole_folder, write_json, write_text
from elastune.models.llama_shaped import LlamaShaped
from elastune.subnetwork import Subnetwork
from elastune.version import __version__

FILE = "model.gguf"

_N_CTX = 256
"""Tokens that prompts and their continuations may have, in the proof."""

_N_KEPT = 512
"""Likeliest tokens of the torch model that are stored for each step."""

_CHAT = [{"role": "user", "content": "How many legs does a spider have?"}]


def export_gguf(
    source: Subnetwork | PreTrainedModel | str | Path,
    out: str | Path,
    *,
    weights: str = "float32",
    tokenizer: PreTrainedTokenizerBase | None = None,
    pre: str | None = None,
    facts: CardFacts | None = None,
) -> RuntimeExport:
    """Export a Llama-shaped decoder as GGUF, and prove it in a fresh process by llama.cpp.

    The folder is replaced whole, once every tensor reads back as it was meant, and llama.cpp cuts
    texts into the same tokens and gives the tokens after three prompts the same probabilities.

    Args:
        source: a sub-network, a folder that `save_subnetwork` or transformers wrote, or a model;
            in float32 on the CPU.
        out: where to.
        weights: one of `WEIGHTS`.
        tokenizer: fast, with BPE; None takes the folder's.
        pre: llama.cpp's name for how the tokenizer cuts a text, where it is not known here.
        facts: for the README.md: recipe, figures and licence, as far as they are known.

    Raises:
        BadRecipe: unknown weights, a missing package, no tokenizer, an adapter not merged.
        UnsupportedModel: a family, a tokenizer or sizes that llama.cpp cannot hold.
        ElastuneError: llama.cpp computes something else; nothing is left of the export.
    """
    weights = _weights(weights)
    model, tokenizer, name = source_model(source, tokenizer)
    shaped = decoder_of(model)
    vocabulary = gguf_vocabulary(tokenizer, shaped.vocab_size, pre=pre)
    with whole_folder(out) as partial:
        started = time.monotonic()
        written = write_gguf(shaped, vocabulary, partial / FILE, weights=weights, name=name)
        seconds = time.monotonic() - started
        about = _record(partial, shaped, vocabulary, written, weights, tokenizer)
        _save(partial, _reference(model, written, weights, tokenizer, shaped))
        write_json(partial / "export.json", about)
        found = _proved(partial, about)
        agreed = agreement(_stored(partial), found)
        write_json(partial / "export.json", about | {"agreement": asdict(agreed)})
        notes = _notes(shaped, vocabulary, written, weights, about, found)
        title = Path(out).absolute().name
        text = _card(title, name, weights, written, agreed, notes)
        write_text(partial / "README.md", card(text, facts))
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        n_bytes = sum(p.stat().st_size for p in files if p.name != "reference.safetensors")
    return RuntimeExport(
        Path(out).absolute(),
        "gguf",
        weights,
        "llama.cpp",
        agreed,
        n_bytes,
        tuple(p.name for p in files),
        seconds,
        _EXAMPLE,
        notes,
    )


def check_gguf(folder: str | Path) -> Agreement:
    """Read an export again and run it in a fresh process; compare with what was recorded.

    Raises:
        BadArtifact: no such export, or one that lacks a file.
        ElastuneError: llama.cpp cannot run it or computes something else, or the file changed.
    """
    folder = Path(folder).absolute()
    about = read_json(folder / "export.json")
    if about.get("format") != "gguf":
        raise BadArtifact(
            f"{folder} is an export of format {about.get('format')}, not gguf",
            try_="elastune check takes an export of any format",
        )
    missing = [n for n in (FILE, "reference.safetensors") if not (folder / n).is_file()]
    if missing:
        raise BadArtifact(f"{folder} lacks {', '.join(missing)}", try_="export it again")
    stored = _stored(folder)
    found = _proved(folder, about)
    if file_digest(folder / FILE) != about["sha256"][FILE]:
        raise ElastuneError(
            f"{FILE} changed since the export, though not in its tensors",
            try_="export it again",
        )
    return agreement(stored, found)


def _proved(folder: Path, about: Any) -> Found:
    found = run_fresh(folder)
    why = complaint(about, _stored(folder), found)
    if why is not None:
        raise ElastuneError(
            f"llama.cpp does not compute what the model does: {why}",
            try_="export it again; if that fails too, another format",
        )
    return found


def _weights(weights: str) -> str:
    if weights not in WEIGHTS:
        raise BadRecipe(
            f"format gguf has no weights {weights!r}{nearest(weights, WEIGHTS)}; known are "
            f"{', '.join(WEIGHTS)}",
            try_="float16 for all there is, q8_0 for half of that",
        )
    missing = [p for p in ("gguf", "xllamacpp") if importlib.util.find_spec(p) is None]
    if missing:
        raise BadRecipe(
            f"format gguf needs {', '.join(missing)}, which is not installed",
            try_=f"pip install {' '.join(missing)}",
        )
    return weights


def _record(
    folder: Path,
    model: LlamaShaped,
    vocabulary: GgufVocabulary,
    written: Written,
    weights: str,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Return what ``export.json`` says."""
    # llama.cpp does not normalise Unicode; texts that this would change cannot be compared.
    texts = [text for text in TEXTS if _is_normal(tokenizer, text)]
    chat = None
    if vocabulary.chat_template is not None:
        text = tokenizer.apply_chat_template(_CHAT, tokenize=False, add_generation_prompt=True)
        chat = {"messages": _CHAT, "text": text}
    return {
        "elastune": __version__,
        "format": "gguf",
        "runtime": "llama.cpp",
        "file": FILE,
        "weights": weights,
        "model": model.family,
        "architecture": written.architecture,
        "blocks": [list(block) for block in written.blocks],
        "tolerance": TOLERANCES[weights]._asdict(),
        "n_prompts": len(PROMPTS) + 1,
        "n_ctx": min(_N_CTX, model.usable_context),
        "plain_id": tokenizer("a", add_special_tokens=False)["input_ids"][0],
        "texts": texts,
        "token_ids": [tokenizer(text)["input_ids"] for text in texts],
        "chat": chat,
        "tensors": dict(written.digests),
        "sha256": {FILE: file_digest(folder / FILE)},
    }


def _is_normal(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    normalizer = backend.normalizer
    if normalizer is None or "NF" not in type(normalizer).__name__:
        return True
    return bool(normalizer.normalize_str(text) == text)


@torch.no_grad()
def _reference(
    model: PreTrainedModel,
    written: Written,
    weights: str,
    tokenizer: PreTrainedTokenizerBase,
    shaped: LlamaShaped,
) -> dict[str, np.ndarray]:
    """Return prompts, greedy tokens of the model with rounded weights, and log-probabilities.

    Those of the rounded model are what llama.cpp must give; those of the model itself tell what
    rounding costs.
    """
    is_rounded = weights != "float32"
    rounded = _with(model, written.rounded) if is_rounded else model
    generator = torch.Generator().manual_seed(0)
    plain = torch.randint(min(3, shaped.vocab_size), shaped.vocab_size, (24,), generator=generator)
    texts = [torch.tensor(tokenizer(text)["input_ids"]) for text in PROMPTS]
    room = min(_N_CTX, shaped.usable_context)
    n_new = min(N_NEW, room // 2)
    arrays: dict[str, np.ndarray] = {}
    for number, whole in enumerate([*texts, plain]):
        prompt = ids = whole[: room - n_new]
        for _ in range(n_new):
            ids = torch.cat([ids, rounded(ids[None]).logits[0, -1:].argmax(-1)])
        key = f"prompt{number}."
        arrays[f"{key}input_ids"] = prompt.numpy()
        arrays[f"{key}new_ids"] = ids[len(prompt) :].numpy()
        runs = {"": rounded} | ({"own.": model} if is_rounded else {})
        for kind, run in runs.items():
            logprobs = run(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            top = logprobs.topk(min(_N_KEPT, logprobs.shape[-1]))
            arrays[f"{key}{kind}ids"] = top.indices.numpy()
            arrays[f"{key}{kind}logprobs"] = top.values.numpy()
    return arrays


def _with(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """Return a copy of a model with other weights."""
    made: Any = copy.deepcopy(model)
    if factorised_embedding(made) is not None:
        table = weights["model.embed_tokens.weight"]
        made.set_input_embeddings(nn.Embedding.from_pretrained(table))
    own = made.state_dict()
    # Padding has no place in it.
    fitting = {n: w for n, w in weights.items() if n in own and own[n].shape == w.shape}
    made.load_state_dict(fitting, strict=False)
    return made  # type: ignore[no-any-return]


def _stored(folder: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(folder / "reference.safetensors")
    except Exception as error:
        raise BadArtifact(
            f"{folder}/reference.safetensors cannot be read: {error}", try_="export it again"
        ) from error


def _save(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    held = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    save_file(held, folder / "reference.safetensors")


def _notes(
    model: LlamaShaped,
    vocabulary: GgufVocabulary,
    written: Written,
    weights: str,
    about: Any,
    found: Found,
) -> tuple[str, ...]:
    notes = []
    if written.architecture == "deci":
        notes.append(
            "Blocks differ in size, so the file is of llama.cpp's architecture deci; programs that "
            "know llama files but not deci cannot read it."
        )
    if written.blocks != model.blocks:
        notes.append(
            "llama.cpp needs an attention in the first block and a feed-forward in every block: "
            "absent ones are written as a few zeros."
        )
    if written.fallbacks:
        notes.append(
            f"{len(written.fallbacks)} of {len(written.digests)} tensors are float16: their rows "
            f"are no whole number of groups of {weights}."
        )
    if model.usable_context < model.context:
        notes.append(
            f"Attention of the model looks back {model.window} tokens, that of llama.cpp over all: "
            f"the file says a context of {model.window}, within which they are the same."
        )
    if "eos" not in vocabulary.special:
        notes.append("The tokenizer names no token that ends a text: llama.cpp takes its own.")
    if about["chat"] is not None and found.chat != about["chat"]["text"]:
        notes.append("llama.cpp renders the chat template otherwise than transformers does.")
    return tuple(notes)


_EXAMPLE = """\
import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = "model.gguf"
parameters.n_ctx = 2048
server = xllamacpp.Server(parameters)
question = {"prompt": "Once upon a time", "n_predict": 20, "temperature": 0}
print(server.handle_completions(question)["content"])
"""


def _card(
    title: str,
    name: str,
    weights: str,
    written: Written,
    found: Agreement,
    notes: tuple[str, ...],
) -> CardText:
    proof = (
        f"Against the torch model in float32, in a fresh process: largest difference of a "
        f"log-probability among the {gguf_run.N_TOP} likeliest tokens "
        f"{found.largest_difference:.1e}, likeliest token the same {found.same_argmax:.1%}, greedy "
        f"tokens equal {found.same_tokens or 0:.0%}."
    )
    return CardText(
        title=title,
        about=f"{name}, exported with elastune {__version__} as GGUF (llama.cpp's "
        f"architecture {written.architecture}, weights {weights}).",
        loads_with=f"llama.cpp: `llama-server -m {FILE}`, `llama-cli -m {FILE}`",
        code=_EXAMPLE,
        parts=[proof, *notes],
        library="gguf",
        tags=["gguf"],
    )
