"""Plain fine-tuning and plain LoRA of any model on any task: what every method is compared with.

Both read the same batches in the same order as a super-network that trains with the same settings,
for the same number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from elastune.build_space import lora_space
from elastune.build_sparsity import sparsity_space
from elastune.build_structure import structure_space
from elastune.config import AdapterConfig, SparsifyConfig, StructureConfig, TrainConfig
from elastune.elastic.mask import WeightLevels
from elastune.elastic.merge_rules import Int4Grid
from elastune.extract import extract
from elastune.heads import HEADS
from elastune.models import architecture, save_model
from elastune.sampling import FixedSampler, RandomSampler
from elastune.space import SearchSpace
from elastune.step_log import Progress
from elastune.supernet import SuperNetwork
from elastune.tasks.base import AnyExample, HeadName, Task
from elastune.train import train
from elastune.whole_model import WholeModel

Update = Literal["full", "lora"]


def finetune(
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    examples: Sequence[AnyExample],
    cfg: TrainConfig,
    *,
    folder: Path,
    update: Update = "full",
    adapter: AdapterConfig | None = None,
    progress: Progress | None = None,
) -> WholeModel | SuperNetwork:
    """Train a model on a task; it is changed in place, and ``folder`` holds what was trained.

    A run that was killed goes on from its last checkpoint in ``folder``.

    Args:
        model: with the head that the task needs (``load_model(..., head=task.head,
            num_labels=task.num_labels)``).
        update: ``"full"`` trains every weight, with ``cfg.full_learning_rate``; ``"lora"`` trains
            low-rank adapters of the largest of ``adapter.ranks`` (and a new head whole), which is
            what stock PEFT computes.
        adapter: of LoRA; by default as in the papers.

    Raises:
        BadData: nothing to train on.
        TrainingDiverged: the loss became NaN or infinite.
    """
    net, sampler, cfg = plain(model, task.head, cfg, update, adapter or AdapterConfig())
    head = HEADS[task.head]
    items = head.encode(examples, tokenizer, cfg.max_length)
    train(net, items, sampler, cfg, folder=folder, head=head, progress=progress)
    return net


def save_tuned(
    net: WholeModel | SuperNetwork, tokenizer: Any, folder: Path, *, base: str | None = None
) -> None:
    """Write what `finetune` trained as stock libraries load it.

    A whole model goes to ``folder/model``, a checkpoint with its tokenizer; LoRA to
    ``folder/adapter``, a stock PEFT adapter that notes ``base`` as its base model.
    """
    if isinstance(net, WholeModel):
        save_model(net.model, tokenizer, folder / "model")
    else:
        extract(net, net.space.largest()).save(folder / "adapter", base=base)


def plain(
    model: PreTrainedModel,
    head: HeadName,
    cfg: TrainConfig,
    update: Update,
    adapter: AdapterConfig,
) -> tuple[WholeModel | SuperNetwork, Any, TrainConfig]:
    """Return what is trained without any choice, its sampler, and the settings that apply to it."""
    if update == "full":
        cfg = cfg.model_copy(update={"learning_rate": cfg.full_learning_rate})
        return WholeModel(model), FixedSampler(), cfg
    cfg = cfg.model_copy(update={"update": "adapter"})
    seed = cfg.seed or 0
    adapter = adapter.model_copy(update={"keep": "nothing"})
    space = only_largest(adapter_space(model, adapter))
    return adapted(model, head, space, adapter, seed), RandomSampler(space, seed), cfg


def adapter_space(model: PreTrainedModel, cfg: AdapterConfig) -> SearchSpace:
    """Build the search space over the ranks of a model's adapters."""
    return lora_space(
        model, cfg.ranks, targets=cfg.targets, groups=cfg.groups, max_rank=cfg.max_rank
    )


def net_space(
    model: PreTrainedModel,
    adapter: AdapterConfig,
    structure: StructureConfig | None,
    sparsify: SparsifyConfig | None = None,
) -> SearchSpace:
    """Build the search space of a recipe: ranks, the model's structure, the sparsity of layers."""
    parts = []
    if adapter.ranks:
        parts.append(adapter_space(model, adapter))
    if structure is not None:
        cuts = structure_space(
            model,
            ffn=structure.ffn,
            heads=structure.heads,
            depth=structure.depth,
            embedding=structure.embedding,
            round_to=structure.round_to,
            shared=structure.shared,
        )
        parts.append(cuts)
    if sparsify is not None and sparsify.choices:
        parts.append(sparsity_space(model, sparsify.choices, per=sparsify.per))
    return SearchSpace([dim for part in parts for dim in part.dims])


def adapted(
    model: PreTrainedModel,
    head: HeadName,
    space: SearchSpace,
    cfg: AdapterConfig,
    seed: int,
    *,
    train_base: bool = False,
    levels: WeightLevels | None = None,
    grids: Mapping[str, Int4Grid] | None = None,
) -> SuperNetwork:
    """Make a model elastic, and train a task's own head whole."""
    trained = [] if head == "causal-lm" else architecture(model).head_names(model)
    return SuperNetwork(
        model,
        space,
        alpha=cfg.alpha,
        dropout=cfg.dropout,
        keep=cfg.keep,
        token_share=cfg.token_share,
        grids=grids,
        scaling=cfg.scaling,
        seed=seed,
        trained=trained,
        train_base=train_base,
        levels=levels,
    )


def only_largest(space: SearchSpace) -> SearchSpace:
    """Return the space whose only configuration is the largest: plain LoRA."""
    return SearchSpace([replace(dim, choices=dim.choices[:1]) for dim in space.dims])
