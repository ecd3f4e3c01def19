"""Training a 7B model's adapters: NLS beside stock PEFT LoRA of the largest rank, same batches.

Both train in bfloat16 autocast with AdamW on examples of mixed lengths: PEFT in padded batches with
the model's own loss, NLS in packed ones with a new sub-adapter of ranks 32/24/16 every step, on q,
k, v, up and down. They run one after the other, so that each has the memory to itself.

- nls_tokens_per_s, peft_tokens_per_s: of the examples, padding not counted; nls_over_peft_step.
- nls_peak_gib, peft_peak_gib; memory_over_peft. Goal 0.6.
- nls_hours, peft_hours: three epochs over 10,000 examples of this mean length, projected from
  these steps. The paper on Shears tells of a pair of hours on one GPU. Goal 2.

    python benchmarks/gpu/train_step.py [--quick] [--steps 10] [--batch-size 16] [--tokens 240]
                                        [--device cuda] [--blocks 32] [--width 4096]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import subject
import torch

from elastune.build_space import lora_space
from elastune.data import Encoded, PackedBatch, pack
from elastune.losses import completion_loss
from elastune.packing import packed_attention
from elastune.sampling import RandomSampler
from elastune.supernet import SuperNetwork

RANKS = (32, 24, 16)
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
EPOCHS, EXAMPLES = 3, 10_000
Step = Callable[[Sequence[Encoded], int], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    subject.add_options(parser)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=240, help="of an example, on average")
    args = subject.parsed(parser, "gpu_train_step")
    args.steps = min(args.steps, 3) if args.quick else args.steps
    batches = [_batch(args, number) for number in range(args.steps + 1)]
    figures: dict[str, Any] = {"device": subject.device_name(args.device)}
    for name, system in {"peft": _peft, "nls": _nls}.items():
        figures |= _measure(name, system(args), batches, args)
        gc.collect()
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    figures["nls_over_peft_step"] = figures["nls_step_s"] / figures["peft_step_s"]
    figures["memory_over_peft"] = figures["nls_peak_gib"] / figures["peft_peak_gib"]
    title = f"{args.blocks} blocks of {args.width}, {args.batch_size} examples a step"
    subject.report("gpu_train_step", title, figures)


def _batch(args: argparse.Namespace, number: int) -> list[Encoded]:
    """Return examples a third to five thirds of the mean length long, a third of each a prompt."""
    rng = np.random.default_rng(number)
    lengths = rng.integers(args.tokens // 3, args.tokens * 5 // 3 + 1, args.batch_size)
    ids = [rng.integers(3, args.vocabulary, length).tolist() for length in lengths]
    return [Encoded(tokens, len(tokens) // 3) for tokens in ids]


def _measure(
    name: str, step: Step, batches: Sequence[Sequence[Encoded]], args: argparse.Namespace
) -> dict[str, float]:
    """Take the steps; the first warms up."""
    seconds, tokens, peak = [], 0, 0.0
    for number, batch in enumerate(batches):
        taken, gib = subject.measured(lambda b=batch, n=number: step(b, n), args.device)
        if number:
            seconds.append(taken)
            tokens += sum(len(example.input_ids) for example in batch)
            peak = max(peak, gib) if gib == gib else gib
    rate = tokens / sum(seconds)
    mean_tokens = tokens / (len(seconds) * args.batch_size)
    return {
        f"{name}_step_s": statistics.median(seconds),
        f"{name}_tokens_per_s": rate,
        f"{name}_peak_gib": peak,
        f"{name}_hours": EPOCHS * EXAMPLES * mean_tokens / rate / 3600,
    }


def _peft(args: argparse.Namespace) -> Step:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=RANKS[0], lora_alpha=2 * RANKS[0], target_modules=list(TARGETS))
    model = get_peft_model(subject.llama(args), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    kind = torch.device(args.device).type

    def step(batch: Sequence[Encoded], _: int) -> None:
        length = max(len(item.input_ids) for item in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, item in enumerate(batch):
            size = len(item.input_ids)
            ids[row, :size] = torch.tensor(item.input_ids)
            labels[row, item.n_prompt : size] = ids[row, item.n_prompt : size]
            mask[row, :size] = 1
        on = [tensor.to(args.device) for tensor in (ids, mask, labels)]
        with torch.autocast(kind, torch.bfloat16):
            loss = model(input_ids=on[0], attention_mask=on[1], labels=on[2]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _nls(args: argparse.Namespace) -> Step:
    model = subject.llama(args)
    space = lora_space(model, RANKS)
    net = SuperNetwork(model, space, alpha=2 * RANKS[0]).train()
    sampler = RandomSampler(space, seed=0)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=3e-4)
    kind = torch.device(args.device).type

    def step(batch: Sequence[Encoded], number: int) -> None:
        net.activate(sampler.draw(number, 0.0)[0].config)
        packed = PackedBatch(*(tensor.to(args.device) for tensor in _tensors(pack(batch))))
        with packed_attention(model):
            with torch.autocast(kind, torch.bfloat16):
                summed, count = completion_loss(model, packed)
            (summed / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _tensors(batch: PackedBatch) -> tuple[torch.Tensor, ...]:
    return batch.input_ids, batch.labels, batch.positions, batch.starts


if __name__ == "__main__":
    main()
