"""The stages that make a run's base, and train its super-network and its baselines.

Every stage is skipped when its inputs did not change since it was done, and goes on where it was
killed otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elastune.base_stage import make_base
from elastune.config import TrainConfig
from elastune.files import write_json
from elastune.finetune import save_tuned
from elastune.inputs import fingerprint
from elastune.processes import is_main, main_first, together
from elastune.run import Run
from elastune.sampling import make_sampler
from elastune.teacher import AnyTeacher, Teacher, cache_teacher
from elastune.train import train
from elastune.trained import Trainee


def sparsify(run: Run) -> None:
    """Prune and reorder the base as the recipe says; save it with its account of zeros."""
    inputs = run.inputs("sparsify")
    if run.dir.is_done("sparsify", inputs):
        return
    with run.dir.stage("sparsify", inputs, run.dir.base):
        make_base(run)


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
