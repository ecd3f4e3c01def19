"""A model as one graph of tensors: what every runtime without Python code is given.

Caches are plain inputs and outputs, one pair for each layer that has attention, of the size that
layer has. So one graph reads a prompt and goes on from it, for any batch and length.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shape_settings
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from elastune.elastic.absent import AbsentAttention
from elastune.errors import UnsupportedModel

_ATTENTION = "elastune_graph"
_OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")


class CacheSize(NamedTuple):
    """What one layer keeps of each token, twice: as keys and as values."""

    layer: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Graph:
    """A model in the form in which it is traced.

    Attributes:
        module: takes the inputs by position.
        example: inputs to trace it with; the cache is one list of (keys, values).
        dynamic: which of their dimensions may differ.
        inputs: names, the cache's flat.
        outputs: names, the cache's flat.
        cache: of each layer with attention; empty for models that generate nothing.
        generates: it takes a cache.
    """

    module: nn.Module
    example: tuple[Any, ...]
    dynamic: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cache: tuple[CacheSize, ...]
    generates: bool


def graph_of(model: PreTrainedModel) -> Graph:
    """Return a model as a graph: with a cache if it is a causal language model, else without."""
    parameters = inspect.signature(model.forward).parameters
    if model.main_input_name == "pixel_values":
        return _plain(model, ["pixel_values"], {})
    if _is_causal_lm(model):
        return _generating(model, "position_ids" in parameters)
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in parameters and getattr(model.config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    return _plain(model, names, {"use_cache": False} if "use_cache" in parameters else {})


def trace(graph: Graph, model: PreTrainedModel) -> torch.export.ExportedProgram:
    """Trace a graph of a model.

    Raises:
        UnsupportedModel: the model's code cannot be traced for all batches and lengths.
    """
    # Sizes of 0 and 1 are allowed too: an empty cache, one token, one row.
    settings = shape_settings.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), _plain_attention(model), settings, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(
                graph.module, graph.example, dynamic_shapes=graph.dynamic, strict=False
            )
        except (RuntimeError, ValueError, torch._dynamo.exc.UserError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UnsupportedModel(
                f"{model.config.model_type} models cannot be traced into a graph: {lines[0]}",
                try_="a Hugging Face format, such as hf-hetero",
            ) from error
    return program


def _is_causal_lm(model: PreTrainedModel) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return model.can_generate() and {"past_key_values", "use_cache"} <= set(parameters)


class _Generating(nn.Module):
    """Logits and the new cache, from tokens and the cache of those before."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], positions: bool) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.positions = positions
        self.n_layers = int(model.config.num_hidden_layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *rest: Any) -> Any:
        past: list[tuple[Tensor, Tensor]] = rest[-1]
        cache = DynamicCache()
        held = dict(zip(self.layers, past, strict=True))
        first = past[0][0]
        nothing = first.new_zeros(first.shape[0], 1, first.shape[2], 1)
        for number in range(self.n_layers):
            cache.layers.append(_layer(*held.get(number, (nothing, nothing))))
        options = {"position_ids": rest[0]} if self.positions else {}
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        kept = [out.past_key_values.layers[number] for number in self.layers]
        return out.logits, [(layer.keys, layer.values) for layer in kept]


def _layer(keys: Tensor, values: Tensor) -> DynamicLayer:
    """Return one layer of a cache without the first concatenation that an empty one does."""
    layer = DynamicLayer()
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return layer


class _Plain(nn.Module):
    """The outputs of a model that has no cache."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str], options: Any) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.options = options

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out = self.model(**dict(zip(self.names, inputs, strict=True)), **self.options)
        return tuple(out[name] for name in _OUTPUTS if name in out)


def _generating(model: PreTrainedModel, positions: bool) -> Graph:
    rows, past, new = 2, 5, 3
    n_layers = int(model.config.num_hidden_layers)
    absent = {m.layer_idx for m in model.modules() if isinstance(m, AbsentAttention)}
    with torch.no_grad():
        zeros, ones = torch.zeros(rows, past).long(), torch.ones(rows, past).long()
        filled = model(zeros, attention_mask=ones, use_cache=True).past_key_values
    layers = [number for number in range(n_layers) if number not in absent]
    if not layers:
        raise UnsupportedModel(
            "no block of this model has attention: there is nothing to cache",
            try_="keep the attention of one block",
        )
    pairs = [(filled.layers[n].keys.clone(), filled.layers[n].values.clone()) for n in layers]
    ids = torch.zeros(rows, new, dtype=torch.long)
    mask = torch.ones(rows, past + new, dtype=torch.long)
    place = torch.arange(past, past + new).repeat(rows, 1)
    free = torch.export.Dim.DYNAMIC
    both = {0: free, 1: free}
    names = ["input_ids", "attention_mask", *(["position_ids"] if positions else [])]
    flat = [f"{number}.{what}" for number in layers for what in ("key", "value")]
    return Graph(
        module=_Generating(model, layers, positions),
        example=(ids, mask, *([place] if positions else []), pairs),
        # Arguments after the first two have one name together in the signature.
        dynamic=(
            both,
            both,
            (*([both] if positions else []), [({0: free, 2: free},) * 2] * len(pairs)),
        ),
        inputs=(*names, *(f"past_key_values.{name}" for name in flat)),
        outputs=("logits", *(f"present.{name}" for name in flat)),
        cache=tuple(
            CacheSize(number, keys.shape[1], keys.shape[3])
            for number, (keys, _) in zip(layers, pairs, strict=True)
        ),
        generates=True,
    )


def _plain(model: PreTrainedModel, names: list[str], options: dict[str, Any]) -> Graph:
    module = _Plain(model, names, options)
    free = torch.export.Dim.DYNAMIC
    example: tuple[Tensor, ...]
    if names == ["pixel_values"]:
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        example = (torch.zeros(2, model.config.num_channels, height, width),)
        dynamic: Any = {0: free}
    else:
        example = tuple(torch.ones(2, 7, dtype=torch.long) for _ in names)
        dynamic = {0: free, 1: free}
    with torch.no_grad():
        out = model(**dict(zip(names, example, strict=True)), **options)
    outputs = tuple(name for name in _OUTPUTS if name in out)
    every = (tuple(dynamic for _ in names),)
    return Graph(module, example, every, tuple(names), outputs, (), False)


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend in a way that is the same for all lengths.

    What transformers does by itself depends on whether there is one query, and a row of nothing but
    padding gives NaN where a runtime takes the softmax of -inf literally.
    """
    if not model._can_set_attn_implementation():  # this family has attention code of its own
        yield
        return
    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend with an additive mask.

    Args:
        module: its ``num_key_value_groups`` queries share a key.
        query: ``(rows, heads, new, head_dim)``.
        key: ``(rows, kv_heads, all, head_dim)``.
        value: as ``key``.
        attention_mask: broadcast to ``(rows, heads, new, all)``; the lowest finite number where
            not to look, so that no row is all -inf.
        scaling: of the scores.
        options: ``softcap`` is the limit of a score; others do not change what is computed.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = _repeated(key, groups), _repeated(value, groups)
    cap = options.get("softcap")
    if cap:  # gemma2: scores go towards a limit
        scores = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
        scores = torch.tanh(scores / cap) * cap
        scores = scores if attention_mask is None else scores + attention_mask
        found = scores.softmax(-1) @ value
    else:
        found = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling
        )
    return found.transpose(1, 2).contiguous(), None


def _repeated(kept: Tensor, groups: int) -> Tensor:
    """``(rows, kv_heads, all, head_dim)`` -> ``(rows, kv_heads * groups, all, head_dim)``."""
    return kept[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)
