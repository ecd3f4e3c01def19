"""The stages of a run, each from the files of the stages before it to files of its own.

A method (`elastune.methods`) is a straight line of these. Every stage is skipped when its inputs
did not change since it was done, and goes on where it was killed otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.artifacts import RunDirectory
from elastune.calibration_text import calibration_texts
from elastune.config import CalibrationConfig, Recipe, TaskConfig, TrainConfig
from elastune.data import Splits, calibration_rows, make_splits
from elastune.errors import BadArtifact
from elastune.files import read_json, whole_folder, write_json
from elastune.finetune import adapted, net_space, plain, save_tuned
from elastune.heads import HEADS
from elastune.importance.structure import structure_scores
from elastune.inputs import fingerprint, stage_inputs
from elastune.leaks import check_text_leaks
from elastune.models import load_model, write_model
from elastune.progress import Reporter
from elastune.reorder import reorder_
from elastune.sampling import make_sampler
from elastune.space import SearchSpace
from elastune.sparsify import Sparsity, sparsify_, sparsity_report
from elastune.supernet import SuperNetwork
from elastune.tasks import Task, get_task
from elastune.train import Trainee, load_trained, train
from elastune.whole_model import WholeModel


class Run:
    """A recipe at work in a run directory."""

    def __init__(self, directory: RunDirectory, recipe: Recipe, reporter: Reporter) -> None:
        self.dir = directory
        self.recipe = recipe
        self.reporter = reporter

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
        return self.load_dense()[1]

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
            self.recipe.model, trust_remote_code=self.recipe.trust_remote_code, **self._as_loaded
        )
        self.__dict__.setdefault("tokenizer", tokenizer)
        labels = getattr(self.task_of(self.recipe.task), "labels", None)
        if labels:
            model.config.id2label = dict(enumerate(labels))
            model.config.label2id = {label: i for i, label in enumerate(labels)}
        return model, tokenizer

    @cached_property
    def _as_loaded(self) -> dict[str, Any]:
        """How models of this run are loaded."""
        task = self.task_of(self.recipe.task)
        return {
            "dtype": self.recipe.dtype,
            "device": "cuda" if torch.cuda.is_available() else None,
            "head": task.head,
            "num_labels": task.num_labels,
        }

    def load_sparse(self) -> PreTrainedModel:
        """Load what `sparsify` made, and check that its zeros are all there.

        Raises:
            BadArtifact: it is missing, corrupt, or has other zeros than sparsity.json says.
        """
        if not self.dir.is_done("sparsify", self.inputs("sparsify")):
            raise BadArtifact(
                f"{self.dir.base} is missing or of another recipe", try_="elastune sparsify RUN"
            )
        model, _ = load_model(self.dir.base, **self._as_loaded)
        expected = read_json(self.dir.sparsity)["total"]["zeros"]
        found = sparsity_report(model, method="", sparsity=self.sparsity)["total"]["zeros"]
        if found != expected:
            raise BadArtifact(
                f"{self.dir.base} has {found} zero weights, its sparsity.json says {expected}",
                try_="delete it and run again",
            )
        return model

    # -- stages ----------------------------------------------------------------------------

    def sparsify(self) -> None:
        """Prune and reorder the base as the recipe says; save it with its account of zeros."""
        inputs = self.inputs("sparsify")
        if self.dir.is_done("sparsify", inputs):
            return
        cfg = self.recipe.sparsify
        model, tokenizer = self.load_dense()
        with self.dir.stage("sparsify", inputs, self.dir.base):
            if self.sparsity.ratio > 0:
                with self.reporter.bar(f"sparsify ({cfg.method})", "blocks") as bar:
                    is_blind = cfg.method == "magnitude"
                    rows = None if is_blind else self.calibration(model, cfg.calibration)
                    sparsify_(model, cfg.method, self.sparsity, rows, progress=bar)
            self._reorder(model)
            report = sparsity_report(model, method=cfg.method, sparsity=self.sparsity)
            with whole_folder(self.dir.base) as partial:
                write_model(model, tokenizer, partial)
                write_json(partial / self.dir.sparsity.name, report)
        if self.sparsity.ratio > 0:
            share = report["total"]["sparsity"]
            self.reporter.say(f"{share:.2%} of the blocks' weights are zero")

    def _reorder(self, model: PreTrainedModel) -> None:
        """Sort heads and channels, best first; the model computes what it did."""
        cfg = self.recipe.structure
        if cfg is None or cfg.order == "natural" or (cfg.ffn is None and cfg.heads is None):
            return
        rows = None if cfg.order == "magnitude" else self.calibration(model, cfg.calibration)
        self.reporter.say(
            f"heads and channels are sorted by {cfg.order}, so that the best are kept"
        )
        reorder_(model, structure_scores(model, rows, method=cfg.order))

    def train_supernet(self) -> None:
        """Train the super-network: all its sub-networks at once."""
        inputs = self.inputs("train")
        if self.dir.is_done("train", inputs):
            return
        model = self.load_sparse()
        space = net_space(model, self.recipe.adapter, self.recipe.structure)
        with self.dir.stage("train", inputs, self.dir.supernet, self.dir.space):
            write_json(self.dir.space, space.to_dict())
            cfg = self.recipe.train
            sampler = make_sampler(cfg.sampler, space, self.recipe.seed, n_random=cfg.n_random)
            net = self._adapted(model, space)
            self._train(net, sampler, self.train_config, self.dir.supernet, "super-network")

    def train_baseline(self, name: str) -> None:
        """Train all weights, or a plain LoRA of the largest ranks, for the same steps and batches.

        Args:
            name: ``dense+full``, ``dense+lora`` or ``sparse+lora``.
        """
        inputs = self.inputs(name)
        if self.dir.is_done(name, inputs):
            return
        net, sampler, cfg = self._plain(name)
        folder = self.dir.baseline(name)
        with self.dir.stage(name, inputs, folder):
            self._train(net, sampler, cfg, folder, name)
            sparse = str(self.dir.base.resolve())
            base = sparse if name.startswith("sparse") else net.model.name_or_path
            save_tuned(net, self.tokenizer, folder, base=base)

    @property
    def train_config(self) -> TrainConfig:
        """The recipe's training settings, with a seed."""
        cfg = self.recipe.train
        return cfg.model_copy(update={"seed": self.recipe.seed if cfg.seed is None else cfg.seed})

    def _plain(self, name: str) -> tuple[WholeModel | SuperNetwork, Any, TrainConfig]:
        base, _, update = name.partition("+")
        model = self.load_dense()[0] if base == "dense" else self.load_sparse()
        head = self._as_loaded["head"]
        return plain(model, head, self.train_config, update, self.recipe.adapter)  # type: ignore[arg-type]

    def _adapted(self, model: PreTrainedModel, space: SearchSpace) -> SuperNetwork:
        """Make a model elastic as the recipe says."""
        seed = self.train_config.seed or 0
        return adapted(
            model,
            self._as_loaded["head"],
            space,
            self.recipe.adapter,
            seed,
            train_base=self.recipe.train.update == "full",
        )

    def _train(self, net: Trainee, sampler: Any, cfg: TrainConfig, folder: Any, title: str) -> None:
        head = HEADS[self._as_loaded["head"]]
        items = head.encode(self.splits.train, self.tokenizer, cfg.max_length)
        with self.reporter.bar(f"train {title}", "steps") as bar:

            def show(done: int, total: int, facts: Mapping[str, float]) -> None:
                note = f"loss {facts['loss']:.3f}" if facts else ""
                speed = f", {facts['tokens_per_s']:.0f} tokens/s" if facts else ""
                bar(done, total, note + speed)

            train(net, items, sampler, cfg, folder=folder, head=head, progress=show)

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
        net = self._adapted(self.load_sparse(), space)
        load_trained(net, self.dir.supernet)
        return net

    def load_baseline(self, name: str) -> WholeModel | SuperNetwork:
        """Load a trained baseline: a whole model, or a super-network of one configuration."""
        net, _, _ = self._plain(name)
        load_trained(net, self.dir.baseline(name))
        return net


def calibrations(recipe: Recipe) -> list[CalibrationConfig]:
    """Return all settings of calibration text that a recipe has."""
    found = [recipe.sparsify.calibration]
    return found if recipe.structure is None else [*found, recipe.structure.calibration]
