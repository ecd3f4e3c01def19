"""Sparsify and reorder checkpoints larger than memory: from files to files, block by block.

The result is, bit for bit, what `sparsify_` and `reorder_` make of the model in memory: the same
code runs, on a model of which one block's weights are there at a time. What is killed begins anew;
a target appears whole or not at all.

Shapes: `N` calibration rows, `L` tokens a row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from elastune.calibrate import calibration_blocks
from elastune.errors import BadRecipe, nearest
from elastune.files import whole_folder, write_json
from elastune.hidden_states import States, StatesOnDisk
from elastune.importance.streamed import streamed_scores, wanda_of_stage
from elastune.importance.structure import STRUCTURE_METHODS, StructureMethod, UnitScores
from elastune.models.blocks import Block, blocks
from elastune.models.save import write_settings
from elastune.models.shard_writer import ShardWriter
from elastune.models.streamed import StreamedModel
from elastune.reorder import reorder_
from elastune.sparsify import Method, Sparsity, pruned_blocks, report_of, zeros_of

StatesIn = Literal["memory", "disk"]
"""Where the hidden states of all calibration rows are kept."""

BlockProgress = Callable[[int, int], None]
"""Called with (blocks done, blocks in all)."""


def sparsify_checkpoint(
    source: str | Path,
    target: Path,
    method: Method,
    sparsity: Sparsity,
    calibration: Tensor | None = None,
    *,
    states: StatesIn = "disk",
    progress: BlockProgress | None = None,
    **load: Any,
) -> dict[str, Any]:
    """Sparsify a checkpoint of safetensors files, one or sharded, without having it in memory.

    Args:
        source: a built-in name, folder, ``.gguf`` file or hub id.
        target: the new checkpoint, a shard for each block; replaced whole. It holds the account of
            zeros, too, as sparsity.json.
        method: see `elastune.sparsify.METHODS`.
        sparsity: how much.
        calibration: token ids ``(N, L)``, needed by all methods but magnitude.
        states: ``"disk"``: hidden states are files beside the target while it is made.
        progress: called block by block.
        **load: dtype, device, head and num_labels, as `load_model` takes them.

    Returns:
        The account of zeros, as `sparsity_report` gives it.

    Raises:
        BadArtifact: the checkpoint is missing, damaged, or lacks weights.
        BadRecipe: as `sparsify_`.
        UnsupportedModel: unknown family, or one that text cannot calibrate.
    """
    streamed = StreamedModel(source, **load)
    with whole_folder(target) as partial:
        report = write_sparse(
            streamed, partial, method, sparsity, calibration, states=states, progress=progress
        )
        write_json(partial / "sparsity.json", report)
    return report


def reorder_checkpoint(
    source: str | Path,
    target: Path,
    calibration: Tensor | None = None,
    method: StructureMethod = "wanda",
    *,
    states: StatesIn = "disk",
    progress: BlockProgress | None = None,
    **load: Any,
) -> UnitScores:
    """Sort a checkpoint's heads and channels, best first, without having it in memory.

    Args:
        source: a built-in name, folder, ``.gguf`` file or hub id.
        target: the new checkpoint, which computes what the old one did; replaced whole.
        calibration: token ids ``(N, L)``, needed by all methods but magnitude.
        method: what units are sorted by, see `structure_scores`.
        states: as for `sparsify_checkpoint`.
        progress: called block by block, in the pass that writes.
        **load: likewise.

    Returns:
        The scores, as they were before sorting.

    Raises:
        BadArtifact: the checkpoint is missing, damaged, or lacks weights.
        BadRecipe: unknown method, or no rows.
        UnsupportedModel: unknown family, or one that text cannot calibrate.
    """
    streamed = StreamedModel(source, **load, whole_head=method == "taylor")
    with whole_folder(target) as partial:
        return write_reordered(
            streamed, partial, calibration, method, states=states, progress=progress
        )


def write_sparse(
    streamed: StreamedModel,
    folder: Path,
    method: Method,
    sparsity: Sparsity,
    calibration: Tensor | None,
    *,
    states: StatesIn = "disk",
    progress: BlockProgress | None = None,
) -> dict[str, Any]:
    """Do what `sparsify_checkpoint` does into an existing folder, which the caller makes whole."""
    writer = ShardWriter(folder)
    n_blocks = len(streamed.block_names)
    tensors: dict[str, Any] = {}
    with _hidden(folder, states) as hidden:
        done = pruned_blocks(
            streamed.model,
            method,
            sparsity,
            calibration,
            resident=lambda index: streamed.resident(index, writer),
            states=hidden,
        )
        for index, masks in enumerate(done):
            for name in masks:
                tensors[name] = zeros_of(streamed.model.get_submodule(name[: -len(".weight")]))
            if progress is not None:
                progress(index + 1, n_blocks)
    _finish(streamed, folder, writer)
    return report_of(tensors, method=method, sparsity=sparsity)


def write_reordered(
    streamed: StreamedModel,
    folder: Path,
    calibration: Tensor | None,
    method: StructureMethod,
    *,
    states: StatesIn = "disk",
    progress: BlockProgress | None = None,
) -> UnitScores:
    """Do what `reorder_checkpoint` does into an existing folder, which the caller makes whole."""
    if method not in STRUCTURE_METHODS:
        known = ", ".join(STRUCTURE_METHODS)
        hint = nearest(method, STRUCTURE_METHODS)
        raise BadRecipe(f"unknown importance {method!r}{hint}; known are {known}")
    writer = ShardWriter(folder)
    n_blocks = len(streamed.block_names)
    found: UnitScores = {}
    with _scored(streamed, folder, calibration, method, states, writer) as scored:
        for block, scores in scored:
            reorder_(streamed.model, scores)
            found |= scores
            if progress is not None:
                progress(block.index + 1, n_blocks)
    _finish(streamed, folder, writer)
    return found


@contextmanager
def _scored(
    streamed: StreamedModel,
    folder: Path,
    calibration: Tensor | None,
    method: StructureMethod,
    states: StatesIn,
    writer: ShardWriter,
) -> Iterator[Iterator[tuple[Block, UnitScores]]]:
    """Yield the blocks and their scores; each is in memory in its turn, and written after it."""
    parts = blocks(streamed.model)

    def resident(index: int) -> Any:
        return streamed.resident(index, writer)

    def of_all(scores: UnitScores) -> Iterator[tuple[Block, UnitScores]]:
        for block in parts:
            with resident(block.index):
                prefix = f"layers.{block.index}."
                yield block, {n: s for n, s in scores.items() if n.startswith(prefix)}

    with _scratch(folder, states) as scratch:
        if method != "wanda" or calibration is None:
            yield of_all(streamed_scores(streamed, calibration, method, folder=scratch))
            return
        # Blocks are sorted once the calibration rows have gone through them: one pass does both.
        stages = calibration_blocks(
            streamed.model,
            calibration,
            tokens_per_batch=2048,  # as `structure_scores`
            resident=resident,
            states=None if scratch is None else StatesOnDisk(scratch),
        )
        yield ((parts[s.index], wanda_of_stage(s, parts[s.index])) for s in stages)


@contextmanager
def _scratch(folder: Path, states: StatesIn) -> Iterator[Path | None]:
    """Yield a folder for hidden states, deleted in the end, or None for those in memory."""
    if states not in ("memory", "disk"):
        raise BadRecipe(f"states are kept in memory or on disk, got {states!r}")
    if states == "memory":
        yield None
        return
    # Inside of what the caller makes whole, so that a killed process leaves nothing else behind.
    with tempfile.TemporaryDirectory(prefix=".states-", dir=folder) as scratch:
        yield Path(scratch)


@contextmanager
def _hidden(folder: Path, states: StatesIn) -> Iterator[States | None]:
    with _scratch(folder, states) as scratch:
        yield None if scratch is None else StatesOnDisk(scratch)


@torch.no_grad()
def _finish(streamed: StreamedModel, folder: Path, writer: ShardWriter) -> None:
    """Write all but the blocks, and what says how to read them."""
    streamed.write_rest(writer)
    writer.finish()
    write_settings(streamed.model, streamed.tokenizer, folder)
