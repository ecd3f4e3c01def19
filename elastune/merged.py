"""Adapters added to the weights for as long as a sub-network is evaluated.

``x (W + s B A)^T`` in place of ``x W^T + s (x A^T) B^T``: one product in place of three. Adding
costs ``O I r`` MACs once, the adapter ``(I + O) r`` a token: it pays from ``I O / (I + O)`` tokens,
which is where it was measured to pay, too (SmolLM2-135M on one core: 50 to 450 tokens, the formula
says 144 to 419).

Shapes: `I` in features, `O` out features, `r` active rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elastune.elastic.linear import ElasticConv1D, ElasticLinear, take
from elastune.elastic.lora import ElasticLoRALinear, is_plain
from elastune.elastic.mask import WeightMask
from elastune.elastic.merged_product import product
from elastune.linears import is_transposed


@dataclass
class _Merged:
    made_of: tuple[float, ...]
    """Rank, scale, the least level that runs, and the versions of the three weights."""
    weight: Tensor
    """``(O, I)``"""


class MergedAdapters:
    """The merged weights of a super-network's adapters, each at the rank it last had.

    The model's own weights are never written to: merged ones stand beside them and take as much
    memory again. Only float32 weights are merged, where the sum rounds no more than the products
    do: not those of half precision, nor quantised ones.
    """

    def __init__(self, adapters: Iterable[ElasticLoRALinear]) -> None:
        self._adapters = list(adapters)
        self._merged: dict[int, _Merged] = {}

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Let adapters compute with merged weights, where that pays, as long as this lasts."""
        # One that something else has its hands on, such as offloading, is left alone.
        own = [adapter for adapter in self._adapters if "forward" not in vars(adapter)]
        for adapter in own:
            adapter.forward = partial(self._forward, adapter)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for adapter in own:
                del adapter.forward

    def _forward(self, adapter: ElasticLoRALinear, x: Tensor) -> Tensor:
        weight = self._weight(adapter, x) if _can_merge(adapter, x) else None
        if weight is None:
            return ElasticLoRALinear.forward(adapter, x)
        base: Any = adapter.base
        is_elastic = isinstance(base, ElasticLinear | ElasticConv1D)
        bias = base.active_bias() if is_elastic else base.bias
        weight = take(take(weight, 0, adapter.rows), 1, adapter.columns)
        return torch.nn.functional.linear(x, weight, bias)

    def _weight(self, adapter: ElasticLoRALinear, x: Tensor) -> Tensor | None:
        """Return the merged weight ``(O, I)``; None where making it would not pay."""
        rank, base = adapter.active_rank, adapter.base
        mask: WeightMask | None = getattr(base, "mask", None)
        stored: Any = base.weight
        versions = (w._version for w in (stored, adapter.lora_A, adapter.lora_B))
        least = 0 if mask is None else mask.least
        made_of = (rank, adapter.scale_at(rank), least, *versions)
        known = self._merged.get(id(adapter))
        if known is not None and known.made_of == made_of:
            return known.weight
        inside, outside = adapter.in_features, adapter.out_features
        tokens = x.numel() // x.shape[-1]
        if adapter.rule is None and tokens * (inside + outside) < inside * outside:
            return None
        weight = stored if mask is None else mask.of(stored)
        weight = weight.T if is_transposed(base) else weight
        b, a = adapter.lora_B[:, :rank], adapter.lora_A[:rank]
        if adapter.rule is not None:
            merged = adapter.rule.merge(weight, product(a, b, adapter.scale_at(rank)))
            self._merged[id(adapter)] = _Merged(made_of, merged)
            return merged
        room = torch.empty(weight.shape, device=weight.device) if known is None else known.weight
        torch.addmm(weight, b, a, alpha=adapter.scale_at(rank), out=room)
        self._merged[id(adapter)] = _Merged(made_of, room)
        return room


def _can_merge(adapter: ElasticLoRALinear, x: Tensor) -> bool:
    """Tell whether a merged weight stands for all that an adapter and its base do."""
    if adapter.is_off or torch.is_grad_enabled() or (adapter.training and adapter.dropout):
        return False
    if not is_plain(adapter.base) or torch.is_autocast_enabled(x.device.type):
        return False
    weight: Any = adapter.base.weight
    weights: list[Tensor] = [weight, adapter.lora_A, adapter.lora_B]
    is_single = all(w.dtype == torch.float32 for w in [x, *weights])
    # Those made in inference mode do not tell when they are written to.
    return is_single and not any(w.is_inference() for w in weights)
