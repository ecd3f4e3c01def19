"""What snippets of the documentation take for granted: small models, data and runs, made here.

A page names what it needs in a comment (`docs_blocks`); each function below adds the names that it
is called after to those of the page. They may be asked for again: a block then begins with fresh
ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from tiny_llama import tiny_tokenizer
from tiny_models import tiny_model
from tiny_run import cli, save_recipe, save_sums, tiny_recipe
from transformers import LlamaConfig, LlamaForCausalLM

import elastune as et
from elastune.heads import HEADS

Names = dict[str, Any]


def small_llama() -> tuple[LlamaForCausalLM, Any]:
    """Make a random Llama whose rows can be cut into groups of 64, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def _model(names: Names) -> None:
    names["model"], names["tokenizer"] = small_llama()


def _texts(names: Names) -> None:
    names["texts"] = [f"What is {a} + {a}? The answer is {a + a}." for a in range(40)]


def _rows(names: Names) -> None:
    _texts(names)
    tokenizer = names["tokenizer"]
    names["rows"] = et.calibration_rows(names["texts"], tokenizer, n_sequences=4, length=32, seed=0)


def _task(names: Names) -> None:
    """Add a task of sums in files, its splits, and what is encoded of them."""
    save_sums(Path("sums"))
    names["task"] = task = et.get_task("sums/train.jsonl", report="sums/report.jsonl")
    names["splits"] = splits = et.make_splits(
        task.train_examples(),
        {task.name: task.report_examples()},
        n_train=24,
        n_validation=8,
        n_calibration=0,
        seed=0,
    )
    names["examples"] = splits.validation[:4]
    names["items"] = et.encode_all(splits.train, names["tokenizer"], 128)


def _net(names: Names) -> None:
    """Add a super-network of ranks and widths."""
    _model(names)
    widths = et.structure_space(names["model"], ffn=[1.0, 0.5], heads=[1.0, 0.5], round_to=8)
    names["space"] = et.lora_space(names["model"], (8, 4)) + widths
    names["net"] = et.SuperNetwork(names["model"], names["space"], alpha=16)


def _objective(names: Names) -> None:
    """Add the objective of the super-network that the page has made."""
    _task(names)
    names["objective"], names["values"] = et.make_objective(
        names["net"],
        names["tokenizer"],
        names["task"],
        names["splits"].validation[:4],
        et.CostModel(names["net"], 64),
        kind="loss",
    )


def _lora(names: Names) -> None:
    """Leave a LoRA of stock PEFT in my-lora, trained by nobody."""
    model, tokenizer = small_llama()
    model.save_pretrained("my-base")
    tokenizer.save_pretrained("my-base")
    config = peft.LoraConfig(
        r=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(LlamaForCausalLM.from_pretrained("my-base"), config)
    adapted.save_pretrained("my-lora")
    _model(names)


def _classifier(names: Names) -> None:
    """Add a small encoder with a head, its super-network, and items to train on."""
    names["head"] = HEADS["sequence-classification"]
    names["model"] = tiny_model("bert", auto=_classes(), num_labels=2)
    student = tiny_model("bert", auto=_classes(), num_labels=2)
    names["space"] = et.lora_space(student, (4, 2))
    names["net"] = et.SuperNetwork(student, names["space"])
    names["items"] = _encoded(24)
    names["sampler"] = et.RandomSampler(names["space"], seed=0)
    names["folder"], names["run"] = Path("run/teacher"), Path("run/supernet")


def _classes() -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification


def _encoded(count: int) -> list[Any]:
    from elastune.heads.sequence_classification import EncodedText

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (count, 6), generator=generator).tolist()
    mask = [1] * 6
    return [
        EncodedText({"input_ids": row, "attention_mask": mask}, i % 2, 0)
        for i, row in enumerate(ids)
    ]


def _words(names: Names) -> None:
    """Add texts of training and others, and a teacher of the same vocabulary."""
    _model(names)
    _texts(names)
    names["teacher"], names["old_tokenizer"] = small_llama()
    names["training_texts"], names["held_out_texts"] = names["texts"][:20], names["texts"][20:]
    names["training_ids"] = names["tokenizer"](names["training_texts"])["input_ids"]


def _a_run(names: Names) -> None:
    """Leave a finished Shears run in runs/shears."""
    model, tokenizer = small_llama()
    model.save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    recipe = tiny_recipe(Path("tiny"), save_sums(Path("sums")), train={"max_steps": 1})
    recipe["baselines"] = ["dense"]
    recipe["search"]["trials"] = 1
    cli("run", save_recipe(Path("tiny.yaml"), recipe), "--out", "runs/shears")


def _saved_model(names: Names, folder: str) -> None:
    """Leave a smaller model whose blocks differ in a folder."""
    _net(names)
    config = {**names["space"].largest(), "layers.1.ffn": 128}
    sub = et.extract_model(names["net"], et.SubnetConfig(config))
    et.save_subnetwork(sub, names["tokenizer"], folder)


def _saved_classifier(names: Names, folder: str) -> None:
    """Leave a smaller classifier whose blocks differ in a folder."""
    model = tiny_model("bert", auto=_classes(), num_labels=2)
    space = et.structure_space(model, ffn={"layers.1.ffn": [1.0, 0.5]}, round_to=8)
    net = et.SuperNetwork(model, space)
    et.save_subnetwork(et.extract_model(net, space.smallest()), tiny_tokenizer(), folder)


def _an_onnx_export(names: Names) -> None:
    """Leave a classifier for onnxruntime where the page has it."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("distilbert", auto=_classes(), num_labels=2, vocab_size=len(tokenizer))
    et.export_model(model, "onnx", "runs/mine/export/onnx", tokenizer=tokenizer)


def _config(names: Names) -> None:
    names["config"] = names["space"].heuristic()


def _storage(names: Names) -> None:
    names["path"] = Path("study.journal")


def _families(names: Names) -> None:
    from elastune.models import families

    names.update(vars(families))


NAMES: dict[str, Callable[[Names], None]] = {
    "model": _model,
    "texts": _texts,
    "rows": _rows,
    "task": _task,
    "net": _net,
    "objective": _objective,
    "lora": _lora,
    "classifier": _classifier,
    "words": _words,
    "a run": _a_run,
    "an onnx export": _an_onnx_export,
    "config": _config,
    "storage": _storage,
    "families": _families,
}
"""What a comment may ask for -> what adds it, in the folder that the snippets of a page run in."""

FOLDERS: dict[str, Callable[[Names, str], None]] = {
    "a model": _saved_model,
    "a classifier": _saved_classifier,
}
"""What a comment may ask for ``in`` a folder -> what writes it."""


def add_needs(needs: str, names: Names) -> None:
    """Add what a comment asks for, such as ``net, rows`` or ``a model in runs/mine``."""
    for need in filter(None, map(str.strip, needs.split(","))):
        what, among, folder = need.partition(" in ")
        if among:
            FOLDERS[what](names, folder)
        else:
            NAMES[need](names)
