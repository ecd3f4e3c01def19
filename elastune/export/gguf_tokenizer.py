"""A fast tokenizer as GGUF holds it: ``tokenizer.ggml.*``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from elastune.errors import UnsupportedModel
from elastune.tokenizer_file import ids_by_token, tokenizer_data

#: Kinds of tokens, as GGUF numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

#: Regular expression that cuts a text before byte-level BPE -> the name llama.cpp has for it.
_SPLITS = {
    rf"{_ENDINGS}{_LETTERS}|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_ENDINGS}{_LETTERS}|\p{{N}}{_REST}": "qwen2",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}


@dataclass(frozen=True)
class GgufVocabulary:
    """What ``tokenizer.ggml.*`` says.

    Attributes:
        model: ``"gpt2"`` for byte-level BPE, ``"llama"`` for SentencePiece's.
        pre: llama.cpp's name for how a text is cut before BPE.
        tokens: one for each row of the embedding.
        types: of the tokens.
        merges: of byte-level BPE, the first is done first.
        scores: of SentencePiece's BPE, the highest is done first.
        special: ``bos``, ``eos``, ``pad``, ``unk`` -> id, where there is one.
        add_bos: put before a text.
        add_eos: put after it.
        add_space: a text begins with a space that it does not have.
        chat_template: in Jinja, where there is one.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    scores: Sequence[float]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space: bool
    chat_template: str | None


def gguf_vocabulary(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, pre: str | None = None
) -> GgufVocabulary:
    """Translate a tokenizer.

    Args:
        tokenizer: fast, with BPE: over bytes as GPT-2 has it, or as SentencePiece does with
            single bytes for what has no token.
        vocab_size: of the model; ids without a token are filled up.
        pre: llama.cpp's name for the split, where it is not to be found out.

    Raises:
        UnsupportedModel: a tokenizer that llama.cpp cannot be told of.
    """
    data = tokenizer_data(tokenizer)
    if data["model"]["type"] != "BPE":
        raise UnsupportedModel(
            f"a {data['model']['type']} tokenizer cannot be written to GGUF here",
            try_="a model with a BPE tokenizer",
        )
    is_sentencepiece = bool(data["model"].get("byte_fallback"))
    ids = ids_by_token(data)
    if max(ids.values()) >= vocab_size:
        raise UnsupportedModel(
            f"the tokenizer has ids up to {max(ids.values())}, the model {vocab_size} embeddings",
            try_="the tokenizer that belongs to the model",
        )
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, number in ids.items():
        tokens[number] = token
        types[number] = _kind(token, data) if is_sentencepiece else NORMAL
    for row in data["added_tokens"]:
        if types[row["id"]] != UNKNOWN:
            types[row["id"]] = CONTROL if row["special"] else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    add_bos, add_eos = _around(tokenizer)
    template = tokenizer.chat_template
    return GgufVocabulary(
        model="llama" if is_sentencepiece else "gpt2",
        pre="default" if is_sentencepiece else pre or _split(data),
        tokens=tokens,
        types=types,
        merges=[] if is_sentencepiece else merges,
        scores=_scores(tokens, merges) if is_sentencepiece else [],
        special=_special(tokenizer),
        add_bos=add_bos,
        add_eos=add_eos,
        add_space=is_sentencepiece and _adds_space(data),
        chat_template=template if isinstance(template, str) else None,
    )


def _kind(token: str, data: Any) -> int:
    if token == data["model"].get("unk_token"):
        return UNKNOWN
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return BYTE if is_byte else NORMAL


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """Return scores that order tokens as their first merge is ordered."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), number)
    return [-float(rank.get(token, 0)) for token in tokens]


def _split(data: Any) -> str:
    """Return llama.cpp's name for what cuts a text before byte-level BPE."""
    found = data.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            name = _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
            if name is not None:
                return name
    raise UnsupportedModel(
        f"no name of llama.cpp's is known here for how this tokenizer cuts a text ({kinds})",
        try_="pre=..., llama.cpp's name for it; the export is refused if the tokens then differ",
    )


def _adds_space(data: Any) -> bool:
    """Tell whether a SentencePiece tokenizer puts a space before a text."""
    normalizer = data.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    before = data.get("pre_tokenizer") or {}
    return before.get("type") == "Metaspace" and before.get("prepend_scheme", "always") != "never"


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Return whether the token that begins a text is put before it, and the last after it."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for add_bos in (False, True):
        for add_eos in (False, True):
            before = [tokenizer.bos_token_id] if add_bos else []
            after = [tokenizer.eos_token_id] if add_eos else []
            if before + plain + after == whole:
                return add_bos, add_eos
    raise UnsupportedModel(
        "this tokenizer puts tokens around a text that are neither its first nor its last token",
        try_="a tokenizer that adds bos_token and eos_token only",
    )


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    named = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "unk": tokenizer.unk_token_id,
    }
    return {name: number for name, number in named.items() if number is not None}
