"""What a plan is made from: sizes of model and data, and seconds on this device."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from elastune.artifacts import RunDirectory
from elastune.build_structure import structure_space
from elastune.config import Recipe, apply_override, make_recipe
from elastune.cost import CostModel, model_cost
from elastune.evaluate import evaluate
from elastune.fit_plan import Plan, Speed, draft, make_plan
from elastune.fit_request import Facts, Request
from elastune.heads import HEADS, Head
from elastune.latency import Conditions, measure_latency
from elastune.linears import in_features, out_features
from elastune.models import architecture
from elastune.models.blocks import blocks
from elastune.progress import Reporter
from elastune.run import Run
from elastune.supernet import SuperNetwork
from elastune.tasks import Task
from elastune.train import train

_SAMPLE = 256
"""Examples whose lengths are looked at."""
_STEPS = 3
"""Training steps that are timed; the first warms up."""
_SCORED = {"generation": 8}
"""Examples that are scored to time it, by kind of task."""
_USUALLY_SCORED = 64
_LONGEST = 512
"""Tokens of an example that are read at most, unless the recipe says otherwise."""
_OF_FACTS = ("task", "data", "dtype", "seed", "trust_remote_code")
"""Sections of a recipe that matter before there is a method."""


def plan_fit(request: Request, directory: RunDirectory, reporter: Reporter) -> Plan:
    """Look at model and data, time a few steps, and plan; nothing is written.

    Raises:
        ElastuneError: a model, task or target that cannot be, or a time limit below the least.
    """
    first = _plain_recipe(request)
    directory.claim(first, update=True)  # refuses a folder that holds something else
    reporter.say("looking at model and data")
    facts = look_at(Run(directory, first, reporter), request.costs)
    recipe, _ = draft(request, facts)
    reporter.say(f"timing {_STEPS} training steps and some scoring")
    return make_plan(request, facts, measure_speed(Run(directory, recipe, reporter)))


def _plain_recipe(request: Request) -> Recipe:
    """Return a recipe that loads model and data, and does nothing with them."""
    data: dict[str, Any] = {
        "method": "finetune",
        "model": request.model,
        "task": {"name": request.task},
        "data": {"dir": request.data},
        "baselines": ["dense"],
    }
    for override in request.overrides:
        if override.partition("=")[0].partition(".")[0].strip() in _OF_FACTS:
            apply_override(data, override)
    return make_recipe(data, "the request")


def look_at(run: Run, costs: Sequence[str]) -> Facts:
    """Measure the sizes of a run's model and data.

    Args:
        run: of any recipe of the model and the task.
        costs: names of the costs that targets are on; latencies are measured only for these.
    """
    started = time.perf_counter()
    model, tokenizer = run.load_dense()
    load_seconds = time.perf_counter() - started
    task = run.task(run.recipe.task)
    training = task.train_examples()
    longest = _longest(model, tokenizer)
    length = _length(training, HEADS[task.head], tokenizer, min(longest, _LONGEST))
    tokens = min(length, 256)
    full = {name: float(value) for name, value in vars(model_cost(model, tokens)).items()}
    if any("latency" in name for name in costs):
        latency = measure_latency(model, Conditions(prompt_tokens=tokens, repeats=5))
        # A plan needs the time that the model takes, not what else the machine does meanwhile.
        full["latency_ms"] = min(latency.prefill_samples_ms)
        full["decode_latency_ms"] = min(latency.decode_samples_ms, default=0.0)
    found = blocks(model)
    heads, channels = _saved(model, "heads", tokens), _saved(model, "ffn", tokens)
    linears = [model.get_submodule(name) for name in architecture(model).linear_names(model)]
    sizes = [(in_features(linear), out_features(linear)) for linear in linears]
    return Facts(
        kind=architecture(model).kind,
        task_kind=task.kind,
        n_train=len(training),
        n_report=_n_report(run, task),
        longest=longest,
        length=length,
        blocks=len(found),
        units=(
            min(block.n_units("heads") for block in found),
            min(block.n_units("ffn") for block in found),
        ),
        hidden=int(model.config.get_text_config().hidden_size),
        fixed_heads=any(block.fixed_heads is not None for block in found),
        full=full,
        halves={name: (heads[name], channels[name]) for name in heads},
        sparse_weights=sum(a * b for a, b in sizes),
        per_rank=sum(a + b for a, b in sizes),
        load_seconds=load_seconds,
    )


def _n_report(run: Run, task: Task) -> int:
    limit = run.recipe.task.limit
    n_report = len(task.report_examples())
    return n_report if limit is None else min(limit, n_report)


def _longest(model: PreTrainedModel, tokenizer: Any) -> int:
    """Return the tokens that model and tokenizer can do; tokenizers may say 10^30 for unknown."""
    positions = getattr(model.config, "max_position_embeddings", None) or 1024
    return int(min(positions, getattr(tokenizer, "model_max_length", positions)))


def _length(training: Sequence[Any], head: Head, tokenizer: Any, longest: int) -> int:
    """Return a number of tokens that 99 of 100 examples fit into, in steps of 16."""
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(training), min(_SAMPLE, len(training)), replace=False)
    items = head.encode([training[int(i)] for i in sorted(chosen)], tokenizer, longest)
    length = float(np.percentile([head.length(item) for item in items], 99))
    return min(longest, 16 * math.ceil(length / 16))


def _saved(model: PreTrainedModel, part: str, tokens: int) -> dict[str, float]:
    """Return cost by name of all halves of one kind; the model ends as it was."""
    space = structure_space(model, round_to=1, **{part: [1.0, 0]})  # type: ignore[arg-type]
    net = SuperNetwork(model, space)
    try:
        count = CostModel(net, tokens)
        whole, without = vars(count(space.largest())), vars(count(space.smallest()))
    finally:
        net.unwrap()
    return {name: float(whole[name] - without[name]) for name in whole}


def measure_speed(run: Run) -> Speed:
    """Time a few real training steps of the reference model, and the scoring of some examples.

    Args:
        run: of the recipe that is planned.
    """
    name = run.recipe.baselines[0]
    net, sampler, cfg = run.whole(name)
    task = run.task(run.recipe.task)
    examples = run.splits.validation[: _SCORED.get(task.kind, _USUALLY_SCORED)]
    scored = evaluate(
        net.model,
        run.tokenizer,
        task,
        examples,
        batch_tokens=run.recipe.evaluate.batch_tokens,
    )
    items = run.head.encode(run.splits.train, run.tokenizer, cfg.max_length)
    seconds = _time_steps(net, items, sampler, cfg, run.head)
    return Speed(seconds, scored.seconds / len(examples))


class _Enough(Exception):
    """All steps that were to be timed are done: there is nothing to be saved."""


def _time_steps(net: Any, items: Sequence[Any], sampler: Any, cfg: Any, head: Head) -> float:
    """Return the median seconds of a few steps, as the real training does them."""
    moments: list[float] = []

    def note(done: int, total: int, facts: Mapping[str, float]) -> None:
        moments.append(time.perf_counter())
        if done >= _STEPS:
            raise _Enough

    # Everything that the training writes goes with the folder.
    settings = cfg.model_copy(update={"checkpoint_every": 10**6, "report_to": []})
    if settings.max_steps is not None or len(items) * settings.epochs < _STEPS * cfg.batch_size:
        settings = settings.model_copy(update={"max_steps": 10 * _STEPS})
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with suppress(_Enough):
            train(net, items, sampler, settings, folder=Path(folder), head=head, progress=note)
    between = [b - a for a, b in pairwise(moments)]
    return statistics.median(between) if between else time.perf_counter() - started
