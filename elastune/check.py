"""Refuse what a run cannot do, before anything is written."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.integrations import get_available_reporting_integrations

from elastune.budgets import check_budgets
from elastune.errors import BadData, BadRecipe, nearest
from elastune.finetune import net_space
from elastune.generate import check_context
from elastune.heads import HEADS
from elastune.models import architecture
from elastune.models.four_bit import nf4_config
from elastune.processes import shards_base
from elastune.run import Run
from elastune.search.stored import check_storage
from elastune.search_limits import check_limits
from elastune.tasks import Task

_LONGEST = 64
"""Prompts that are tokenised to find the longest: those of the most characters."""


def check(run: Run) -> None:
    """Load model and data once, and see that every stage of the recipe can work with them.

    Raises:
        ElastuneError: the first thing that is wrong.
    """
    _check_training(run)
    _check_packed(run)
    check_limits(run.recipe.search, run.recipe.search.limits, run.recipe.baselines)
    check_storage(run.recipe.search.storage)
    _check_tasks(run)
    model, _ = run.outline if run.streams else run.load_dense()
    structure = run.recipe.structure
    is_generated = structure is not None and structure.generate is not None
    space = (
        None
        if is_generated
        else net_space(model, run.recipe.adapter, structure, run.recipe.sparsify)
    )
    check_budgets(run, model, space)
    _check_examples(run)
    _check_prompts(run, model)
    _check_teacher(run)
    if run.recipe.method != "finetune" or any("sparse" in name for name in run.recipe.baselines):
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


def _check_packed(run: Run) -> None:
    """See that a base can be packed in 4 bits here."""
    if not run.recipe.packs_base:
        return
    nf4_config(torch.float32)
    if shards_base():
        raise BadRecipe(
            "quantise.method=nf4 packs weights in a way that is not cut into shards",
            try_="several processes without --use_fsdp, each with the packed base; or quantise out",
        )


def _check_tasks(run: Run) -> None:
    """See that one model with one head can do all tasks."""
    mine = run.task_of(run.recipe.task)
    for cfg in run.recipe.report_tasks:
        task = run.task_of(cfg)
        if (task.head, task.num_labels) != (mine.head, mine.num_labels):
            raise BadRecipe(
                f"task {run.recipe.task.name!r} trains {_head_text(mine)}, and report task "
                f"{cfg.name!r} needs {_head_text(task)}",
                try_="report on tasks of the same kind, or make a run of each",
            )


def _head_text(task: Task) -> str:
    labels = f" of {task.num_labels} labels" if task.num_labels else ""
    return f"a {task.head} head{labels}"


def _check_examples(run: Run) -> None:
    splits = run.splits
    for note in splits.notes:
        run.reporter.say(note)
    report = ", ".join(
        f"{len(run.report_examples(task))} {task.label}" for task in run.recipe.report_tasks
    )
    if run.recipe.only_scores:
        run.reporter.say(f"{report} report examples; nothing is trained")
        return
    cfg = run.recipe.train
    encode = HEADS[run.task_of(run.recipe.task).head].encode
    try:
        encode(splits.train[: cfg.batch_size], run.tokenizer, cfg.max_length)
    except BadData:
        encode(splits.train, run.tokenizer, cfg.max_length)
    run.reporter.say(
        f"{len(splits.train)} training, {len(splits.validation)} validation and {report} report "
        "examples; no question in two splits"
    )


def _check_prompts(run: Run, model: PreTrainedModel) -> None:
    """See that the longest prompts that are to be answered leave room for the answer."""
    for cfg in run.recipe.report_tasks:
        task = run.task_of(cfg)
        if task.kind == "generation":
            prompts = {example.prompt for example in run.report_examples(cfg)}
            longest = sorted(prompts, key=len)[-_LONGEST:]
            tokens = max(map(len, run.tokenizer(longest).input_ids), default=0)
            check_context(model.config, tokens, task.max_new_tokens)


def _check_teacher(run: Run) -> None:
    """See that a checkpoint that is to teach is there, and reads the model's own tokens."""
    distill = run.recipe.train.distill
    is_checkpoint = distill.has_outside_teacher and distill.teacher not in run.recipe.baselines
    if is_checkpoint and not run.dir.is_done("train", run.inputs("train")):
        run.load_teacher(str(distill.teacher))


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
    cfg = run.recipe.sparsify
    quantise = run.recipe.quantise
    needs_text = quantise is not None and quantise.method == "gptq"
    needs_text |= cfg.method != "magnitude" and (sparsity.ratio > 0 or bool(cfg.choices))
    if run.dir.is_done("sparsify", run.inputs("sparsify")):
        return
    if needs_text:
        run.calibration(model, cfg.calibration)
    structure = run.recipe.structure
    is_sparse = sparsity.ratio > 0 or bool(cfg.choices)
    if run.recipe.merges and run.recipe.cuts_base and is_sparse and run.recipe.adapter.ranks:
        run.reporter.say(
            "structure.merge adds adapters to sparse weights, whose zeros are then lost; "
            "structure.merge=false keeps them, with the adapter beside the model"
        )
    if structure is not None and structure.order in ("wanda", "taylor"):
        run.calibration(model, structure.calibration)
