"""The settings of a training, as `transformers.Trainer` takes them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from elastune.config import TrainConfig
from elastune.errors import BadRecipe


def trainer_arguments(cfg: TrainConfig, folder: Path) -> TrainingArguments:
    """Translate our settings into transformers' own.

    Args:
        cfg: of the training.
        folder: for its checkpoints.

    Raises:
        BadRecipe: a precision that this device lacks.
    """
    cuda = torch.cuda.is_available()
    precision = cfg.precision
    if precision == "auto":
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and not cuda:
        raise BadRecipe(
            "train.precision=fp16 needs a GPU, and there is none here", try_="fp32 or bf16"
        )
    found = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=cfg.epochs,
        max_steps=cfg.max_steps or -1,
        per_device_train_batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.accumulation,
        learning_rate=cfg.full_learning_rate if cfg.update == "full" else cfg.learning_rate,
        lr_scheduler_type=cfg.schedule,
        warmup_steps=cfg.warmup,
        weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.max_grad_norm,
        use_cpu=precision == "bf16" and not cuda,  # asked for bf16 here, the Trainer insists
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        save_strategy="steps",
        save_steps=cfg.checkpoint_every,
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(cfg.report_to) or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
        seed=cfg.seed or 0,
        data_seed=cfg.seed or 0,
    )
    found._n_gpu = min(found.n_gpu, 1)  # replicas within a process cannot follow what is activated
    return found
