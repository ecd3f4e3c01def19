"""Smaller vocabularies: drop the tokens that a task does not use, in the tokenizer and the model.

Embeddings are half of a small encoder, and most of their rows are words that a task never sees.
A text all of whose tokens stay is tokenised and computed exactly as before; other words fall back
to shorter pieces, down to single characters or bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.elastic.embedding import ElasticEmbedding, FactorisedEmbedding
from elastune.errors import BadData, UnsupportedModel, nearest
from elastune.tokenizer_file import (
    bare_tokenizer,
    ids_by_token,
    ids_to_keep,
    merged_from,
    rebuilt,
    renumbered,
    tokenizer_data,
)

Text = str | Sequence[int]
"""A text, or the token ids that a model is given for it."""

_CHUNK = 1000
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")


@dataclass(frozen=True)
class TrimReport:
    """What trimming a vocabulary left.

    Attributes:
        rows_before: of the embedding.
        rows_after: of the embedding; the tokenizer has as many tokens.
        params_removed: weights of embedding and head that are gone, tied ones once.
        bytes_removed: of those.
        kept: the old id of every new one, rising.
    """

    rows_before: int
    rows_after: int
    params_removed: int
    bytes_removed: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class TokenChanges:
    """How texts are tokenised before and after.

    Attributes:
        texts: how many.
        texts_changed: those of which at least one token is another.
        tokens: before.
        tokens_lost: those of them that the new tokenizer does not have.
        tokens_after: after; a lost token becomes one or more shorter ones.
        unknown: unknown tokens before.
        unknown_after: after.
    """

    texts: int
    texts_changed: int
    tokens: int
    tokens_lost: int
    tokens_after: int
    unknown: int
    unknown_after: int


def trim_vocabulary_(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    *,
    keep: Collection[str] = (),
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, TrimReport]:
    """Keep the tokens of some texts, and those that any text can fall back to.

    Kept are: the tokens of ``texts``, all special and added tokens, single characters and bytes,
    and of BPE the parts that a kept token is merged from. Ids are renumbered in their old order;
    embedding, output head and its bias, and the ids in both configs follow.

    Args:
        model: changed in place; its other users (a teacher) need `keep_rows_`.
        tokenizer: of the fast kind; not changed.
        texts: of the *training* split alone: tokens taken from texts that a score is reported on
            would leak into the model.
        keep: further tokens, spelled as in the vocabulary.

    Returns:
        The model, the new tokenizer, and what was left.

    Raises:
        BadData: no texts, or a token to keep or an id that the vocabulary does not have.
        UnsupportedModel: a tokenizer or model of a kind that cannot be trimmed.
    """
    data = tokenizer_data(tokenizer)
    n_rows = _embedding_of(model).weight.shape[0]
    ids = ids_by_token(data)
    known = {i for i in ids.values() if i < n_rows}
    wanted = _used_ids(tokenizer, texts, known)
    for token in keep:
        if token not in ids:
            raise BadData(f"keep: {token!r} is not in the vocabulary{nearest(token, ids)}")
        wanted.add(ids[token])
    wanted |= ids_to_keep(data) | _named_ids(model) | _ids_before_padding(model)
    if data["model"]["type"] == "BPE":
        wanted |= merged_from(data, ids, wanted)
    # A table may have rows that no token stands for, and a tokenizer ids that no row stands for.
    kept = sorted(wanted & known)
    _check_added(data, n_rows)
    made = rebuilt(tokenizer, renumbered(data, kept))
    before = _n_weights(model)
    keep_rows_(model, kept)
    removed = before - _n_weights(model)
    size = _embedding_of(model).weight.element_size()
    report = TrimReport(n_rows, len(kept), removed, removed * size, tuple(kept))
    return model, made, report


@torch.no_grad()
def keep_rows_(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Keep some rows of a model's embedding and output head, renumbered, in place.

    Args:
        model: with or without a head over the vocabulary, tied or not.
        kept: old ids in their new order, such as `TrimReport.kept`.

    Raises:
        BadData: an id twice, or one that the model does not have.
        UnsupportedModel: the vocabulary stands in a place that is not known.
    """
    embedding = _embedding_of(model)
    n_rows = int(embedding.weight.shape[0])
    if not kept or len(set(kept)) != len(kept) or min(kept) < 0 or max(kept) >= n_rows:
        raise BadData(f"ids to keep must be distinct and from 0 to {n_rows - 1}")
    rows = torch.tensor(kept)
    new_of = {old: new for new, old in enumerate(kept)}
    replaced: dict[int, nn.Parameter] = {}  # a tied weight stays one
    for module, name in _vocabulary_parameters(model, embedding, n_rows):
        old = getattr(module, name)
        if id(old) not in replaced:
            cut = old.detach()[rows.to(old.device)].clone()
            replaced[id(old)] = nn.Parameter(cut, requires_grad=old.requires_grad)
        setattr(module, name, replaced[id(old)])
    for module in model.modules():
        _tell_rows(module, embedding, n_rows, new_of)
    for config in _configs(model):
        _renumber(config, new_of, n_rows)
    return model


def token_changes(
    before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, texts: Iterable[str]
) -> TokenChanges:
    """Count what trimming changed in how texts are tokenised, held-out ones for example.

    Special tokens around a text are not counted.
    """
    old, new = bare_tokenizer(before), bare_tokenizer(after)
    known = after.get_vocab()
    names = (before.unk_token, after.unk_token)
    counts = [0] * 7
    for chunk in _chunks(texts):
        ours = old.encode_batch(chunk, add_special_tokens=False)
        theirs = new.encode_batch(chunk, add_special_tokens=False)
        for first, second in zip(ours, theirs, strict=True):
            lost = sum(token not in known for token in first.tokens)
            row = (1, int(first.tokens != second.tokens), len(first.tokens), lost)
            row += (len(second.tokens), first.tokens.count(names[0]))  # type: ignore[assignment]
            row += (second.tokens.count(names[1]),)  # type: ignore[assignment]
            counts = [a + b for a, b in zip(counts, row, strict=True)]
    return TokenChanges(*counts)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    while chunk := list(islice(rest, _CHUNK)):
        yield chunk


def _used_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[Text], known: set[int]
) -> set[int]:
    """Return the ids that occur in texts."""
    if isinstance(texts, str):
        raise BadData("texts must be a list of texts, got one text", try_="[text]")
    raw = bare_tokenizer(tokenizer)
    found: set[int] = set()
    n_texts = 0
    for chunk in _chunks(texts):  # type: ignore[arg-type]
        n_texts += len(chunk)
        for encoding in raw.encode_batch([text for text in chunk if isinstance(text, str)]):
            found.update(encoding.ids)
        for text in chunk:
            if not isinstance(text, str):
                found.update(int(i) for i in text)
    if not n_texts:
        raise BadData("there are no texts to take the vocabulary from", try_="the training texts")
    if not found <= known:
        wrong = min(found - known)
        raise BadData(f"token id {wrong} is not one of both the model and its tokenizer")
    return found


def _check_added(data: dict[str, Any], n_rows: int) -> None:
    wrong = next((row for row in data["added_tokens"] if row["id"] >= n_rows), None)
    if wrong is not None:
        raise UnsupportedModel(
            f"the token {wrong['content']!r} has id {wrong['id']}, but the model has only {n_rows} "
            "rows",
            try_="model.resize_token_embeddings(len(tokenizer))",
        )


def _embedding_of(model: PreTrainedModel) -> nn.Embedding:
    embedding = model.get_input_embeddings()
    if isinstance(embedding, ElasticEmbedding | FactorisedEmbedding):
        raise UnsupportedModel(
            "the embedding is factorised already", try_="trim the vocabulary first"
        )
    if not isinstance(embedding, nn.Embedding):
        raise UnsupportedModel(
            f"a {type(model).__name__} has no embedding of tokens", try_="a text model"
        )
    return embedding


def _vocabulary_parameters(
    model: PreTrainedModel, embedding: nn.Embedding, n_rows: int
) -> list[tuple[nn.Module, str]]:
    """Return where a row stands for a token: embedding, output head, the head's bias."""
    found: list[tuple[nn.Module, str]] = [(embedding, "weight")]
    head: Any = model.get_output_embeddings()
    if head is None:
        return found
    if head.weight.shape[0] != n_rows:
        raise UnsupportedModel(
            f"the output head has {head.weight.shape[0]} rows, the embedding {n_rows}",
            try_="a model whose head and embedding have one vocabulary",
        )
    found.append((head, "weight"))
    path = next(name for name, module in model.named_modules() if module is head)
    # Heads of masked language models keep the bias (a tied one, even) a level above.
    for name in dict.fromkeys((path, path.rpartition(".")[0])):
        module = model.get_submodule(name)
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter) and bias.shape == (n_rows,):
            found.append((module, "bias"))
    return found


def _tell_rows(module: Any, embedding: nn.Embedding, n_rows: int, new_of: dict[int, int]) -> None:
    """Let the fields of a module say the new number of rows and the new id of the pad token."""
    if module is embedding:
        embedding.num_embeddings = len(new_of)
    elif type(module) is nn.Linear and module.weight.shape[0] == len(new_of):
        module.out_features = len(new_of)
    if isinstance(getattr(module, "vocab_size", None), int) and module.vocab_size == n_rows:
        module.vocab_size = len(new_of)
    counts_positions = isinstance(module, nn.Embedding) and module is not embedding
    padding = getattr(module, "padding_idx", None)
    if isinstance(padding, int) and not counts_positions:
        module.padding_idx = new_of.get(padding)


def _ids_before_padding(model: PreTrainedModel) -> set[int]:
    """Return the ids up to the pad token's, where positions are counted from that number."""
    # RoBERTa's kin: an embedding module that keeps the number beside its position embeddings.
    starts = [
        int(module.padding_idx)  # type: ignore[arg-type]
        for module in model.modules()
        if isinstance(getattr(module, "padding_idx", None), int)
        and hasattr(module, "position_embeddings")
    ]
    return set(range(max(starts, default=-1) + 1))


def _configs(model: PreTrainedModel) -> list[Any]:
    found: list[Any] = [model.config, model.config.get_text_config()]
    found.append(getattr(model, "generation_config", None))
    return [c for i, c in enumerate(found) if c is not None and not any(c is o for o in found[:i])]


def _id_fields(config: Any) -> Iterator[tuple[str, list[int]]]:
    """Yield the fields of a config that hold token ids."""
    for name, value in list(vars(config).items()):
        if name.endswith("_token_id") or name in _ID_LISTS:
            values = value if isinstance(value, list) else [value]
            if value is not None and all(isinstance(v, int) for v in values):
                yield name, values


def _named_ids(model: PreTrainedModel) -> set[int]:
    """Return the ids that a model's configs name."""
    fields = [field for config in _configs(model) for field in _id_fields(config)]
    return {i for name, ids in fields if name not in _ID_LISTS for i in ids if i >= 0}


def _renumber(config: Any, new_of: dict[int, int], n_rows: int) -> None:
    """Let a config say the new size and ids; an id that is gone is said no more."""
    if getattr(config, "vocab_size", None) == n_rows:
        config.vocab_size = len(new_of)
    for name, ids in _id_fields(config):
        is_list = isinstance(getattr(config, name), list)
        # Some configs mark a token they do not have with -1.
        new = [i if i < 0 else new_of[i] for i in ids if i < 0 or i in new_of]
        setattr(config, name, new if is_list else (new[0] if new else None))


def _n_weights(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())
