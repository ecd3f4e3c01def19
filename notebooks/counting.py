"""A small model and a small task for the notebooks: going on counting, learned in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import elastune as et
from elastune.data import Splits
from elastune.tasks import Task

MAX_LENGTH = 32  # tokens of an example, at most


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each character."""
    words = ["<pad>", "<s>", "</s>", *" 0123456789>"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama of four small blocks, its weights drawn at random."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


def make_task(folder: Path) -> tuple[Task, Splits]:
    """Write ``12 13 14 >`` -> ``15 16`` and its like to files, and return task and splits."""
    rows = [
        {"prompt": f"{n} {n + 1} {n + 2} >", "completion": f" {n + 3} {n + 4}"}
        for n in range(10, 800)
    ]
    random.Random(0).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in {"train": rows[:690], "report": rows[690:]}.items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    task = et.get_task(
        str(folder / "train.jsonl"),
        report=str(folder / "report.jsonl"),
        template="none",
        max_new_tokens=10,
    )
    splits = et.make_splits(
        task.train_examples(),
        {task.name: task.report_examples()},
        n_train=600,
        n_validation=60,
        n_calibration=60,
        seed=0,
    )
    return task, splits


def learn(model: Any, tokenizer: Any, task: Task, splits: Splits, folder: Path, steps: int) -> None:
    """Train all weights of a model on the task."""
    config = et.TrainConfig(
        update="full",
        max_steps=steps,
        batch_size=32,
        full_learning_rate=5e-3,
        max_length=MAX_LENGTH,
        checkpoint_every=steps,
    )
    et.finetune(model, tokenizer, task, splits.train, config, folder=folder, update="full")
    model.eval()
