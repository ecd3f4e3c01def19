"""Rows under decoding: what each has read so far, and the logits of what comes next.

Rows come and go: `SlotRows` keeps the keys and values of each in a slot of its own, left-aligned,
reads prompts end to end without padding, and their common beginning once. `PaddedRows` is for
models with attention or caches of their own: left-padded batches and transformers' cache.

Shapes: `B` rows, `T` tokens of prompts laid end to end, `G` key/value heads, `D` head size, `V`
vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from elastune.packing import Segment, row_attention, segment_attention, supports_segments


class Rows(Protocol):
    """Rows being decoded, numbered from 0 in the order of their coming."""

    refills: bool
    """Whether rows may be added to others."""

    def add(self, prompts: Sequence[list[int]]) -> Tensor:
        """Take in rows behind those that are there; return their next tokens' logits (n, V)."""

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append a token to each row; return the next tokens' logits (B, V)."""

    def select(self, order: Sequence[int]) -> None:
        """Keep these rows alone, in this order; none moves up past its old number."""

    def alone(self, ids: Sequence[int]) -> Tensor:
        """Return the logits (V,) after ``ids``, read in one go and from no cache."""


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


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names that the forward of the model inside any PEFT wrapper accepts."""
    return frozenset(inspect.signature(unwrapped(model).forward).parameters)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT wrapper, or ``model`` itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if inner is not None else model


class PaddedRows:
    """Left-padded rows and the cache that transformers makes for the model."""

    refills = False

    def __init__(self, model: nn.Module, pad_id: int) -> None:
        self.model = model
        self.pad_id = pad_id
        self.device = next(model.parameters()).device
        self.accepted = forward_parameters(model)
        self.cache: Any = None

    def add(self, prompts: Sequence[list[int]]) -> Tensor:
        length = max(map(len, prompts))
        ids = [[self.pad_id] * (length - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self.mask = torch.tensor(mask, device=self.device)
        self.positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        self.cache = None
        return self._forward(torch.tensor(ids, device=self.device))

    def step(self, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor(tokens, device=self.device)[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1
        return self._forward(ids)

    def select(self, order: Sequence[int]) -> None:
        if not order:
            self.cache = None
            return
        index = torch.tensor(order, device=self.device)
        self.mask, self.positions = self.mask[index], self.positions[index]
        self.cache.batch_select_indices(index)

    def alone(self, ids: Sequence[int]) -> Tensor:
        keep = {"logits_to_keep": 1} if "logits_to_keep" in self.accepted else {}
        row = torch.tensor([ids], device=self.device)
        logits: Tensor = self.model(input_ids=row, use_cache=False, **keep).logits
        return logits[0, -1]

    def _forward(self, ids: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"attention_mask": self.mask, "past_key_values": self.cache}
        # Some families (BLOOM, MPT) take positions from the mask alone.
        if "position_ids" in self.accepted:
            inputs["position_ids"] = self.positions
        if "logits_to_keep" in self.accepted:
            inputs["logits_to_keep"] = 1
        output = self.model(input_ids=ids, use_cache=True, **inputs)
        self.cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits


class SlotRows:
    """Rows without padding for models of plain attention (see `supports_slots`).

    Args:
        n_slots: rows that there can be at once.
        capacity: tokens that a row can have.
        preamble: token ids that every row begins with, fewer than it has; read once.
    """

    refills = True

    def __init__(
        self, model: nn.Module, n_slots: int, capacity: int, preamble: Sequence[int] = ()
    ) -> None:
        self.model = model
        self.inner = cast(PreTrainedModel, unwrapped(model))
        self.device = next(model.parameters()).device
        self.cache = _SlotCache(n_slots, capacity)
        self.ends = torch.zeros(0, dtype=torch.long, device=self.device)
        self.preamble = list(preamble)
        if preamble:
            self.cache.writes = None
            self._read([self.preamble], 0)

    def add(self, prompts: Sequence[list[int]]) -> Tensor:
        shared = len(self.preamble)
        first = len(self.ends)
        rests = [prompt[shared:] for prompt in prompts]
        self.cache.writes = [(first + i, len(rest)) for i, rest in enumerate(rests)]
        added = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.ends = torch.cat([self.ends, added])
        return self._read(rests, shared)

    def step(self, tokens: Sequence[int]) -> Tensor:
        self.cache.ends = self.ends
        self.cache.longest = int(self.ends.max()) + 1
        with row_attention(self.inner):
            logits: Tensor = self.model(
                input_ids=torch.tensor(tokens, device=self.device)[:, None],
                position_ids=self.ends[:, None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
                row_ends=self.ends,
            ).logits
        self.cache.ends = None
        self.ends = self.ends + 1
        return logits[:, -1]

    def select(self, order: Sequence[int]) -> None:
        self.cache.move([(old, new) for new, old in enumerate(order) if new != old])
        self.ends = self.ends[torch.tensor(order, dtype=torch.long, device=self.device)]

    def alone(self, ids: Sequence[int]) -> Tensor:
        with segment_attention(self.inner):
            logits: Tensor = self.model(
                input_ids=torch.tensor([ids], device=self.device),
                position_ids=torch.arange(len(ids), device=self.device)[None],
                use_cache=False,
                logits_to_keep=1,
                segments=(Segment(0, len(ids)),),
            ).logits
        return logits[0, -1]

    def _read(self, sequences: Sequence[list[int]], shared: int) -> Tensor:
        """Read sequences that go on after ``shared`` tokens; return their last logits (n, V)."""
        ids: list[int] = []
        positions: list[int] = []
        segments, last = [], []
        for sequence in sequences:
            start = shared + len(ids)
            segments.append(Segment(start, start + len(sequence), (0, shared)))
            ids += sequence
            positions += range(shared, shared + len(sequence))
            last.append(len(ids) - 1)
        with segment_attention(self.inner):
            logits: Tensor = self.model(
                input_ids=torch.tensor([ids], device=self.device),
                position_ids=torch.tensor([positions], device=self.device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=torch.tensor(last, device=self.device),
                segments=tuple(segments),
            ).logits
        return logits[0]


class _SlotCache(Cache):
    """Keys and values (slots, G, capacity, D) of each layer; a row's column is the position.

    While ``ends`` (B,) is set, each of the first B rows gets one token there; otherwise a packed
    row is cut up as ``writes`` says: (slot, tokens) in their order; None makes it the preamble.
    """

    def __init__(self, n_slots: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.shape = (n_slots, capacity)
        self.writes: list[tuple[int, int]] | None = None
        self.ends: Tensor | None = None
        self.longest = 0
        self.preamble: dict[int, tuple[Tensor, Tensor]] = {}
        self.slots: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        given = (key_states, value_states)
        if self.ends is not None:
            slots = self.slots[layer_idx]
            n, ends = len(self.ends), self.ends.to(key_states.device)
            rows = torch.arange(n, device=ends.device)
            for slot, new in zip(slots, given, strict=True):
                slot[rows, :, ends] = new[:, :, 0]
            return slots[0][:n, :, : self.longest], slots[1][:n, :, : self.longest]
        if self.writes is None:
            self.preamble[layer_idx] = given
            return given
        if layer_idx not in self.slots:
            self.slots[layer_idx] = (self._empty(key_states), self._empty(value_states))
        shared = 0
        if layer_idx in self.preamble:
            shared = self.preamble[layer_idx][0].shape[2]
            before = self.preamble[layer_idx]
            given = (
                torch.cat([before[0], key_states], dim=2),
                torch.cat([before[1], value_states], dim=2),
            )
        for slot, new in zip(self.slots[layer_idx], given, strict=True):
            start = shared
            for row, n in self.writes:
                slot[row, :, :shared] = new[0, :, :shared]
                slot[row, :, shared : shared + n] = new[0, :, start : start + n]
                start += n
        return given

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy rows (from, to) in this order."""
        for old, new in moves:
            for slots in self.slots.values():
                for slot in slots:
                    slot[new] = slot[old]

    def _empty(self, like: Tensor) -> Tensor:
        n_slots, capacity = self.shape
        # Zeros: masked columns are multiplied by 0, which must not meet a nan.
        return like.new_zeros(n_slots, like.shape[1], capacity, like.shape[3])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are always given, and rows differ."""
        return 0


@torch.inference_mode()
def supports_slots(model: nn.Module) -> bool:
    """Tell whether `SlotRows` computes what the model does: looked up first, then tried once."""
    inner: Any = unwrapped(model)
    config = inner.config.get_text_config()
    peft = getattr(model, "active_peft_config", None)
    if (
        not supports_segments(inner)
        or not {"position_ids", "logits_to_keep", "past_key_values"} <= forward_parameters(model)
        or bool(getattr(config, "num_kv_shared_layers", None))
        or getattr(peft, "is_prompt_learning", False)
    ):
        return False
    embedding = inner.get_input_embeddings().weight
    ids = [(7 * i + 3) % len(embedding) for i in range(16)]
    prompts = [ids[:5], ids[:2] + ids[8:14]]
    rows = SlotRows(model, 2, 9, preamble=ids[:2])
    with evaluating(model):
        rows.add(prompts)
        given = rows.step(ids[-2:])
        longer = [[*prompt, token] for prompt, token in zip(prompts, ids[-2:], strict=True)]
        plain = torch.stack([PaddedRows(model, 0).alone(prompt) for prompt in longer])
    noise = 1e-3 if embedding.dtype == torch.float32 else 0.1
    return torch.allclose(given, plain, rtol=0, atol=noise * float(plain.abs().max()))
