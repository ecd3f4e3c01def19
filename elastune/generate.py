"""Greedy decoding in batches from which finished rows are dropped.

Shapes: `B` rows of the batch, `L` tokens of its longest prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from elastune.errors import BadRecipe, UnsupportedModel

Progress = Callable[[int, int], None]
_CHECK_EVERY = 8
_BOUNDARY = frozenset("\n.!?:")


@dataclass
class _Row:
    """A prompt on its way: where it stands in the input and what was generated so far."""

    index: int
    prompt_ids: list[int]
    new_ids: list[int] = field(default_factory=list)
    checks_due: int = 0


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    is_finished: Callable[[str], bool] | None = None,
    batch_tokens: int = 8192,
    max_batch: int = 64,
    progress: Progress | None = None,
) -> list[str]:
    """Continue each prompt greedily and return the generated texts in the input's order.

    Prompts of similar length share a batch (left-padded). A row leaves its batch as soon as it
    meets an end-of-sequence token, ``max_new_tokens`` or ``is_finished``; special tokens are not
    part of its text. ``is_finished`` is asked near sentence ends and every few tokens, so a text
    may run a little past the first moment at which it holds.

    Args:
        model: a transformers causal LM, possibly wrapped by PEFT; put back into its mode after.
        is_finished: whether generation may stop, given the text generated so far.
        batch_tokens: bound on rows times (longest prompt + max_new_tokens) of a batch.
        max_batch: bound on rows of a batch.
        progress: called with (finished prompts, all prompts).

    Raises:
        BadRecipe: a bound below 1, or a prompt that does not fit into the model's context.
        UnsupportedModel: an encoder-decoder model.
    """
    for name, bound in (("max_new_tokens", max_new_tokens), ("max_batch", max_batch)):
        if bound < 1:
            raise BadRecipe(f"{name} is {bound}; it must be at least 1.")
    if not prompts:
        return []
    config: Any = model.config
    if config.is_encoder_decoder:
        raise UnsupportedModel("generation needs a decoder-only model, not an encoder-decoder.")
    # An empty prompt still needs one token to predict from.
    start = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else _pad_id(tokenizer)]
    encoded = tokenizer(list(prompts)).input_ids
    rows = [_Row(i, list(ids) or start) for i, ids in enumerate(encoded)]
    # Longest first: a batch that does not fit into memory fails at once, not after hours.
    rows.sort(key=lambda row: -len(row.prompt_ids))
    _check_context(config, len(rows[0].prompt_ids), max_new_tokens)
    decoder = _Decoder(model, tokenizer, max_new_tokens, is_finished)
    texts = [""] * len(rows)
    n_done = 0
    with evaluating(model):
        for batch in _batches(rows, batch_tokens, max_batch, max_new_tokens):
            for row in decoder.run(batch):
                texts[row.index] = decoder.text(row)
                n_done += 1
                if progress is not None:
                    progress(n_done, len(rows))
    return texts


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode and every module back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Decoder:
    """One model's greedy decoding loop."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_new_tokens: int,
        is_finished: Callable[[str], bool] | None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.is_finished = is_finished
        self.eos_ids = end_of_sequence_ids(model, tokenizer)
        self.device = next(model.parameters()).device
        self.accepted = forward_parameters(model)
        self._ends_sentence: dict[int, bool] = {}

    def run(self, rows: list[_Row]) -> Iterator[_Row]:
        """Decode a batch; yield each row when it is finished."""
        input_ids, mask = self._padded(rows)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = None
        while rows:
            next_ids, cache = self._step(input_ids, mask, positions, cache)
            kept = []
            for i, (row, token) in enumerate(zip(rows, next_ids.tolist(), strict=True)):
                if self._finishes(row, token):
                    yield row
                else:
                    kept.append(i)
            if len(kept) < len(rows):
                rows = [rows[i] for i in kept]
                if not rows:
                    return
                index = torch.tensor(kept, device=self.device)
                next_ids, mask, positions = next_ids[index], mask[index], positions[index]
                cache.batch_select_indices(index)
            input_ids = next_ids[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1

    def text(self, row: _Row) -> str:
        """Return the text generated for ``row``."""
        text: str = self.tokenizer.decode(
            row.new_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _step(
        self, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: Any
    ) -> tuple[Tensor, Any]:
        """Return the next token of each row, shape (B,), and the cache grown by the input."""
        inputs: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache}
        # Some families (BLOOM, MPT) take positions from the mask alone.
        if "position_ids" in self.accepted:
            inputs["position_ids"] = positions
        if "logits_to_keep" in self.accepted:
            inputs["logits_to_keep"] = 1
        output = self.model(input_ids=input_ids, use_cache=True, **inputs)
        return output.logits[:, -1].argmax(dim=-1), output.past_key_values

    def _padded(self, rows: list[_Row]) -> tuple[Tensor, Tensor]:
        """Return left-padded token ids and their mask, both (B, L)."""
        length = max(len(row.prompt_ids) for row in rows)
        pad = _pad_id(self.tokenizer)
        ids = [[pad] * (length - len(row.prompt_ids)) + row.prompt_ids for row in rows]
        mask = [[0] * (length - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

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


def _batches(
    rows: list[_Row], batch_tokens: int, max_batch: int, max_new_tokens: int
) -> Iterator[list[_Row]]:
    """Cut rows, longest first, into batches within both bounds (never less than one row)."""
    start = 0
    while start < len(rows):
        length = len(rows[start].prompt_ids) + max_new_tokens
        size = max(1, min(max_batch, batch_tokens // length))
        yield rows[start : start + size]
        start += size


def end_of_sequence_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Return the ids that end a text: those of the generation config and the tokenizer's own."""
    generation_config = getattr(model, "generation_config", None)
    configured = getattr(generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names that the forward of the model inside any PEFT wrapper accepts."""
    return frozenset(inspect.signature(unwrapped(model).forward).parameters)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT wrapper, or ``model`` itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if inner is not None else model


def _pad_id(tokenizer: Any) -> int:
    """Return an id for padding; the mask hides it, so any id does."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def _check_context(config: Any, n_prompt: int, max_new_tokens: int) -> None:
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and n_prompt + max_new_tokens > context:
        raise BadRecipe(
            f"the longest prompt has {n_prompt} tokens; with max_new_tokens={max_new_tokens} it "
            f"exceeds the model's context of {context} tokens.",
            try_=f"lower max_new_tokens to at most {max(0, context - n_prompt)}, shorten the data",
        )
