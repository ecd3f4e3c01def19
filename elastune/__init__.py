"""elastune: compress and fine-tune transformers by weight-sharing architecture search.

The names below are promised; everything else may move. They are imported when first used, so that
``import elastune`` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from elastune.autoload import announce_when_imported
from elastune.version import __version__

if TYPE_CHECKING:
    from elastune.adapters import cut_adapter, from_adapter
    from elastune.allocate import allocate, single_choice_losses, uniform_config
    from elastune.build_space import lora_space
    from elastune.build_sparsity import sparsity_levels, sparsity_space
    from elastune.build_structure import structure_space
    from elastune.config import Recipe, TrainConfig, load_recipe
    from elastune.cost import Cost, CostModel, model_cost
    from elastune.data import calibration_rows, encode_all, make_splits
    from elastune.drop_blocks import drop_blocks_
    from elastune.errors import ElastuneError
    from elastune.estimate_losses import estimate_choice_losses
    from elastune.evaluate import evaluate, mean_loss
    from elastune.export import (
        Saved,
        check_export,
        export_model,
        save_compressed,
        save_subnetwork,
        snap_to_uniform,
    )
    from elastune.extract import PeftAdapter, extract
    from elastune.finetune import finetune
    from elastune.generate import generate
    from elastune.generate_space import candidate_space, space_from_importance, space_from_losses
    from elastune.generated import GeneratedSpace
    from elastune.importance import (
        fisher_scores,
        structure_scores,
        taylor_scores,
        units_from_weights,
    )
    from elastune.latency import Latency, compare_latency, measure_latency, prefill_latency_ms
    from elastune.latency_table import LatencyTable
    from elastune.learn_scores import movement_scores
    from elastune.merge_report import merge_report
    from elastune.models import architecture, load_model, save_model
    from elastune.objective import make_objective
    from elastune.quantise import quantise_
    from elastune.rank_in_rounds import rank_in_rounds
    from elastune.reorder import reorder_
    from elastune.report import write_report
    from elastune.sampling import ProgressiveSampler, RandomSampler, SandwichSampler
    from elastune.search import Known, SearchResult, search
    from elastune.space import ElasticDim, SearchSpace, SubnetConfig
    from elastune.sparsify import Sparsity, sparsify_, sparsity_report
    from elastune.statistics import compare
    from elastune.stream import reorder_checkpoint, sparsify_checkpoint
    from elastune.subnetwork import Subnetwork, extract_model
    from elastune.supernet import SuperNetwork
    from elastune.tasks import Example, Score, Task, get_task
    from elastune.teacher import Teacher, cache_teacher
    from elastune.train import train
    from elastune.trained import load_trained, save_trained

_HOMES = {
    "adapters": ("cut_adapter", "from_adapter"),
    "allocate": ("allocate", "single_choice_losses", "uniform_config"),
    "build_space": ("lora_space",),
    "build_sparsity": ("sparsity_levels", "sparsity_space"),
    "build_structure": ("structure_space",),
    "config": ("Recipe", "TrainConfig", "load_recipe"),
    "cost": ("Cost", "CostModel", "model_cost"),
    "data": ("calibration_rows", "encode_all", "make_splits"),
    "drop_blocks": ("drop_blocks_",),
    "errors": ("ElastuneError",),
    "estimate_losses": ("estimate_choice_losses",),
    "evaluate": ("evaluate", "mean_loss"),
    "export": (
        "Saved",
        "check_export",
        "export_model",
        "save_compressed",
        "save_subnetwork",
        "snap_to_uniform",
    ),
    "extract": ("PeftAdapter", "extract"),
    "finetune": ("finetune",),
    "generate": ("generate",),
    "generate_space": ("candidate_space", "space_from_importance", "space_from_losses"),
    "generated": ("GeneratedSpace",),
    "importance": ("fisher_scores", "structure_scores", "taylor_scores", "units_from_weights"),
    "latency": ("Latency", "compare_latency", "measure_latency", "prefill_latency_ms"),
    "latency_table": ("LatencyTable",),
    "learn_scores": ("movement_scores",),
    "merge_report": ("merge_report",),
    "models": ("architecture", "load_model", "save_model"),
    "objective": ("make_objective",),
    "quantise": ("quantise_",),
    "rank_in_rounds": ("rank_in_rounds",),
    "reorder": ("reorder_",),
    "report": ("write_report",),
    "sampling": ("ProgressiveSampler", "RandomSampler", "SandwichSampler"),
    "search": ("Known", "SearchResult", "search"),
    "space": ("ElasticDim", "SearchSpace", "SubnetConfig"),
    "sparsify": ("Sparsity", "sparsify_", "sparsity_report"),
    "stream": ("reorder_checkpoint", "sparsify_checkpoint"),
    "statistics": ("compare",),
    "subnetwork": ("Subnetwork", "extract_model"),
    "supernet": ("SuperNetwork",),
    "tasks": ("Example", "Score", "Task", "get_task"),
    "teacher": ("Teacher", "cache_teacher"),
    "train": ("train",),
    "trained": ("load_trained", "save_trained"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Cost",
    "CostModel",
    "ElasticDim",
    "ElastuneError",
    "Example",
    "GeneratedSpace",
    "Known",
    "Latency",
    "LatencyTable",
    "PeftAdapter",
    "ProgressiveSampler",
    "RandomSampler",
    "Recipe",
    "SandwichSampler",
    "Saved",
    "Score",
    "SearchResult",
    "SearchSpace",
    "Sparsity",
    "SubnetConfig",
    "Subnetwork",
    "SuperNetwork",
    "Task",
    "Teacher",
    "TrainConfig",
    "__version__",
    "allocate",
    "architecture",
    "cache_teacher",
    "calibration_rows",
    "candidate_space",
    "check_export",
    "compare",
    "compare_latency",
    "cut_adapter",
    "drop_blocks_",
    "encode_all",
    "estimate_choice_losses",
    "evaluate",
    "export_model",
    "extract",
    "extract_model",
    "finetune",
    "fisher_scores",
    "from_adapter",
    "generate",
    "get_task",
    "load_model",
    "load_recipe",
    "load_trained",
    "lora_space",
    "make_objective",
    "make_splits",
    "mean_loss",
    "measure_latency",
    "merge_report",
    "model_cost",
    "movement_scores",
    "prefill_latency_ms",
    "quantise_",
    "rank_in_rounds",
    "reorder_",
    "reorder_checkpoint",
    "save_compressed",
    "save_model",
    "save_subnetwork",
    "save_trained",
    "search",
    "single_choice_losses",
    "snap_to_uniform",
    "space_from_importance",
    "space_from_losses",
    "sparsify_",
    "sparsify_checkpoint",
    "sparsity_levels",
    "sparsity_report",
    "sparsity_space",
    "structure_scores",
    "structure_space",
    "taylor_scores",
    "train",
    "uniform_config",
    "units_from_weights",
    "write_report",
]


class _Package(ModuleType):
    """This package: `train`, `search` and others are its functions, not the files they live in."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing elastune.train makes Python set the module as the attribute `train` here.
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

announce_when_imported()  # models of non-uniform sizes then load like others


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'elastune' has no attribute {name!r}")
    value = getattr(import_module(f"elastune.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
