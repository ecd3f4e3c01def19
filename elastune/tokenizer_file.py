"""The vocabulary in a tokenizer.json: which tokens must stay, and the file without the others."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from elastune.errors import UnsupportedModel

_KINDS = ("WordPiece", "BPE", "Unigram", "WordLevel")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def tokenizer_data(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what tokenizer.json would hold."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UnsupportedModel(
            f"a {type(tokenizer).__name__} has no tokenizer.json to rewrite",
            try_="a fast tokenizer: AutoTokenizer.from_pretrained(..., use_fast=True)",
        )
    data: dict[str, Any] = json.loads(backend.to_str())
    kind = data["model"].get("type")
    if kind not in _KINDS:
        raise UnsupportedModel(
            f"a vocabulary of the kind {kind} cannot be trimmed; known are {', '.join(_KINDS)}"
        )
    return data


def bare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of the tokenizer itself that neither cuts nor pads."""
    raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    raw.no_truncation()
    raw.no_padding()
    return raw


def ids_by_token(data: dict[str, Any]) -> dict[str, int]:
    """Return token -> id, added tokens included."""
    vocab = data["model"]["vocab"]
    ids = vocab if isinstance(vocab, dict) else {row[0]: i for i, row in enumerate(vocab)}
    return {**ids, **{row["content"]: int(row["id"]) for row in data["added_tokens"]}}


def ids_to_keep(data: dict[str, Any]) -> set[int]:
    """Return the ids that any text can be spelled in, and those of special and added tokens."""
    ids = ids_by_token(data)
    found = {ids[token] for token in _fallbacks(data)} | _template_ids(data)
    return found | {int(row["id"]) for row in data["added_tokens"]}


def _fallbacks(data: dict[str, Any]) -> Iterator[str]:
    """Yield the tokens of the vocabulary that any text can be spelled in."""
    model = data["model"]
    vocab = model["vocab"]
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    for token in vocab if isinstance(vocab, dict) else (row[0] for row in vocab):
        bare = token.removeprefix(prefix).removesuffix(suffix)
        if len(bare) <= 1 or _BYTE.fullmatch(token):
            yield token
    if model["type"] == "Unigram":
        # A character without a piece of its own costs a little more than the least likely piece.
        yield min(vocab, key=lambda row: row[1])[0]
        if model.get("unk_id") is not None:
            yield vocab[model["unk_id"]][0]
    elif model.get("unk_token") in vocab:
        yield model["unk_token"]


def _template_ids(data: dict[str, Any]) -> set[int]:
    """Return the ids that are put around a text, or after it to pad it."""
    found: set[int] = set()

    def note(old: int) -> int:
        found.add(old)
        return old

    _change_ids(data, note)
    return found


def merged_from(data: dict[str, Any], ids: dict[str, int], wanted: set[int]) -> set[int]:
    """Return the ids of all tokens on the way to the wanted ones."""
    made_of: dict[str, list[tuple[str, str]]] = {}
    for first, second, made in _merges(data):
        made_of.setdefault(made, []).append((first, second))
    names = {i: token for token, i in ids.items()}
    waiting = [names[i] for i in wanted if i in names]
    found = set(waiting)
    while waiting:
        for parts in made_of.get(waiting.pop(), ()):
            new = set(parts) - found
            found |= new
            waiting += new
    return {ids[token] for token in found}


def renumbered(data: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return the tokenizer with only the kept ids, renumbered."""
    new_of = {old: new for new, old in enumerate(kept)}
    made: dict[str, Any] = json.loads(json.dumps(data))
    model = made["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {token: new_of[old] for token, old in vocab.items() if old in new_of}
    else:
        model["vocab"] = [row for old, row in enumerate(vocab) if old in new_of]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_of[model["unk_id"]]
    if model["type"] == "BPE":
        left = model["vocab"]
        model["merges"] = [[a, b] for a, b, result in _merges(data) if result in left]
    made["added_tokens"] = [{**row, "id": new_of[row["id"]]} for row in made["added_tokens"]]
    _change_ids(made, new_of.__getitem__)
    return made


def rebuilt(tokenizer: PreTrainedTokenizerBase, data: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Return a tokenizer with the settings of another, loaded as its users will load it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder, save_jinja_files=False)
        for file in folder.iterdir():  # vocabularies in other spellings would be the old one
            if file.suffix not in (".json", ".jinja") or file.name == "vocab.json":
                file.unlink()
        text = json.dumps(data, ensure_ascii=False)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        settings_file = folder / "tokenizer_config.json"
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)  # its ids are old; tokenizer.json has them
        settings_file.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    made.name_or_path = tokenizer.name_or_path
    return made


def _merges(data: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the two parts of every merge and what it makes, in order."""
    prefix = data["model"].get("continuing_subword_prefix") or ""
    for merge in data["model"]["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second, first + second.removeprefix(prefix)


def _change_ids(data: dict[str, Any], change: Callable[[int], int]) -> None:
    """Put ``change(id)`` in the place of every id outside the vocabulary and the added tokens."""
    if data.get("padding"):
        data["padding"]["pad_id"] = change(data["padding"]["pad_id"])
    waiting = [data.get("post_processor")]
    while waiting:
        processor = waiting.pop() or {}
        waiting += processor.get("processors", [])
        for special in (processor.get("special_tokens") or {}).values():
            special["ids"] = [change(i) for i in special["ids"]]
        for name in ("sep", "cls"):
            if name in processor:
                token, old = processor[name]
                processor[name] = [token, change(old)]
