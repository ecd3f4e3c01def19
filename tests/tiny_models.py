"""Random two-layer models of every family, and super-networks over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from elastune.build_space import lora_space
from elastune.data import Encoded
from elastune.supernet import SuperNetwork

VOCAB = 64
ENCODERS = ("bert", "roberta", "distilbert")


def tiny_model(model_type: str, *, auto: Any = None, seed: int = 0, **changes: Any) -> Any:
    """Build a model whose random weights are large enough for its logits to differ clearly."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    if model_type == "distilbert":
        sizes = {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
        sizes |= {"max_position_embeddings": 64, "initializer_range": 0.2}
    elif model_type not in ENCODERS:
        sizes |= {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **(sizes | changes))
    auto = auto or (AutoModel if model_type in ENCODERS else AutoModelForCausalLM)
    torch.manual_seed(seed)
    return auto.from_config(config).eval()


def tiny_net(model: Any, *, ranks: Any = (8, 4, 2), seed: int = 0, **options: Any) -> SuperNetwork:
    """Make a model elastic, with adapters that do something."""
    net = SuperNetwork(model, lora_space(model, ranks), seed=seed, **({"alpha": 16} | options))
    fill_adapters(net, seed)
    return net


def fill_adapters(net: SuperNetwork, seed: int = 0) -> None:
    """Move every B away from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in net.adapters.values():
            noise = torch.randn(adapter.lora_B.shape, generator=generator)
            adapter.lora_B.copy_(noise * 0.05)


def token_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Draw random sequences without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def encoded(*lengths: int, seed: int = 0, n_prompt: int = 2) -> list[Encoded]:
    """Draw random training examples."""
    return [Encoded(ids, n_prompt) for ids in token_ids(*lengths, seed=seed)]


def logits_of(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Return logits, or the hidden states of a model without a head."""
    with torch.no_grad():
        return model(input_ids=ids, **options)[0]
