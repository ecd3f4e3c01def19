"""The stages of a run, each from the files of the stages before it to files of its own.

A method (`elastune.methods`) is a straight line of these. Every stage is skipped when its inputs
did not change since it was done, and goes on where it was killed otherwise.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.artifacts import RunDirectory
from elastune.build_sparsity import load_levels
from elastune.build_structure import structure_space
from elastune.calibration_text import calibration_texts
from elastune.config import CalibrationConfig, Recipe, TaskConfig, TrainConfig
from elastune.data import Splits, calibration_rows, make_splits
from elastune.elastic.embedding import token_counts
from elastune.elastic.mask import WeightLevels
from elastune.errors import BadArtifact, BadRecipe
from elastune.files import read_json
from elastune.finetune import adapted, net_space, plain
from elastune.generated import GeneratedSpace
from elastune.heads import HEADS, Head
from elastune.inputs import fingerprint, plain_training, stage_inputs
from elastune.leaks import check_text_leaks
from elastune.models import load_model
from elastune.models.streamed import StreamedModel, weight_bytes
from elastune.processes import shards_base
from elastune.progress import Reporter
from elastune.quantise import load_grids
from elastune.space import SearchSpace
from elastune.sparsify import Sparsity, sparsity_report
from elastune.supernet import SuperNetwork
from elastune.tasks import Task, get_task
from elastune.trained import load_trained
from elastune.vocabulary import trim_vocabulary_
from elastune.whole_model import WholeModel


class Run:
    """A recipe at work in a run directory."""

    def __init__(self, directory: RunDirectory, recipe: Recipe, reporter: Reporter) -> None:
        self.dir = directory
        self.recipe = recipe
        self.reporter = reporter
        self._kept_tokens: tuple[int, ...] | None = None

    # -- inputs of every stage, by hash ----------------------------------------------------

    @property
    def sparsity(self) -> Sparsity:
        """How sparse the base becomes."""
        cfg = self.recipe.sparsify
        return Sparsity.parse(None if cfg.pattern else cfg.ratio, cfg.pattern)

    def inputs(self, stage: str, *extra: Any) -> str:
        """Return the hash of all that the outcome of a stage depends on."""
        found = stage_inputs(self.recipe, stage, self.dir.sources(self.recipe))
        return fingerprint(found, *extra) if extra else found

    # -- data and models -------------------------------------------------------------------

    def task(self, cfg: TaskConfig) -> Task:
        """Build a task of the recipe."""
        return self._task(cfg, cfg.template, self.tokenizer)

    def task_of(self, cfg: TaskConfig) -> Task:
        """Build a task to ask for its kind alone: no model is loaded for a chat prompt."""
        return self._task(cfg, None if cfg.template == "chat" else cfg.template, None)

    def _task(self, cfg: TaskConfig, template: str | None, tokenizer: Any) -> Task:
        return get_task(
            cfg.name,
            data_dir=self.recipe.data.dir,
            template=template,
            tokenizer=tokenizer,
            **cfg.options,
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return self.outline[1] if self.streams else self.load_dense()[1]

    @cached_property
    def outline(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base model without weights, and its tokenizer."""
        return load_model(self.recipe.model, **{**self.as_loaded, "device": "meta"})

    @cached_property
    def streams(self) -> bool:
        """Whether the base is made block by block, from its files."""
        wanted = self.recipe.sparsify.stream
        if wanted != "auto" or self.recipe.unstreamed is not None:
            return wanted is True
        return weight_bytes(self.outline[0]) > psutil.virtual_memory().available / 2

    @cached_property
    def splits(self) -> Splits:
        """The examples, checked to share no question between splits."""
        recipe = self.recipe
        report = {c.label: self.task(c).report_examples() for c in recipe.report_tasks}
        if recipe.only_scores:
            return Splits([], [], [], report)
        return make_splits(
            self.task(recipe.task).train_examples(),
            report,
            n_train=recipe.data.n_train,
            n_validation=recipe.data.n_validation,
            n_calibration=4 * max(cfg.n_sequences for cfg in calibrations(recipe)),
            seed=recipe.seed,
            leaks=recipe.data.leaks,
        )

    def report_examples(self, cfg: TaskConfig) -> list[Any]:
        """Return the examples a task is reported on: all, or a fixed sample of ``limit``."""
        examples = list(self.splits.report[cfg.label])
        if cfg.limit is None or cfg.limit >= len(examples):
            return examples
        if self.task(cfg).kind == "perplexity":
            return examples[: cfg.limit]
        chosen = np.random.default_rng(0).choice(len(examples), cfg.limit, replace=False)
        return [examples[i] for i in sorted(chosen)]

    def _calibration_texts(self, cfg: CalibrationConfig) -> list[str]:
        if cfg.source == "task":
            return [example.plain_text for example in self.splits.calibration]
        texts = calibration_texts(cfg.source, self.recipe.data.dir)
        policy = self.recipe.data.leaks
        kept, notes = check_text_leaks(texts, self.splits.report, policy, name=cfg.source)
        for note in notes:
            self.reporter.say(note)
        return kept

    def calibration(self, model: PreTrainedModel, cfg: CalibrationConfig) -> Tensor:
        """Return the token ids ``(N, L)`` that a sparsifier or an order looks at."""
        longest = getattr(model.config, "max_position_embeddings", None) or cfg.length
        return calibration_rows(
            self._calibration_texts(cfg),
            self.tokenizer,
            n_sequences=cfg.n_sequences,
            length=min(cfg.length, longest),
            seed=self.recipe.seed,
        )

    def load_dense(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the model that the recipe names, with the head that its task needs."""
        # A head that the checkpoint lacks gets random weights: the same at every load.
        torch.manual_seed(self.recipe.seed)
        model, tokenizer = load_model(
            self.recipe.model, trust_remote_code=self.recipe.trust_remote_code, **self.as_loaded
        )
        if self.recipe.vocabulary == "task":
            tokenizer = self._trimmed(model, tokenizer)
        self.__dict__.setdefault("tokenizer", tokenizer)
        labels = getattr(self.task_of(self.recipe.task), "labels", None)
        if labels:
            model.config.id2label = dict(enumerate(labels))
            model.config.label2id = {label: i for i, label in enumerate(labels)}
        return model, tokenizer

    def _trimmed(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> PreTrainedTokenizerBase:
        """Leave the model, in place, the tokens of the training examples; return its tokenizer."""
        if "splits" not in self.__dict__:  # prompts may be worded by the whole tokenizer
            self.__dict__["tokenizer"] = tokenizer
            _ = self.splits
            del self.__dict__["tokenizer"]
        texts = [example.plain_text for example in self.splits.train]
        _, smaller, found = trim_vocabulary_(model, tokenizer, texts)
        if self._kept_tokens is None:
            self.reporter.say(
                f"vocabulary: {found.rows_after:,} of {found.rows_before:,} tokens stay, "
                f"{found.params_removed:,} weights fewer"
            )
        self._kept_tokens = found.kept
        return smaller

    def stream(self, source: str | Path, *, whole_head: bool = False) -> StreamedModel:
        """Open a model of this run of which one block at a time is in memory."""
        return StreamedModel(source, **self.as_loaded, whole_head=whole_head)

    @property
    def as_loaded(self) -> dict[str, Any]:
        """How models of this run are loaded."""
        # One that is cut into shards may be too large for any one device.
        on_gpu = torch.cuda.is_available() and not shards_base()
        return {"device": "cuda" if on_gpu else None, **self._loaded_for}

    @cached_property
    def _loaded_for(self) -> dict[str, Any]:
        task = self.task_of(self.recipe.task)
        return {"dtype": self.recipe.dtype, "head": task.head, "num_labels": task.num_labels}

    def load_start(self) -> PreTrainedModel:
        """Load what the super-network's base begins as, all its parts in their own order."""
        if self.recipe.start == "model":
            return self.load_dense()[0]
        return self.load_baseline(self.recipe.start).model

    def load_sparse(self) -> PreTrainedModel:
        """Load what `sparsify` made, and check that its zeros are all there.

        Raises:
            BadArtifact: it is missing, corrupt, or has other zeros than sparsity.json says.
        """
        if not self.dir.is_done("sparsify", self.inputs("sparsify")):
            raise BadArtifact(
                f"{self.dir.base} is missing or of another recipe", try_="elastune sparsify RUN"
            )
        model, _ = load_model(self.dir.base, **self.as_loaded)
        expected = read_json(self.dir.sparsity)["total"]["zeros"]
        found = sparsity_report(model, method="", sparsity=self.sparsity)["total"]["zeros"]
        if found != expected:
            raise BadArtifact(
                f"{self.dir.base} has {found} zero weights, its sparsity.json says {expected}",
                try_="delete it and run again",
            )
        return model

    def space_of(self, model: PreTrainedModel) -> SearchSpace:
        """Return the search space: generated, or as the recipe writes it.

        Args:
            model: the base.
        """
        recipe = self.recipe
        structure = recipe.structure
        if structure is None or structure.generate is None:
            return net_space(model, recipe.adapter, structure, recipe.sparsify)
        cuts = self.generated.space
        if structure.embedding is not None:
            cuts += structure_space(model, embedding=structure.embedding)
        if recipe.adapter.ranks or recipe.sparsify.choices:
            return net_space(model, recipe.adapter, None, recipe.sparsify) + cuts
        return cuts

    @property
    def generated(self) -> GeneratedSpace:
        """The space made from importance.

        Raises:
            BadArtifact: it was not made yet.
        """
        if not self.dir.is_done("generate", self.inputs("generate")):
            raise BadArtifact(
                f"{self.dir.generated} is missing or of another recipe",
                try_=f"elastune run {self.dir.root}",
            )
        return GeneratedSpace.from_dict(read_json(self.dir.generated))

    @property
    def train_config(self) -> TrainConfig:
        """The recipe's training settings, with a seed."""
        cfg = self.recipe.train
        return cfg.model_copy(update={"seed": self.recipe.seed if cfg.seed is None else cfg.seed})

    def whole(self, name: str) -> tuple[WholeModel | SuperNetwork, Any, TrainConfig]:
        base, _, update = name.partition("+")
        model = self.load_dense()[0] if base == "dense" else self.load_sparse()
        cfg = plain_training(self.recipe).model_copy(update={"seed": self.train_config.seed})
        head = self.as_loaded["head"]
        return plain(model, head, cfg, update, self.recipe.adapter)  # type: ignore[arg-type]

    def untrained(self, model: PreTrainedModel, space: SearchSpace) -> SuperNetwork:
        """Make a base elastic; a word embedding of less rank serves the training tokens best."""
        net = self.elastic(model, space)
        if net.embedding is not None:
            ids = self.tokenizer([example.plain_text for example in self.splits.train])["input_ids"]
            net.embedding.fit_(token_counts(ids, net.embedding.num_embeddings))
        return net

    def elastic(self, model: PreTrainedModel, space: SearchSpace) -> SuperNetwork:
        """Make a model elastic as the recipe says."""
        seed = self.train_config.seed or 0
        return adapted(
            model,
            self.as_loaded["head"],
            space,
            self.recipe.adapter,
            seed,
            train_base=self.recipe.train.update == "full",
            levels=self._levels(space),
            grids=load_grids(self.dir.grid) if self._is_on_grid else None,
        )

    @property
    def _is_on_grid(self) -> bool:
        return self.recipe.quantise is not None and not self.recipe.packs_base

    def _levels(self, space: SearchSpace) -> WeightLevels | None:
        """Return the order in which weights leave, where the space has dims of sparsity."""
        if all(dim.kind != "density" for dim in space.dims):
            return None
        return load_levels(self.dir.levels)[0]

    @property
    def head(self) -> Head:
        """What reads the task's examples."""
        return HEADS[self.as_loaded["head"]]

    def load_teacher(self, name: str) -> PreTrainedModel:
        """Load a trained baseline, or the checkpoint that a recipe names.

        Raises:
            BadRecipe: it reads other tokens than the model that it is to teach.
        """
        if name in self.recipe.baselines:
            return self.load_baseline(name).model
        model, tokenizer = load_model(name, **self.as_loaded)
        if self.recipe.vocabulary == "task":
            tokenizer = self._trimmed(model, tokenizer)
        if tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise BadRecipe(
                f"train.distill.teacher: {name} has another vocabulary than {self.recipe.model}, "
                "so that it would be asked about other texts",
                try_="a teacher of the same family",
            )
        return model

    def load_supernet(self) -> SuperNetwork:
        """Load the trained super-network.

        Raises:
            BadArtifact: it was not trained yet, or its files are damaged.
        """
        if not self.dir.is_done("train", self.inputs("train")):
            raise BadArtifact(
                f"{self.dir.supernet} is missing or of another recipe", try_="elastune train RUN"
            )
        space = SearchSpace.from_dict(read_json(self.dir.space))
        net = self.elastic(self.load_sparse(), space)
        load_trained(net, self.dir.supernet)
        return net

    def load_baseline(self, name: str) -> WholeModel | SuperNetwork:
        """Load a trained baseline: a whole model, or a super-network of one configuration."""
        if not self.dir.is_done(name, self.inputs(name)):
            raise BadArtifact(
                f"{self.dir.baseline(name)} is missing or of another recipe",
                try_=f"elastune run {self.dir.root}",
            )
        net, _, _ = self.whole(name)
        load_trained(net, self.dir.baseline(name))
        return net


def calibrations(recipe: Recipe) -> list[CalibrationConfig]:
    """Return all settings of calibration text that a recipe has."""
    found = [recipe.sparsify.calibration]
    return found if recipe.structure is None else [*found, recipe.structure.calibration]
