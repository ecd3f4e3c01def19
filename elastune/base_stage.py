"""How a run's base is made: sparse, sorted, in 4 bits; in memory, or block by block from files."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from elastune.build_sparsity import Criterion, save_levels, sparsity_levels, sparsity_space
from elastune.config import QuantiseConfig
from elastune.drop_blocks import drop_blocks_
from elastune.elastic.mask import WeightLevels
from elastune.elastic.merge_rules import Int4Grid
from elastune.files import remove, whole_folder, write_json
from elastune.importance.ranking import Ranking
from elastune.importance.structure import structure_scores
from elastune.models import load_model, write_model
from elastune.quantise import quantise_, save_grids
from elastune.reorder import reorder_
from elastune.run import Run
from elastune.sparsify import sparsify_, sparsity_report
from elastune.stream import write_reordered, write_sparse


def make_base(run: Run) -> None:
    """Write the base that a recipe asks for, with its account of zeros, whole or not at all."""
    with whole_folder(run.dir.base) as partial:
        report = _streamed(run, partial) if run.streams else _in_memory(run, partial)
        if run.recipe.packs_base:
            report = _packed(run, partial)
        write_json(partial / run.dir.sparsity.name, report)
    if run.sparsity.ratio > 0:
        share = report["total"]["sparsity"]
        run.reporter.say(f"{share:.2%} of the blocks' weights are zero")
    if run.recipe.packs_base:
        run.reporter.say("the linear layers of the blocks are packed in 4 bits (NF4)")


def _in_memory(run: Run, folder: Path) -> dict[str, Any]:
    """Write the base, with what belongs to it, from a model that is in memory."""
    cfg = run.recipe.sparsify
    model = run.load_start()
    if run.sparsity.ratio > 0:
        with run.reporter.bar(f"sparsify ({cfg.method})", "blocks") as bar:
            is_blind = cfg.method == "magnitude"
            rows = None if is_blind else run.calibration(model, cfg.calibration)
            sparsify_(model, cfg.method, run.sparsity, rows, progress=bar)
    _reorder(run, model)
    if run.recipe.quantise is not None and not run.recipe.packs_base:
        grids = _quantise(run, model, run.recipe.quantise)
        save_grids(folder / run.dir.grid.name, grids)
        run.reporter.say(f"the weights of {len(grids)} linear layers are on an INT4 grid")
    levels = _levels(run, model)
    if levels is not None:
        save_levels(folder / run.dir.levels.name, levels, {"criterion": cfg.method})
    write_model(model, run.tokenizer, folder)
    return sparsity_report(model, method=cfg.method, sparsity=run.sparsity)


def _streamed(run: Run, folder: Path) -> dict[str, Any]:
    """Write the base block by block; what is to be sorted is written once before."""
    cfg, structure = run.recipe.sparsify, run.recipe.structure
    order = None
    if structure is not None and (structure.ffn is not None or structure.heads is not None):
        order = None if structure.order == "natural" else structure.order
    outline = run.outline[0]
    run.reporter.say("the base is made block by block: it is never in memory whole")
    sparse = folder if order is None else folder / "unsorted"
    sparse.mkdir(exist_ok=True)
    rows = None
    if run.sparsity.ratio > 0 and cfg.method != "magnitude":
        rows = run.calibration(outline, cfg.calibration)
    with run.reporter.bar(f"sparsify ({cfg.method})", "blocks") as bar:
        # Of a base that stays dense nothing is zeroed, and only its files are written anew.
        method = cfg.method if run.sparsity.ratio > 0 else "magnitude"
        report = write_sparse(
            run.stream(run.recipe.model), sparse, method, run.sparsity, rows, progress=bar
        )
    if order is not None and structure is not None:
        rows = None if order == "magnitude" else run.calibration(outline, structure.calibration)
        run.reporter.say(f"heads and channels are sorted by {order}, so that the best are kept")
        with run.reporter.bar(f"sort ({order})", "blocks") as bar:
            streamed = run.stream(sparse, whole_head=order == "taylor")
            write_reordered(streamed, folder, rows, cast(Any, order), progress=bar)
        remove(sparse)
    return report | {"method": cfg.method}


def _packed(run: Run, folder: Path) -> dict[str, Any]:
    """Put a checkpoint in 4 bits into the place of one that was just written."""
    gc.collect()  # of a model in memory nothing may be left
    model, tokenizer = load_model(folder, **run.as_loaded, load_in_4bit=True)
    cfg = run.recipe.sparsify
    report = sparsity_report(model, method=cfg.method, sparsity=run.sparsity)
    with whole_folder(folder / "packed") as packed:
        write_model(model, tokenizer, packed)
    for file in folder.iterdir():
        if file.name != "packed":
            remove(file)
    for file in (folder / "packed").iterdir():
        file.rename(folder / file.name)
    (folder / "packed").rmdir()
    return report


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
