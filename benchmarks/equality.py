"""Two equalities on a real model, in float32.

- peft_max_abs_logit_difference: a random sub-network active in the super-network, against the same
  sub-network extracted to disk and loaded by stock peft on a freshly loaded base.
- checkpointing_relative_gradient_error: gradients of all adapters with checkpointing against
  those without, for the same sub-network and batch (the follow-up reference code: 0.9).

    python benchmarks/equality.py [--quick] [--model smollm2-135m]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from data_folder import add_data_option

from elastune.build_space import lora_space
from elastune.data import PackedBatch, encode_all, pack
from elastune.extract import extract
from elastune.losses import completion_loss
from elastune.models import load_model
from elastune.packing import packed_attention
from elastune.supernet import SuperNetwork
from elastune.tasks import get_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quick", action="store_true", help="one sub-network instead of three")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    space = lora_space(model, {"*": [32, 24, 16], "*.down": [16, 8, 0]})
    net = SuperNetwork(model, space)
    generator = torch.Generator().manual_seed(0)
    for adapter in net.adapters.values():  # as if trained: B is zero otherwise
        torch.nn.init.normal_(adapter.lora_B, std=0.02, generator=generator)
    examples = get_task("gsm8k", data_dir=args.data).train_examples()[:4]
    batch = pack(encode_all(examples, tokenizer, 256))
    ids = batch.input_ids[:, : int(batch.starts[1])]

    differences = []
    for seed in range(1 if args.quick else 3):
        net.activate(space.sample(np.random.default_rng(seed)))
        differences.append(_peft_difference(net, args.model, ids))
    error = _checkpointing_error(net, batch)
    print(
        f"max abs logit difference to stock peft: {max(differences):.2e} (logits are of order 10)"
    )
    print(f"relative gradient error of gradient checkpointing: {error:.2e}")
    figures = {
        "peft_max_abs_logit_difference": max(differences),
        "checkpointing_relative_gradient_error": error,
    }
    print(json.dumps({"benchmark": "equality", "figures": figures}))


@torch.inference_mode()
def _peft_difference(net: SuperNetwork, name: str, ids: torch.Tensor) -> float:
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", FutureWarning)
        from peft import PeftModel

        extract(net, net.config).save(Path(folder) / "adapter")
        stock = PeftModel.from_pretrained(load_model(name)[0], Path(folder) / "adapter").eval()
        return float((net.model(ids).logits - stock(ids).logits).abs().max())


def _checkpointing_error(net: SuperNetwork, batch: PackedBatch) -> float:
    gradients = []
    net.train()
    for checkpointing in (False, True):
        if checkpointing:
            net.model.activation_checkpointing_enable({"use_reentrant": False})
        net.zero_grad()
        with packed_attention(net.model):
            completion_loss(net.model, batch)[0].backward()
        trained = [p for p in net.parameters() if p.grad is not None]
        gradients.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
    return float((gradients[0] - gradients[1]).norm() / gradients[0].norm())


if __name__ == "__main__":
    main()
