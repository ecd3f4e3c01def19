"""Refuse what a run cannot do, before anything is written."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.integrations import get_available_reporting_integrations

from elastune.data import encode_all
from elastune.errors import BadData, BadRecipe, UnsupportedModel, nearest
from elastune.models import architecture
from elastune.run import Run


def check(run: Run) -> None:
    """Load model and data once, and see that every stage of the recipe can work with them.

    Raises:
        ElastuneError: the first thing that is wrong.
    """
    _check_training(run)
    model, _ = run.load_dense()
    run.space_of(model)
    if architecture(model).kind != "decoder":
        raise UnsupportedModel(
            f"method {run.recipe.method!r} trains text generation, and {run.recipe.model!r} "
            f"({model.config.model_type}) is an encoder",
            try_="a decoder such as smollm2-135m",
        )
    _check_examples(run)
    _check_sparsity(run, model)


def _check_training(run: Run) -> None:
    cfg = run.recipe.train
    if cfg.precision == "fp16" and not torch.cuda.is_available():
        raise BadRecipe(
            "train.precision=fp16 needs a GPU, and there is none here", try_="fp32 or bf16"
        )
    installed = get_available_reporting_integrations()
    for name in cfg.report_to:
        if name not in installed:
            raise BadRecipe(
                f"train.report_to: there is no tracker {name!r}{nearest(name, installed)} here; "
                f"installed are {', '.join(installed) or 'none'}",
                try_=f"pip install {name}, or leave train.report_to out",
            )


def _check_examples(run: Run) -> None:
    splits = run.splits
    cfg = run.recipe.train
    try:
        encode_all(splits.train[: cfg.batch_size], run.tokenizer, cfg.max_length)
    except BadData:
        encode_all(splits.train, run.tokenizer, cfg.max_length)
    report = ", ".join(
        f"{len(run.report_examples(task))} {task.label}" for task in run.recipe.report_tasks
    )
    run.reporter.say(
        f"{len(splits.train)} training, {len(splits.validation)} validation and {report} report "
        "examples; no question in two splits"
    )


def _check_sparsity(run: Run, model: PreTrainedModel) -> None:
    sparsity = run.sparsity
    if sparsity.n_of_m is not None:
        for name in architecture(model).linear_names(model):
            width = int(model.get_submodule(name).in_features)  # type: ignore[arg-type]
            if width % sparsity.n_of_m[1]:
                raise BadRecipe(
                    f"sparsify.pattern: the {width} inputs of {name} cannot be cut into groups of "
                    f"{sparsity.n_of_m[1]}",
                    try_="another pattern, or sparsify.ratio",
                )
    needs_text = run.recipe.sparsify.method != "magnitude" and sparsity.ratio > 0
    if needs_text and not run.dir.is_done("sparsify", run.inputs("sparsify")):
        run.calibration(model)
