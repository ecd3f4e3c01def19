"""Train all sub-networks of a super-network at once, on `transformers.Trainer`.

The active sub-network is set outside of forward, once per optimizer step by default, so gradient
checkpointing recomputes the same one. Draws depend on (seed, step) alone, so a resumed run draws
what the uninterrupted one would have drawn.

Sources: Shears (section 3.2) and LoNAS train one random sub-network a (micro-)step; EFTNAS a
sandwich. Deviations: the warm-up is really applied, and by default gradient accumulation keeps one
sub-network per optimizer step (``draw_per="micro_batch"`` draws as the papers' code does).
In-place distillation is that of Yu and Huang 2019 (universally slimmable networks), an outside
teacher for every draw that of EFTNAS.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer

from elastune import processes
from elastune.config import DistillConfig, TrainConfig
from elastune.errors import BadRecipe, TrainingDiverged
from elastune.heads import HEADS, Head, SoftTargets
from elastune.length_groups import LengthGroups
from elastune.processes import from_main, is_main, shards_base, wait, zero_stage
from elastune.sampling import Sampler
from elastune.shards import shard_frozen_
from elastune.step_log import NothingLeft, Progress, StepLog
from elastune.teacher import AnyTeacher, check_teacher, teacher_hooks
from elastune.train_step import TrainStep
from elastune.trained import (
    Trainee,
    forget_checkpoints,
    last_checkpoint,
    load_trained,
    save_trained,
)
from elastune.trainer_arguments import trainer_arguments
from elastune.zero import ZeroOptimizer, check_zero

_NUMBERS = "item_numbers"
"""Field of a batch that says which items are in it; no model sees it."""
_IDLE = "idle"
"""Field that tells that the batch is another process's, and counts for nothing here."""


@runtime_checkable
class ScheduledTrainee(Trainee, Protocol):
    """A trainee that changes as training goes on, such as one that learns what to prune."""

    def begin_step(self, progress: float) -> None:
        """Prepare for an optimizer step; ``progress`` runs from 0 to 1 over the training."""

    def penalty(self) -> Tensor:
        """Return what is added to a step's mean loss, a scalar."""

    def parameter_groups(self, cfg: TrainConfig) -> list[dict[str, Any]]:
        """Return what the optimizer treats apart: groups with ``params`` and own settings."""


@dataclass(frozen=True)
class TrainResult:
    """What a training run amounted to."""

    steps: int
    final_loss: float
    seconds: float
    tokens: int


def train(
    net: Trainee,
    items: Sequence[Any],
    sampler: Sampler,
    cfg: TrainConfig,
    *,
    folder: Path,
    head: Head = HEADS["causal-lm"],
    teacher: AnyTeacher | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train ``net`` and leave ``trained.safetensors`` and ``train.jsonl`` in ``folder``.

    A run that was killed goes on from its last complete checkpoint in ``folder`` to the same
    weights as an uninterrupted one (bitwise on a CPU).

    Several processes (``accelerate launch``, torchrun) call this together, each with all items:
    they share ``cfg.batch_size``, and end with the weights of one process but for rounding. A
    checkpoint may be gone on from with another number of them.

    ``train.jsonl`` has one row a step: step, loss (mean over targets: nats per labelled token for
    language models), lr, tokens, seconds, and the configurations trained, as indices into each
    dim's choices. With a ``cfg.distill.teacher`` the loss is what is minimised.

    Args:
        items: what ``head.encode`` made of the examples.
        head: reads the items and computes the loss.
        teacher: from outside, where ``cfg.distill.teacher`` names one (`elastune.teacher`).

    Raises:
        TrainingDiverged: the loss became NaN or infinite; the last checkpoint is kept.
        BadRecipe: the settings ask for what this device, ``sampler`` or ``teacher`` cannot do.
    """
    step = TrainStep(net.model, head, _distillation(net, items, sampler, cfg, teacher))
    if teacher is not None:
        teacher.hooks = teacher_hooks(step.hooks, teacher, cfg.distill)
    if zero_stage():
        trained = [p for p in step.parameters() if p.requires_grad]
        check_zero(trained, net.space, sampler, cfg.precision)
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
    log = StepLog(folder / "train.jsonl", net.space, progress)
    if shards_base():
        shard_frozen_(net.model)
    with ExitStack() as stack:
        stack.enter_context(head.training(net.model))
        if teacher is not None and teacher.model is not None:
            stack.enter_context(head.training(teacher.model))
        if cfg.gradient_checkpointing:
            stack.enter_context(_checkpointed(net.model))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        trainer = _SuperNetworkTrainer(net, step, sampler, cfg, log, items, folder, teacher)
        stack.callback(trainer.close)
        started = time.monotonic()
        with suppress(NothingLeft):
            trainer.train(resume_from_checkpoint=from_main(lambda: last_checkpoint(folder)))
    if is_main():
        save_trained(net, folder)
        forget_checkpoints(folder)
    wait()
    net.model.eval()
    if net.space is not None:
        net.activate(net.space.largest())
    seconds = time.monotonic() - started
    return TrainResult(trainer.state.global_step, log.last_loss, seconds, log.tokens)


@contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Let the model recompute activations in the backward pass as long as the context lasts."""
    # transformers calls it activation checkpointing of late, and warns of the older name.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()
        model.disable_input_require_grads()


def _distillation(
    net: Trainee,
    items: Sequence[Any],
    sampler: Sampler,
    cfg: TrainConfig,
    teacher: AnyTeacher | None,
) -> DistillConfig | None:
    """Return what is learnt of a teacher; None where there is none, or nobody to teach."""
    if cfg.distill.has_outside_teacher or teacher is not None:
        check_teacher(net.model, items, cfg.distill, teacher)
        return cfg.distill
    if cfg.distill.teacher is None or net.space is None or net.space.size == 1:
        return None
    if not getattr(sampler, "begins_with_largest", False):
        raise BadRecipe(
            "train.distill: in_place needs the largest sub-network in every step, and "
            f"{type(sampler).__name__} does not begin with it",
            try_="train.sampler=sandwich, or train.distill=null",
        )
    return cfg.distill


class _SuperNetworkTrainer(Trainer):
    """Trains the draws of each step; everything else is the stock Trainer."""

    def __init__(
        self,
        net: Trainee,
        step: TrainStep,
        sampler: Sampler,
        cfg: TrainConfig,
        log: StepLog,
        items: Sequence[Any],
        folder: Path,
        teacher: AnyTeacher | None,
    ) -> None:
        self.net = net
        self.step = step
        self.head = step.head
        self.sampler = sampler
        self.cfg = cfg
        self.step_log = log
        self.folder = folder
        self.teacher = teacher
        self.zero: ZeroOptimizer | None = None
        self._micro_batch = (-1, 0)
        super().__init__(
            model=step,
            args=trainer_arguments(cfg, folder),
            data_collator=self._collate,
            train_dataset=list(enumerate(items)),  # type: ignore[arg-type]
            callbacks=[log],
        )
        # Gradients are averaged by us: the wrapper of several processes would only hold a copy.
        self.accelerator.prepare_model = partial(  # type: ignore[method-assign]
            self.accelerator.prepare_model, evaluation_mode=True
        )
        if teacher is not None and teacher.model is not None:
            teacher.model.to(self.args.device)  # type: ignore[arg-type]
        self.remove_callback(PrinterCallback)

    def _collate(self, numbered: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        """Return this process's part of a batch, and beside it the numbers of its items."""
        own = numbered[processes.rank() :: processes.count()]
        idle = not own  # a last batch with fewer items than processes
        if idle:
            own = numbered[:1]
        batch = self.head.collate([item for _, item in own])
        numbers = torch.tensor([number for number, _ in own])
        return {**batch, _NUMBERS: numbers, _IDLE: idle}

    def get_train_dataloader(self) -> Any:
        """Let every process go through whole batches, of which it collates its own part.

        The stock loader would fill the last batch of an epoch up with items it has had already.
        """
        loader = super().get_train_dataloader()
        if processes.count() > 1:
            shard: Any = loader.batch_sampler
            shard.num_processes, shard.process_index = 1, 0
            shard.even_batches = False
        return loader

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Move what the trainee wants treated apart into groups of its own, behind the stock's."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and isinstance(self.net, ScheduledTrainee):
            apart = self.net.parameter_groups(self.cfg)
            moved = {id(parameter) for group in apart for parameter in group["params"]}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in moved]
            for group in apart:
                optimizer.add_param_group(group)
        if is_new and zero_stage():
            self.zero = ZeroOptimizer(optimizer, zero_stage(), self.args.max_grad_norm)
            self.optimizer = optimizer = self.zero
        return optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Count the targets of all micro-batches of a step, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(self.head.n_targets(batch) for batch in batches if not batch[_IDLE])
        if self.args.world_size > 1:
            count = self.accelerator.gather(torch.as_tensor(count, device=device)).sum()
        return batches, count

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Activate each draw in turn, and add up the gradients of their weighted losses."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        step = self.state.global_step
        index, progress = self._draw_index(step)
        draws = self.sampler.draw(index, progress)
        summed_losses = torch.zeros((), device=self.args.device)
        scheduled = self.net if isinstance(self.net, ScheduledTrainee) else None
        if scheduled is not None:
            scheduled.begin_step(progress)
        # The first draw teaches the others, unless a teacher's outputs stand here before it.
        targets = self._soft_targets(inputs, inputs.pop(_NUMBERS))
        takes_part = 0.0 if inputs.pop(_IDLE) else 1.0
        for draw in draws:
            self.net.activate(draw.config)
            with self.compute_loss_context_manager():
                # Not the wrapper of several processes: it cannot know what a draw leaves unused.
                summed, targets = self.step(inputs, targets)
            # Gradients are averaged over processes, and each holds its own share of the tokens.
            weight = takes_part * draw.weight * self.args.world_size
            loss = summed * weight / num_items_in_batch
            if scheduled is not None:  # of each micro-batch its share
                loss = loss + scheduled.penalty() * (draw.weight / self.cfg.accumulation)
            (self.accelerator if self.zero is None else self.zero).backward(loss)
            summed_losses += loss.detach()
        seen = inputs.get("attention_mask", inputs["input_ids"])
        tokens = int(seen.sum()) if "attention_mask" in inputs else seen.numel()
        tokens *= int(takes_part)
        loss_of_all, tokens_of_all = processes.total(float(summed_losses), tokens)
        mean = loss_of_all / self.args.world_size
        self._refuse_divergence(mean, step)  # by all processes at once
        if self.accelerator.sync_gradients and self.zero is None:
            processes.average_gradients(self.step.parameters())
        self.step_log.add(mean, int(tokens_of_all) * len(draws), draws)
        return torch.tensor(mean, device=self.args.device)

    def _soft_targets(self, batch: dict[str, Any], numbers: Tensor) -> SoftTargets | None:
        """Return what an outside teacher says of a batch, once for all its draws."""
        if self.teacher is None:
            return None
        with self.accelerator.autocast():
            return self.teacher.soft_targets(batch, numbers)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Let sequences of similar length share a batch where batches are padded."""
        if not self.head.pads:
            return super()._get_train_sampler(train_dataset)
        lengths = [self.head.length(item) for _, item in self.train_dataset]  # type: ignore[union-attr]
        return LengthGroups(lengths, self.args.train_batch_size, self.args.seed)

    def _draw_index(self, step: int) -> tuple[int, float]:
        """Return the number that this draw depends on, and how far the training is."""
        last_step, micro = self._micro_batch
        micro = micro + 1 if last_step == step else 0
        self._micro_batch = (step, micro)
        progress = step / max(self.state.max_steps, 1)
        if self.cfg.draw_per == "step":
            return step, progress
        return step * self.cfg.accumulation + micro, progress

    def _refuse_divergence(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            kept = last_checkpoint(self.folder) if is_main() else None
            raise TrainingDiverged(
                f"the loss became {loss} at step {step + 1}; "
                + (f"{Path(kept).name} is kept" if kept else "no checkpoint had been written yet"),
                try_="a lower train.learning_rate, a longer train.warmup, or train.precision=fp32",
            )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save what training changes, and nothing of the frozen base."""
        if not is_main():
            return
        folder = self.folder if output_dir is None else Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_trained(self.net, folder)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip gradients, unless they are in shards, where a step does."""
        return None if self.zero is not None else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return None if self.zero is not None else super()._get_grad_norm(model, grad_norm)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.zero is not None:
            self.zero.gather()
        super()._save_optimizer_and_scheduler(output_dir)

    def close(self) -> None:
        """Give the parameters back as they were."""
        if self.zero is not None:
            self.zero.close()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.net, Path(resume_from_checkpoint))

    def floating_point_ops(self, inputs: Any) -> int:
        """Count nothing: the stock estimate ignores what is active."""
        return 0
