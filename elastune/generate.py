"""Greedy decoding of many prompts: rows that finish leave, waiting prompts take their place.

Answers do not depend on the batch: where its rounding could turn the choice between two tokens, the
row is computed once more, alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from elastune.decoding import (
    PaddedRows,
    Rows,
    SlotRows,
    evaluating,
    forward_parameters,
    supports_slots,
    unwrapped,
)
from elastune.errors import BadRecipe, UnsupportedModel

__all__ = [
    "Progress",
    "end_of_sequence_ids",
    "evaluating",
    "forward_parameters",
    "generate",
    "generate_each",
    "unwrapped",
]

Progress = Callable[[int, int], None]
_CHECK_EVERY = 8
_BOUNDARY = frozenset("\n.!?:")
TIE = 2e-5
"""Logits closer than this part of the row's largest count as tied. Batching moves float32 logits by
about 1e-6 of it."""


@dataclass
class _Row:
    """A prompt on its way: where it stands in the input and what was generated so far."""

    index: int
    prompt_ids: list[int]
    new_ids: list[int] = field(default_factory=list)
    checks_due: int = 0


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    is_finished: Callable[[str], bool] | None = None,
    batch_tokens: int = 8192,
    max_batch: int = 64,
    settle_ties: bool | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Continue each prompt greedily and return the generated texts in the input's order.

    See `generate_each`; ``progress`` is called with (finished prompts, all prompts).
    """
    texts = [""] * len(prompts)
    each = generate_each(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        is_finished=is_finished,
        batch_tokens=batch_tokens,
        max_batch=max_batch,
        settle_ties=settle_ties,
    )
    for n_done, (index, text) in enumerate(each, 1):
        texts[index] = text
        if progress is not None:
            progress(n_done, len(prompts))
    return texts


@torch.inference_mode()
def generate_each(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    is_finished: Callable[[str], bool] | None = None,
    batch_tokens: int = 8192,
    max_batch: int = 64,
    settle_ties: bool | None = None,
) -> Iterator[tuple[int, str]]:
    """Continue each prompt greedily; yield (index, generated text) as prompts finish.

    A row leaves its batch as soon as it meets an end-of-sequence token, ``max_new_tokens`` or
    ``is_finished``; special tokens are not part of its text. ``is_finished`` is asked near sentence
    ends and every few tokens, so a text may run a little past the first moment at which it holds.

    Args:
        model: a transformers causal LM, possibly wrapped by PEFT; put back into its mode after.
        is_finished: whether generation may stop, given the text generated so far.
        batch_tokens: bound on rows times (longest prompt + max_new_tokens) of a batch.
        max_batch: bound on rows of a batch.
        settle_ties: choose between nearly equal logits by the row alone, so that texts are the
            same for every batch size. None: for float32 only; at half precision ties are so common
            that it costs a multiple of the time.

    Raises:
        BadRecipe: a bound below 1, or a prompt that does not fit into the model's context.
        UnsupportedModel: an encoder-decoder model.
    """
    for name, bound in (("max_new_tokens", max_new_tokens), ("max_batch", max_batch)):
        if bound < 1:
            raise BadRecipe(f"{name} is {bound}; it must be at least 1.")
    if not prompts:
        return
    config: Any = model.config
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            "generation needs a decoder-only model, not an encoder-decoder.",
            try_="a decoder, or a task of classification, regression or question answering",
        )
    # An empty prompt still needs one token to predict from.
    start = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else _pad_id(tokenizer)]
    encoded = tokenizer(list(prompts)).input_ids
    rows = [_Row(i, list(ids) or start) for i, ids in enumerate(encoded)]
    # Longest first: a batch that does not fit into memory fails at once, not after hours.
    rows.sort(key=lambda row: -len(row.prompt_ids))
    check_context(config, len(rows[0].prompt_ids), max_new_tokens)
    decoder = _Decoder(model, tokenizer, max_new_tokens, is_finished, settle_ties)
    with evaluating(model):
        for row in decoder.run(rows, batch_tokens, max_batch):
            yield row.index, decoder.text(row)


class _Decoder:
    """One model's greedy decoding loop."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_new_tokens: int,
        is_finished: Callable[[str], bool] | None,
        settle_ties: bool | None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.is_finished = is_finished
        self.eos_ids = end_of_sequence_ids(model, tokenizer)
        if settle_ties is None:
            settle_ties = unwrapped(model).dtype == torch.float32
        self.settle_ties = settle_ties
        self._ends_sentence: dict[int, bool] = {}

    def run(self, rows: list[_Row], batch_tokens: int, max_batch: int) -> Iterator[_Row]:
        """Decode rows, longest first; yield each when it is finished."""
        preamble = _common_beginning([row.prompt_ids for row in rows])
        slots = supports_slots(self.model)
        for group in _groups(rows, self.max_new_tokens):
            capacity = len(group[0].prompt_ids) + self.max_new_tokens
            size = max(1, min(max_batch, batch_tokens // capacity, len(group)))
            batch: Rows = PaddedRows(self.model, _pad_id(self.tokenizer))
            if slots:
                batch = SlotRows(self.model, size, capacity, preamble)
            yield from self._run_group(batch, deque(group), size)

    def _run_group(self, batch: Rows, waiting: deque[_Row], size: int) -> Iterator[_Row]:
        """Decode a batch of at most ``size`` rows into which waiting ones move up."""
        rows: list[_Row] = []
        tokens: list[int] = []
        while waiting or rows:
            free = size - len(rows)
            # A few at once: a forward pass costs a step, however few tokens it reads.
            if waiting and (not rows or (batch.refills and free >= max(1, size // 4))):
                added = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                logits = batch.add([row.prompt_ids for row in added])
                tokens += self._choose(batch, added, logits)
                first, rows = len(rows), rows + added
            else:
                tokens = self._choose(batch, rows, batch.step(tokens))
                first = 0
            done = [i for i in range(first, len(rows)) if self._finishes(rows[i], tokens[i])]
            yield from (rows[i] for i in done)
            if done:
                order = _without(len(rows), done)
                rows, tokens = [rows[i] for i in order], [tokens[i] for i in order]
                batch.select(order)

    def _choose(self, batch: Rows, rows: Sequence[_Row], logits: Tensor) -> list[int]:
        """Return the next token of each row, given their logits (B, V), which are overwritten."""
        best, chosen = logits.max(dim=-1)
        tokens: list[int] = chosen.tolist()
        if not self.settle_ties:
            return tokens
        scale = torch.maximum(best.abs(), logits.amin(dim=-1).abs())
        second = logits.scatter_(1, chosen[:, None], -torch.inf).amax(dim=-1)
        tied = best - second <= TIE * scale
        for i in tied.nonzero()[:, 0].tolist():
            alone = batch.alone(rows[i].prompt_ids + rows[i].new_ids)
            tokens[i] = int(alone.argmax())
        return tokens

    def text(self, row: _Row) -> str:
        """Return the text generated for ``row``."""
        text: str = self.tokenizer.decode(
            row.new_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _finishes(self, row: _Row, token: int) -> bool:
        """Take in the row's next token; tell whether it was its last."""
        if token in self.eos_ids:
            return True
        row.new_ids.append(token)
        if len(row.new_ids) >= self.max_new_tokens:
            return True
        if self.is_finished is None:
            return False
        # Decoding a row at every step would cost as much as a small model does: look at it when
        # a sentence may have ended, one token later (which proves it), and now and then.
        if self._is_boundary(token):
            row.checks_due = 2
        if row.checks_due == 0 and len(row.new_ids) % _CHECK_EVERY:
            return False
        row.checks_due = max(0, row.checks_due - 1)
        return self.is_finished(self.text(row))

    def _is_boundary(self, token: int) -> bool:
        if token not in self._ends_sentence:
            self._ends_sentence[token] = bool(_BOUNDARY & set(self.tokenizer.decode([token])))
        return self._ends_sentence[token]


def _groups(rows: list[_Row], max_new_tokens: int) -> Iterator[list[_Row]]:
    """Cut rows, longest first, so that none is more than twice as long as its group's last."""
    start = 0
    for i in range(1, len(rows) + 1):
        longest = len(rows[start].prompt_ids) + max_new_tokens
        if i == len(rows) or 2 * (len(rows[i].prompt_ids) + max_new_tokens) < longest:
            yield rows[start:i]
            start = i


def _common_beginning(sequences: Sequence[list[int]]) -> list[int]:
    """Return the tokens that all begin with; each has at least one more."""
    first, last = min(sequences), max(sequences)
    limit = min(map(len, sequences)) - 1
    n = next((i for i in range(limit) if first[i] != last[i]), limit)
    return first[:n]


def _without(n: int, gone: Sequence[int]) -> list[int]:
    """Return the numbers below ``n`` but those in ``gone``, the last ones moved into the gaps."""
    order = list(range(n))
    for i in sorted(gone, reverse=True):
        order[i] = order[-1]
        order.pop()
    return order


def end_of_sequence_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Return the ids that end a text: those of the generation config and the tokenizer's own."""
    generation_config = getattr(model, "generation_config", None)
    configured = getattr(generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)


def _pad_id(tokenizer: Any) -> int:
    """Return an id for padding; the mask hides it, so any id does."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def check_context(config: Any, n_prompt: int, max_new_tokens: int) -> None:
    """See that a prompt of so many tokens and its answer fit into the model's positions.

    Raises:
        BadRecipe: they do not.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and n_prompt + max_new_tokens > context:
        raise BadRecipe(
            f"the longest prompt has {n_prompt} tokens; with max_new_tokens={max_new_tokens} it "
            f"exceeds the model's context of {context} tokens.",
            try_=f"lower max_new_tokens to at most {max(0, context - n_prompt)}, shorten the data",
        )
