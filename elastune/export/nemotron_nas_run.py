"""Read a nemotron-nas checkpoint as its readers do, in a process of its own, and save the logits.

Run as a script: ``python -I nemotron_nas_run.py FOLDER OUT``. It imports nothing of elastune and no
model of transformers: blocks are built from config.json alone, by the rules that vLLM's reader
(``nemotron_nas.py``) follows. Every tensor must be there and be of the size that the config says,
and none may be left over.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional


def config_of(folder: Path) -> Any:
    """Return the config, by the file that lies beside it."""
    spec = importlib.util.spec_from_file_location("decilm", folder / "configuration_decilm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DeciLMConfig.from_pretrained(folder)


def channels(ffn: Any, hidden: int) -> int:
    """Return the width of a feed-forward; multiples are rounded up to 256."""
    if hasattr(ffn, "ffn_mult"):
        return -(-int(2 * ffn.ffn_mult * hidden / 3) // 256) * 256
    return int(ffn.intermediate_size)


class Reader:
    """A checkpoint and what of it was used."""

    def __init__(self, folder: Path) -> None:
        self.config = config_of(folder)
        self.weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("model*.safetensors")):
            self.weights |= load_file(file)
        self.used: set[str] = set()

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor.

        Raises:
            SystemExit: it is missing or of another size.
        """
        if name not in self.weights:
            raise SystemExit(f"{name} is missing")
        found = self.weights[name]
        if tuple(found.shape) != shape:
            raise SystemExit(f"{name} is {tuple(found.shape)}, the config says {shape}")
        self.used.add(name)
        return found

    def linear(self, x: Tensor, name: str, rows: int, has_bias: bool) -> Tensor:
        """Apply a linear layer with ``rows`` outputs."""
        weight = self.take(f"{name}.weight", rows, x.shape[-1])
        return functional.linear(x, weight, self.take(f"{name}.bias", rows) if has_bias else None)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Apply an RMS norm."""
        weight = self.take(f"{name}.weight", x.shape[-1])
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return x * scale * weight

    def attention(self, x: Tensor, name: str, sizes: Any) -> Tensor:
        """Apply the attention of a block, ``x``: ``(rows, tokens, hidden)``."""
        config = self.config
        heads, dim = config.num_attention_heads, config.head_dim
        kv_heads = heads // sizes.n_heads_in_group
        biased = bool(config.attention_bias)
        rows, tokens, hidden = x.shape

        def headed(path: str, count: int) -> Tensor:
            made = self.linear(x, path, count * dim, biased)
            return made.view(rows, tokens, count, dim).transpose(1, 2)

        q = rotated(headed(f"{name}.q_proj", heads), config)
        k = rotated(headed(f"{name}.k_proj", kv_heads), config)
        v = headed(f"{name}.v_proj", kv_heads)
        k, v = (t.repeat_interleave(sizes.n_heads_in_group, dim=1) for t in (k, v))
        scores = q @ k.transpose(2, 3) / dim**0.5
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        found = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        flat = found.transpose(1, 2).reshape(rows, tokens, heads * dim)
        return self.linear(flat, f"{name}.o_proj", hidden, biased)

    def feed_forward(self, x: Tensor, name: str, sizes: Any) -> Tensor:
        """Apply the feed-forward of a block."""
        width, biased = channels(sizes, x.shape[-1]), bool(self.config.mlp_bias)
        gate = self.linear(x, f"{name}.gate_proj", width, biased)
        up = self.linear(x, f"{name}.up_proj", width, biased)
        return self.linear(functional.silu(gate) * up, f"{name}.down_proj", x.shape[-1], biased)

    def logits(self, ids: Tensor) -> Tensor:
        """Return logits ``(rows, tokens, vocabulary)``."""
        config = self.config
        table = self.take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        x = functional.embedding(ids, table)
        if len(config.block_configs) != config.num_hidden_layers:
            raise SystemExit("block_configs are not as many as num_hidden_layers")
        for index, block in enumerate(config.block_configs):
            name = f"model.layers.{index}"
            if not block.attention.no_op:
                normed = self.norm(x, f"{name}.input_layernorm")
                x = x + self.attention(normed, f"{name}.self_attn", block.attention)
            elif index == 0:
                raise SystemExit("vLLM's reader needs an attention in the first block")
            if not block.ffn.no_op:
                normed = self.norm(x, f"{name}.post_attention_layernorm")
                x = x + self.feed_forward(normed, f"{name}.mlp", block.ffn)
        x = self.norm(x, "model.norm")
        if config.tie_word_embeddings:
            return functional.linear(x, table)
        return self.linear(x, "lm_head", config.vocab_size, False)


def rotated(x: Tensor, config: Any) -> Tensor:
    """Turn queries or keys ``(rows, heads, tokens, dim)`` by their positions."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dim, rope = x.shape[-1], config.rope_parameters
    if rope["rope_type"] == "default":
        frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
    else:
        frequencies, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    angles = torch.arange(x.shape[2]).float()[:, None] * frequencies
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@torch.no_grad()
def logits_of(folder: Path, ids: Tensor) -> Tensor:
    """Return the logits that a checkpoint gives, ``(rows, tokens, vocabulary)``.

    Raises:
        SystemExit: config and weights do not say the same.
    """
    reader = Reader(folder)
    found = reader.logits(ids)
    unused = sorted(set(reader.weights) - reader.used)
    if unused:
        raise SystemExit(f"{', '.join(unused[:4])} is no part of what the config says")
    return found


def main() -> None:
    """Read the folder, compute the logits of the reference inputs, write them."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    ids = load_file(folder / "reference.safetensors")["input_ids"]
    save_file({"logits": logits_of(folder, ids).contiguous()}, out)


if __name__ == "__main__":
    main()
