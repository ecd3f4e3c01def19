"""Hidden states in front of the first block in which two sub-networks differ, used again.

While `PrefixReuse.using` is in force, the stock forward runs as always: embeddings, masks and
positions are computed, the blocks in front are passed over, and the first one that differs is given
the hidden states that an earlier sub-network had there for the very same inputs. Whoever calls the
model notices nothing: losses, choices and spans are all scored by the same code as ever.

The states of the sub-networks evaluated last are kept within a bound on memory, at every block, or
at every second, fourth ... where that does not fit. Of models whose blocks hand on more than hidden
states the first reuse gives another result than the plain way: that is looked at once, and such
models go the plain way.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from elastune.block_choices import Effective, EffectiveChoices
from elastune.decoding import forward_parameters
from elastune.models import architecture
from elastune.space import SubnetConfig
from elastune.supernet import SuperNetwork

TOLERANCE = 1e-5
"""By how much of the largest number the first reuse may differ from the plain way."""
_MOST_KEPT = 256
"""Sub-networks whose states are kept, however small they are."""

_Place = tuple[int, bytes]
"""Number of a block, and the digest of a batch."""


@dataclass
class _Kept:
    """The states that one sub-network's own evaluation left."""

    choices: Effective
    states: dict[_Place, Tensor] = field(default_factory=dict)
    n_bytes: int = 0


@dataclass
class _Call:
    """One forward pass: where it starts, and with what."""

    digest: bytes
    start: int = 0
    state: Tensor | None = None


class PrefixReuse:
    """The hidden states of a super-network's last evaluations.

    Weights must not change while it is in use; in training, and where gradients are wanted, nothing
    is reused.

    Args:
        net: the super-network; only wrapped while `using` is in force.
        cache_mb: bound on the states kept, in MiB; 0 keeps none.
    """

    def __init__(self, net: SuperNetwork, cache_mb: int = 2048) -> None:
        self._body = _body(net)
        self._blocks = net.blocks
        self._config: Any = net.model.config
        self._effective = EffectiveChoices(net)
        self._room = cache_mb * 2**20
        self._held = 0
        self._kept: OrderedDict[Effective, _Kept] = OrderedDict()
        self._stride = 1
        self._own = _Kept(Effective((), ()))
        self._matches: list[tuple[int, _Kept]] = []
        self._call: _Call | None = None
        self._checked = False
        self._work = [0, 0]
        self._takes_use_cache = "use_cache" in forward_parameters(self._body)
        self.is_on = cache_mb > 0 and len(self._blocks) > 1
        """Whether anything is reused; False from when a model turns out not to allow it."""

    @property
    def n_bytes(self) -> int:
        """The memory that states take now."""
        return self._held

    def take_share(self) -> float:
        """Return which part of the blocks ran, of those due since the last call; 1 if none was."""
        run, due = self._work
        self._work = [0, 0]
        return run / due if due else 1.0

    @contextmanager
    def using(self, config: SubnetConfig) -> Iterator[None]:
        """Reuse and keep hidden states of ``config``, which must be active, as long as this lasts.

        What was in force before is so again afterwards, on errors too.
        """
        if not self.is_on:
            yield
            return
        self._begin(self._effective(config))
        places: list[tuple[nn.Module, Callable[..., Any]]] = [(self._body, self._run_body)]
        places += [(b.module, partial(self._run_block, i)) for i, b in enumerate(self._blocks)]
        before = [vars(module).get("forward") for module, _ in places]
        for module, run in places:
            module.forward = partial(run, module.forward)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for (module, _), forward in zip(places, before, strict=True):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward  # type: ignore[method-assign]
            self._matches = []
            if self._own.states:
                self._kept.setdefault(self._own.choices, self._own)

    def _begin(self, choices: Effective) -> None:
        """Find what is known of a sub-network, and of those that begin like it."""
        known = ((choices.common_blocks(kept.choices), kept) for kept in self._kept.values())
        self._matches = sorted((m for m in known if m[0]), key=lambda match: -match[0])
        self._own = self._kept.get(choices) or _Kept(choices)

    def _run_body(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._takes_use_cache and kwargs.get("use_cache") is None:
            kwargs["use_cache"] = False  # a cache would lack the blocks that are passed over
        is_exact = self.is_on and not torch.is_grad_enabled() and not self._body.training
        digest = _digest(args, kwargs) if is_exact else None
        if digest is None:
            self._count(_n_tokens(args, kwargs), 0)
            return plain(*args, **kwargs)
        call = self._call_for(digest + str(self._config._attn_implementation).encode())
        self._count(_n_tokens(args, kwargs), call.start)
        if call.state is not None and not self._checked:
            return self._first_reuse(call, plain, args, kwargs)
        return self._with(call, plain, args, kwargs)

    def _with(
        self, call: _Call, plain: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        self._call = call
        try:
            return plain(*args, **kwargs)
        finally:
            self._call = None

    def _first_reuse(
        self, call: _Call, plain: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Compute both ways; switch reuse off where they differ."""
        self._checked = True
        try:
            given: Any = self._with(call, plain, args, kwargs)[0]
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
            given = None  # blocks that hand on more than hidden states
        expected = plain(*args, **kwargs)
        if given is None or not _are_close(given, expected[0]):
            self.is_on = False
            self._kept.clear()
            self._own = _Kept(self._own.choices)
            self._held = 0
        return expected

    def _run_block(self, index: int, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._call
        if call is None:
            return plain(*args, **kwargs)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if index < call.start:
            return (hidden, None) if self._blocks[index].record.returns_tuple else hidden
        if index == call.start and call.state is not None:
            if args:
                args = (call.state, *args[1:])
            else:
                kwargs["hidden_states"] = call.state
        elif index and index % self._stride == 0:
            self._keep((index, call.digest), hidden)
        return plain(*args, **kwargs)

    def _call_for(self, digest: bytes) -> _Call:
        """Return where to start a batch: the last block in front of which the states are known."""
        call, source = _Call(digest), self._own
        for common, kept in self._matches:
            last = min(common, len(self._blocks) - 1)
            for index in range(last, call.start, -1):
                state = kept.states.get((index, digest))
                if state is not None:
                    call, source = _Call(digest, index, state), kept
                    break
            if call.start >= last:
                break
        if call.start:
            self._kept.move_to_end(source.choices)
        return call

    def _keep(self, place: _Place, state: Tensor) -> None:
        """Keep a state; of what no longer fits, that goes first which was used longest ago."""
        if place in self._own.states:
            return
        self._own.states[place] = state
        self._own.n_bytes += _bytes_of(state)
        self._held += _bytes_of(state)
        self._kept.setdefault(self._own.choices, self._own)
        self._kept.move_to_end(self._own.choices)
        # Half of the room is for the one that this one goes on from.
        while self._own.n_bytes > self._room // 2:
            self._coarsen()
        while self._held > self._room or len(self._kept) > _MOST_KEPT:
            _, dropped = self._kept.popitem(last=False)
            self._held -= dropped.n_bytes
            dropped.states.clear()
            dropped.n_bytes = 0

    def _coarsen(self) -> None:
        """Keep the states of every second block of those that have been kept."""
        self._stride *= 2
        for kept in self._kept.values():
            for place in [place for place in kept.states if place[0] % self._stride]:
                kept.n_bytes -= _bytes_of(kept.states.pop(place))
        self._held = sum(kept.n_bytes for kept in self._kept.values())

    def _count(self, tokens: int, start: int) -> None:
        """Count the blocks that are due for a batch, without those left out, and those that run."""
        is_there = self._own.choices.present_blocks()
        self._work[0] += tokens * sum(is_there[start:])
        self._work[1] += tokens * sum(is_there)


def _body(net: SuperNetwork) -> nn.Module:
    """Return the module that is given token ids and runs the blocks.

    Of decoders that is the one that holds their list: a head may call it past the base model (OPT).
    """
    base: nn.Module = net.model.base_model
    record = architecture(net.model)
    return base.get_submodule(record.blocks.rpartition(".")[0] if record.kind == "decoder" else "")


def _bytes_of(state: Tensor) -> int:
    return state.numel() * state.element_size()


def _digest(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes | None:
    """Return a digest of all that a forward reads; None where there is more than one batch to it.

    A cache of keys and values, or intermediate states that the caller wants, need every block.
    """
    wants = ("use_cache", "output_hidden_states", "output_attentions")
    if any(kwargs.get(name) for name in wants):
        return None
    found = hashlib.blake2b(digest_size=16)
    for name, value in [*((str(i), a) for i, a in enumerate(args)), *sorted(kwargs.items())]:
        if isinstance(value, Cache):
            return None
        if value is None:
            continue
        if isinstance(value, Tensor):
            content = value.detach().cpu().contiguous()
            found.update(f"{name}{content.dtype}{tuple(content.shape)}".encode())
            found.update(content.flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(f"{name}={value!r}".encode())
    return found.digest()


def _n_tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    first = next((v for v in [*args, *kwargs.values()] if isinstance(v, Tensor)), None)
    return 0 if first is None else int(first.shape[:2].numel())


def _are_close(given: Tensor, expected: Tensor) -> bool:
    if given.shape != expected.shape:
        return False
    size = max(1.0, float(expected.abs().nan_to_num().max()))
    return torch.allclose(given, expected, rtol=0, atol=TOLERANCE * size, equal_nan=True)
