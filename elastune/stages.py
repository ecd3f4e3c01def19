"""The stages that make a run's base, and train its super-network and its baselines.

Every stage is skipped when its inputs did not change since it was done, and goes on where it was
killed otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from elastune.build_sparsity import Criterion, save_levels, sparsity_levels, sparsity_space
from elastune.config import QuantiseConfig, TrainConfig
from elastune.drop_blocks import drop_blocks_
from elastune.elastic.mask import WeightLevels
from elastune.elastic.merge_rules import Int4Grid
from elastune.files import whole_folder, write_json
from elastune.finetune import save_tuned
from elastune.importance.ranking import Ranking
from elastune.importance.structure import structure_scores
from elastune.inputs import fingerprint
from elastune.models import write_model
from elastune.processes import is_main, main_first, together
from elastune.quantise import quantise_, save_grids
from elastune.reorder import reorder_
from elastune.run import Run
from elastune.sampling import make_sampler
from elastune.sparsify import sparsify_, sparsity_report
from elastune.teacher import AnyTeacher, Teacher, cache_teacher
from elastune.train import train
from elastune.trained import Trainee


def sparsify(run: Run) -> None:
    """Prune and reorder the base as the recipe says; save it with its account of zeros."""
    inputs = run.inputs("sparsify")
    if run.dir.is_done("sparsify", inputs):
        return
    cfg = run.recipe.sparsify
    model = run.load_start()
    with run.dir.stage("sparsify", inputs, run.dir.base):
        if run.sparsity.ratio > 0:
            with run.reporter.bar(f"sparsify ({cfg.method})", "blocks") as bar:
                is_blind = cfg.method == "magnitude"
                rows = None if is_blind else run.calibration(model, cfg.calibration)
                sparsify_(model, cfg.method, run.sparsity, rows, progress=bar)
        _reorder(run, model)
        grids = None
        if run.recipe.quantise is not None:
            grids = _quantise(run, model, run.recipe.quantise)
        levels = _levels(run, model)
        report = sparsity_report(model, method=cfg.method, sparsity=run.sparsity)
        with whole_folder(run.dir.base) as partial:
            write_model(model, run.tokenizer, partial)
            write_json(partial / run.dir.sparsity.name, report)
            if grids is not None:
                save_grids(partial / run.dir.grid.name, grids)
            if levels is not None:
                save_levels(partial / run.dir.levels.name, levels, {"criterion": cfg.method})
    if run.sparsity.ratio > 0:
        share = report["total"]["sparsity"]
        run.reporter.say(f"{share:.2%} of the blocks' weights are zero")
    if grids is not None:
        run.reporter.say(f"the weights of {len(grids)} linear layers are on an INT4 grid")


def _quantise(run: Run, model: PreTrainedModel, cfg: QuantiseConfig) -> dict[str, Int4Grid]:
    """Put the weights on an INT4 grid."""
    text = run.recipe.sparsify.calibration
    rows = run.calibration(model, text) if cfg.method == "gptq" else None
    with run.reporter.bar(f"quantise ({cfg.method})", "blocks") as bar:
        return quantise_(
            model, cfg.method, group_size=cfg.group_size, calibration=rows, progress=bar
        )


def _levels(run: Run, model: PreTrainedModel) -> WeightLevels | None:
    """Order the weights for all sparsities that the recipe lets the search choose from."""
    cfg = run.recipe.sparsify
    if not cfg.choices:
        return None
    rows = None if cfg.method == "magnitude" else run.calibration(model, cfg.calibration)
    space = sparsity_space(model, cfg.choices, per=cfg.per)
    with run.reporter.bar(f"order weights ({cfg.method})", "layers") as bar:
        return sparsity_levels(model, space, cast(Criterion, cfg.method), rows, progress=bar)


def _reorder(run: Run, model: PreTrainedModel) -> None:
    """Sort heads and channels, best first; the model computes what it did.

    Blocks that no point of a generated space keeps are then left out.
    """
    cfg = run.recipe.structure
    if cfg is None or cfg.order == "natural":
        return
    if cfg.order == "importance":
        reorder_(model, Ranking.load(run.dir.importance).order)
        if cfg.generate is not None:
            drop_blocks_(model, run.generated.removed_blocks)
        return
    if cfg.ffn is None and cfg.heads is None:
        return
    rows = None if cfg.order == "magnitude" else run.calibration(model, cfg.calibration)
    run.reporter.say(f"heads and channels are sorted by {cfg.order}, so that the best are kept")
    reorder_(model, structure_scores(model, rows, method=cfg.order))


def train_supernet(run: Run) -> None:
    """Train the super-network: all its sub-networks at once."""
    inputs = run.inputs("train")
    if run.dir.is_done("train", inputs):
        return
    with run.dir.stage("train", inputs, run.dir.supernet, run.dir.space):
        together(_train_supernet, run)


def _train_supernet(run: Run) -> None:
    model = run.load_sparse()
    space = run.space_of(model)
    if is_main():
        write_json(run.dir.space, space.to_dict())
    cfg = run.recipe.train
    sampler = make_sampler(cfg.sampler, space, run.train_config.seed or 0, n_random=cfg.n_random)
    net = run.untrained(model, space)
    fit(run, net, sampler, run.train_config, run.dir.supernet, "super-network")


def train_baseline(run: Run, name: str) -> None:
    """Train all weights, or a plain LoRA of the largest ranks, for the same steps and batches.

    Args:
        name: ``dense+full``, ``dense+lora`` or ``sparse+lora``.
    """
    inputs = run.inputs(name)
    if run.dir.is_done(name, inputs):
        return
    with run.dir.stage(name, inputs, run.dir.baseline(name)):
        together(_train_baseline, run, name)


def _train_baseline(run: Run, name: str) -> None:
    net, sampler, cfg = run.whole(name)
    folder = run.dir.baseline(name)
    fit(run, net, sampler, cfg, folder, name)
    if is_main():
        sparse = str(run.dir.base.resolve())
        base = sparse if name.startswith("sparse") else net.model.name_or_path
        save_tuned(net, run.tokenizer, folder, base=base)


def fit(run: Run, net: Trainee, sampler: Any, cfg: TrainConfig, folder: Path, title: str) -> None:
    """Train anything on the training examples, with the recipe's teacher if ``cfg`` asks.

    Of several processes all call this (`elastune.processes.together`).
    """
    head = run.head
    items = head.encode(run.splits.train, run.tokenizer, cfg.max_length)
    teacher = _teacher(run, items, cfg)
    with run.reporter.bar(f"train {title}", "steps") as bar:

        def show(done: int, total: int, facts: Mapping[str, float]) -> None:
            note = f"loss {facts['loss']:.3f}" if facts else ""
            speed = f", {facts['tokens_per_s']:.0f} tokens/s" if facts else ""
            bar(done, total, note + speed)

        train(
            net,
            items,
            sampler,
            cfg,
            folder=folder,
            head=head,
            progress=show,
            teacher=teacher,
        )


def _teacher(run: Run, items: Sequence[Any], cfg: TrainConfig) -> AnyTeacher | None:
    """Return the outside teacher that ``cfg`` names; what it says is kept where it can be."""
    name = cfg.distill.teacher
    if name is None or not cfg.distill.has_outside_teacher:
        return None
    if name in run.recipe.baselines:
        train_baseline(run, name)
    if cfg.distill.needs_features or not run.head.cacheable:
        return Teacher(run.load_teacher(name), run.head)
    identity = run.inputs("teacher")
    with main_first(), run.reporter.bar(f"ask the teacher ({name})", "examples") as bar:
        teacher = cache_teacher(
            lambda: run.load_teacher(name),
            items,
            run.head,
            run.dir.teacher(fingerprint(identity, cfg.max_length, run.inputs("data"))),
            identity=identity,
            batch_tokens=run.recipe.evaluate.batch_tokens,
            progress=bar,
        )
        bar(len(items), len(items))  # nothing is asked twice
    return teacher
