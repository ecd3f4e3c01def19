"""Llama-shaped models of any size with random weights, and text for them: nothing is downloaded."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from elastune.data import Encoded

VOCABULARY = 512


def llama(n_blocks: int, width: int = 256, *, seed: int = 0) -> LlamaForCausalLM:
    """Return a random Llama whose proportions are those of the family's 7B model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=n_blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def rows(n: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Return random token ids, ``(n, length)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (n, length), generator=generator)


def examples(n: int, length: int, *, seed: int = 0) -> list[Encoded]:
    """Return examples of which the first quarter is the prompt."""
    return [Encoded(ids, max(1, length // 4)) for ids in rows(n, length, seed=seed).tolist()]
