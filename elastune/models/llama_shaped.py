"""What a Llama-shaped decoder is made of, for formats that write its weights one by one.

Such a block is: RMS norm, attention with rotary positions, residual; RMS norm, a gated feed-forward
with SiLU, residual. Sizes are read from the weights, so that every block may have its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from elastune.errors import UnsupportedModel
from elastune.models.blocks import BlockShape

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

_ROTARY = ("default", "linear", "llama3")
"""Kinds of rotary frequencies that are the same at every length and need no scaled attention."""


Half = Literal["attention", "feed-forward"]

_LINEARS: Mapping[Half, tuple[str, ...]] = {
    "attention": tuple(f"self_attn.{role}_proj" for role in "qkvo"),
    "feed-forward": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
_ATTENTION = ("self_attn", "input_layernorm")


@dataclass(frozen=True)
class LlamaShaped:
    """The sizes and weights of a model.

    Attributes:
        family: one of `FAMILIES`.
        state: weights by the name they have in transformers; embeddings of low rank multiplied
            out, a tied head left out.
        blocks: their sizes, in order; 0 where a half is absent.
        hidden: width of the residual.
        head_dim: size of one head.
        vocab_size: rows of the embedding.
        context: tokens that the model was made for.
        window: tokens that attention looks back, where that is limited.
        norm_eps: added to the mean square in norms.
        rope_theta: base of the rotary frequencies.
        frequency_factors: what they are divided by, ``(head_dim / 2,)``; None where all are 1.
        is_tied: the head is the embedding.
        config: a copy of the stock config.
    """

    family: str
    state: Mapping[str, Tensor]
    blocks: tuple[BlockShape, ...]
    hidden: int
    head_dim: int
    vocab_size: int
    context: int
    window: int | None
    norm_eps: float
    rope_theta: float
    frequency_factors: Tensor | None
    is_tied: bool
    config: Any

    @property
    def is_uniform(self) -> bool:
        """All blocks are alike and whole."""
        return len(set(self.blocks)) == 1 and all(self.blocks[0])

    @property
    def usable_context(self) -> int:
        """Tokens up to which limited attention is full attention."""
        return min(self.context, self.window or self.context)


def llama_shaped(
    config: Any, state: Mapping[str, Tensor], rotary: Any, families: Sequence[str] = FAMILIES
) -> LlamaShaped:
    """Read the sizes and weights of a causal language model.

    Args:
        config: of the stock class; of the sizes only those that all blocks share are read.
        state: weights by their stock names.
        rotary: the module that makes rotary positions.
        families: those that are wanted.

    Raises:
        UnsupportedModel: another family, or settings that change the shape.
    """
    family = str(config.model_type)
    if family not in families:
        raise UnsupportedModel(
            f"a {family} model is not Llama-shaped; known are {', '.join(families)}",
            try_="format onnx, openvino or torch-export, which hold any model",
        )
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModel(
            f"the activation {config.hidden_act!r} is not SiLU",
            try_="another format, such as onnx or hf",
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    held = {name: tensor.detach() for name, tensor in state.items()}
    is_tied = bool(config.tie_word_embeddings)
    if is_tied:
        held.pop("lm_head.weight", None)
    return LlamaShaped(
        family=family,
        state=held,
        blocks=_shapes(held, config.num_hidden_layers, head_dim),
        hidden=config.hidden_size,
        head_dim=head_dim,
        vocab_size=held["model.embed_tokens.weight"].shape[0],
        context=config.max_position_embeddings,
        window=getattr(config, "sliding_window", None),
        norm_eps=config.rms_norm_eps,
        rope_theta=float(config.rope_parameters["rope_theta"]),
        frequency_factors=_frequency_factors(rotary, config, head_dim),
        is_tied=is_tied,
        config=config,
    )


def _shapes(state: Mapping[str, Tensor], n_blocks: int, head_dim: int) -> tuple[BlockShape, ...]:
    def rows(number: int, name: str) -> int:
        weight = state.get(f"model.layers.{number}.{name}.weight")
        return 0 if weight is None else weight.shape[0]

    return tuple(
        BlockShape(
            rows(number, "self_attn.q_proj") // head_dim,
            rows(number, "self_attn.k_proj") // head_dim,
            rows(number, "mlp.gate_proj"),
        )
        for number in range(n_blocks)
    )


def _frequency_factors(rotary: Any, config: Any, head_dim: int) -> Tensor | None:
    """Return what the plain frequencies are divided by to give those that the model uses."""
    rope = config.rope_parameters
    used: Tensor = rotary.inv_freq.float()
    kind = rope.get("rope_type", "default")
    is_whole = used.shape[0] * 2 == head_dim
    if kind not in _ROTARY or not is_whole or float(rotary.attention_scaling) != 1.0:
        raise UnsupportedModel(
            f"rotary positions of the kind {kind!r}{'' if is_whole else ' on a part of a head'} "
            f"are not known here; known are {', '.join(_ROTARY)}",
            try_="format onnx, openvino or torch-export",
        )
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    factors = 1.0 / (rope["rope_theta"] ** exponents) / used
    return None if torch.allclose(factors, torch.ones(()), rtol=1e-5) else factors


def with_heads(model: LlamaShaped, index: int, heads: int, kv_heads: int) -> LlamaShaped:
    """Return the model with a block's attention padded by heads of zeros, which change nothing.

    Key/value head ``j`` of the block stays number ``j``, and its query heads the first of those
    that share it. A block without attention gets one that gives zero.

    Args:
        heads: wanted; ``heads / kv_heads`` is no less than in the block.
        kv_heads: wanted, no fewer than the block has.
    """
    own, dim = model.blocks[index], model.head_dim
    group, old_group = heads // kv_heads, own.heads // max(own.kv_heads, 1)
    prefix = f"model.layers.{index}.self_attn."
    state = dict(model.state)
    places = [j * group + i for j in range(own.kv_heads) for i in range(old_group)]
    kept = {"q_proj": places, "k_proj": list(range(own.kv_heads))}
    kept["v_proj"] = kept["k_proj"]
    for name, numbers in kept.items():
        rows = (heads if name == "q_proj" else kv_heads) * dim
        for kind, shape in (("weight", (rows, model.hidden)), ("bias", (rows,))):
            old = state.get(f"{prefix}{name}.{kind}")
            if old is None and kind == "bias":
                continue
            made = torch.zeros(shape)
            if old is not None:
                made[_spread(numbers, dim)] = old
            state[f"{prefix}{name}.{kind}"] = made
    out = torch.zeros(model.hidden, heads * dim)
    if own.heads:
        out[:, _spread(places, dim)] = state[f"{prefix}o_proj.weight"]
    state[f"{prefix}o_proj.weight"] = out
    norm = f"model.layers.{index}.input_layernorm.weight"
    state.setdefault(norm, torch.ones(model.hidden))
    return _resized(model, index, own._replace(heads=heads, kv_heads=kv_heads), state)


def with_channels(model: LlamaShaped, index: int, ffn: int) -> LlamaShaped:
    """Return the model with a block's feed-forward padded by channels of zeros."""
    own = model.blocks[index]
    prefix = f"model.layers.{index}."
    state = dict(model.state)
    for name in _LINEARS["feed-forward"]:
        is_down = name.endswith("down_proj")
        made = torch.zeros((model.hidden, ffn) if is_down else (ffn, model.hidden))
        if own.ffn:
            old = state[f"{prefix}{name}.weight"]
            made[: old.shape[0], : old.shape[1]] = old
        state[f"{prefix}{name}.weight"] = made
        bias = state.get(f"{prefix}{name}.bias")
        if bias is not None and not is_down:
            state[f"{prefix}{name}.bias"] = torch.cat([bias, bias.new_zeros(ffn - own.ffn)])
    norm = f"model.layers.{index}.post_attention_layernorm.weight"
    state.setdefault(norm, torch.ones(model.hidden))
    return _resized(model, index, own._replace(ffn=ffn), state)


def with_all_biases(model: LlamaShaped) -> LlamaShaped:
    """Return the model with biases in all linear layers of a half or in none: zeros where missing.

    Halves are those of all blocks: a format that says "attention has biases" says it of all.
    """
    state = dict(model.state)
    for half, roles in _LINEARS.items():
        if not has_biases(model, half):
            continue
        for index in range(len(model.blocks)):
            for role in roles:
                name = f"model.layers.{index}.{role}"
                if f"{name}.weight" in state:
                    rows = state[f"{name}.weight"].shape[0]
                    state.setdefault(f"{name}.bias", torch.zeros(rows))
    return replace(model, state=state)


def has_biases(model: LlamaShaped, half: Half) -> bool:
    """Tell whether any linear layer of a half of any block has a bias."""
    biases = [name for name in model.state if name.endswith(".bias")]
    return any(name.endswith(f".{role}.bias") for name in biases for role in _LINEARS[half])


def without_absent(model: LlamaShaped) -> LlamaShaped:
    """Return the model without the norms of halves that are absent."""
    kept = {}
    for name, tensor in model.state.items():
        parts = name.split(".")
        if parts[1] == "layers":
            block = model.blocks[int(parts[2])]
            if not (block.heads if parts[3] in _ATTENTION else block.ffn):
                continue
        kept[name] = tensor
    return replace(model, state=kept)


def is_rotated(name: str) -> bool:
    """Tell whether rows of a weight are turned by their position: those of queries and keys."""
    return ".q_proj." in name or ".k_proj." in name


def _spread(heads: Sequence[int], dim: int) -> Tensor:
    """Return the rows of some heads."""
    return (torch.tensor(heads, dtype=torch.long)[:, None] * dim + torch.arange(dim)).flatten()


def _resized(
    model: LlamaShaped, index: int, shape: BlockShape, state: Mapping[str, Tensor]
) -> LlamaShaped:
    blocks = (*model.blocks[:index], shape, *model.blocks[index + 1 :])
    return replace(model, state=state, blocks=blocks)
