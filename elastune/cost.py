"""What a sub-network costs: parameters, non-zeros and MACs by counting; latency by measuring.

MACs (multiply-accumulates) are of one forward pass over ``T`` tokens and count every linear layer,
the adapter, the head, and the two products of attention; masked pairs count as computed. Zeros
are not left out of MACs: common kernels compute them.

Shapes: `T` tokens, `I` in features, `O` out features, `r` rank.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from elastune.models import architecture
from elastune.space import SubnetConfig
from elastune.supernet import SuperNetwork


@dataclass(frozen=True)
class Cost:
    """Parameters, parameters that are not zero, and MACs of one forward pass."""

    params: int
    nonzero: int
    macs: int


def model_cost(model: PreTrainedModel, tokens: int) -> Cost:
    """Count a plain model: each parameter once, tied weights too.

    Args:
        model: without adapters.
        tokens: length of the forward pass that MACs are for.
    """
    parameters = list(model.parameters())
    return Cost(
        sum(p.numel() for p in parameters),
        sum(int(torch.count_nonzero(p)) for p in parameters),
        _linear_macs(model, tokens) + _attention_macs(model, tokens),
    )


class CostModel:
    """The cost of any configuration of a super-network, from the configuration alone.

    The model is counted once; a configuration then costs one sum over the dims.
    """

    def __init__(self, net: SuperNetwork, tokens: int) -> None:
        adapters = {id(p) for a in net.adapters.values() for p in (a.lora_A, a.lora_B)}
        base = [p for p in net.model.parameters() if id(p) not in adapters]
        self._params = sum(p.numel() for p in base)
        self._nonzero = sum(int(torch.count_nonzero(p)) for p in base)
        self._macs = _linear_macs(net.model, tokens) + _attention_macs(net.model, tokens)
        self._tokens = tokens
        self._per_rank = {
            dim.name: sum(
                net.adapters[name].in_features + net.adapters[name].out_features
                for name in dim.modules
            )
            for dim in net.space.dims
        }

    def __call__(self, config: SubnetConfig) -> Cost:
        """Return the cost of base and unmerged adapter; all adapter weights count as non-zero."""
        adapter = sum(config[name] * width for name, width in self._per_rank.items())
        return Cost(
            self._params + adapter, self._nonzero + adapter, self._macs + adapter * self._tokens
        )


def _linear_macs(model: PreTrainedModel, tokens: int) -> int:
    once = tuple(f"{name}." for name in architecture(model).once_names(model))
    return sum(
        (1 if f"{name}.".startswith(once) else tokens) * module.in_features * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    )


def _attention_macs(model: PreTrainedModel, tokens: int) -> int:
    """Return the MACs of Q K^T and of the weighted sum over V, over all blocks."""
    record = architecture(model)
    queries = record.linear_names(model, ["q"])
    widths = [int(model.get_submodule(name).out_features) for name in queries]  # type: ignore[arg-type]
    return sum(2 * tokens * tokens * width for width in widths)


@torch.inference_mode()
def prefill_latency_ms(
    model: PreTrainedModel, tokens: int, *, repeats: int = 7, warmup: int = 2
) -> float:
    """Measure one forward pass over ``tokens`` tokens, batch 1: the median, in milliseconds."""
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    options: dict[str, Any] = {}
    if architecture(model).kind == "decoder":
        options["logits_to_keep"] = 1
    times = []
    for repeat in range(warmup + repeats):
        started = time.perf_counter()
        model(input_ids=ids, **options)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        if repeat >= warmup:
            times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times)
