"""Tasks of lm-evaluation-harness on a live model: nothing is written and loaded again.

lm_eval is the extra ``elastune[lm-eval]``. Its tasks are looked for by name in a folder of the
user's YAML files first, then among those that come with it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import logging
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from elastune.errors import BadData, BadRecipe, UnsupportedModel, nearest
from elastune.files import write_text
from elastune.generate import evaluating, unwrapped
from elastune.harness_results import records_of, score_of
from elastune.tasks.base import Score

Progress = Callable[[int, int], None]

_DRAWS = 1000
"""Bootstrap samples behind a standard error that has no formula."""
_LOCAL_DATA = (
    "a YAML file that reads local files (dataset_path: json, dataset_kwargs: {data_files: {test: "
    "FILE}}), in a folder given by --lm-eval-path (include_path); README of lm-evaluation-harness: "
    "docs/new_task_guide.md"
)


def harness_scores(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
    predictions: Callable[[str], Path | None] | None = None,
) -> list[Score]:
    """Measure a causal LM, as it is now, on tasks of lm-evaluation-harness.

    Args:
        model: a transformers causal LM, wrapped by PEFT or active in a super-network or neither.
        tasks: names of tasks, groups or tags, or paths of YAML files (see `harness_tasks`).
        include_path: folder of the user's own task files.
        limit: score the first so many examples of each task, or below 1 that part of them.
        num_fewshot: worked examples before each question; None leaves what the task says.
        batch_tokens: bound on the tokens of a batch.
        progress: called with (answered, all) requests, such as the choices of all questions.
        predictions: from a score's task to the file that takes its examples, one JSON line each.

    Returns:
        One score per task, named ``lm-eval:<name>``: the task's first metric, the others beside
        it. ``acc``, ``acc_norm`` are called accuracy, accuracy_norm; a metric of a second filter
        carries the filter's name. Standard errors are lm-eval's; of metrics that are no mean, the
        bootstrap's over 1000 samples.

    Raises:
        BadRecipe: lm_eval is not installed, or a name it does not know.
        BadData: a task's data is out of reach.
        UnsupportedModel: a model without a causal LM's head.
    """
    specs = harness_tasks(tasks, include_path)
    _check(model, limit)
    started = time.perf_counter()
    with _by_itself(), evaluating(model):
        manager = _manager(tuple(specs.values()), include_path)
        loaded = {name: _load(manager, name, spec, num_fewshot) for name, spec in specs.items()}
        results = _run(loaded, model, tokenizer, limit, batch_tokens, progress)
    seconds = (time.perf_counter() - started) / len(specs)
    scores = []
    for name, part in loaded.items():
        score = score_of(name, results, seconds)
        path = None if predictions is None else predictions(score.task)
        if path is not None:
            lines = [json.dumps(r, ensure_ascii=False) for r in records_of(part, results)]
            write_text(path, "".join(f"{line}\n" for line in lines))
        scores.append(score)
    return scores


def harness_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> dict[str, str]:
    """Return the tasks that are meant: name -> what `harness_scores` may be given for it.

    A tag stands for all its tasks, the path of a YAML file for the task in it. No data is read.

    Raises:
        BadRecipe: lm_eval is not installed, or a name it does not know.
    """
    _require()
    if include_path is not None and not Path(include_path).is_dir():
        raise BadRecipe(
            f"there is no folder {str(include_path)!r} of lm-eval tasks",
            try_="the folder that holds the tasks' YAML files",
        )
    with _by_itself():
        from lm_eval.tasks._index import Kind, TaskIndex

        index = _manager(tuple(tasks), include_path).task_index
        found: dict[str, str] = {}
        for spec in tasks:
            entry = index.get(spec)
            if entry is not None and entry.kind is Kind.TAG:
                found |= {name: name for name in sorted(entry.tags)}
            elif entry is not None:
                found[spec] = spec
            elif Path(spec).suffix == ".yaml" and (read := TaskIndex.entry_from_path(Path(spec))):
                found[read.name] = spec
            else:
                raise BadRecipe(
                    f"lm-eval has no task {spec!r}{nearest(spec, index)}",
                    try_="`lm-eval ls tasks` lists them; a folder of your own YAML files is given "
                    "by --lm-eval-path (include_path)",
                )
    if not found:
        raise BadRecipe("no lm-eval task is named", try_="for instance: piqa,arc_easy")
    return found


def _require() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise BadRecipe(
            "lm-evaluation-harness is not installed", try_="pip install 'elastune[lm-eval]'"
        )


def _check(model: nn.Module, limit: float | None) -> None:
    inner: Any = unwrapped(model)
    if inner.config.is_encoder_decoder or inner.get_output_embeddings() is None:
        raise UnsupportedModel(
            f"lm-eval tasks need a causal language model; this is a {type(inner).__name__}",
            try_="a decoder, loaded with its causal-lm head",
        )
    if limit is not None and limit <= 0:
        raise BadRecipe(f"limit is {limit}", try_="a number of examples, or a part of them below 1")


def _manager(specs: tuple[str, ...], include_path: str | Path | None) -> Any:
    """Return an index that knows ``specs``; reading all of lm-eval's takes half a minute."""
    from lm_eval.tasks import TaskManager

    folders = [] if include_path is None else [str(include_path)]
    own = TaskManager(include_path=folders, include_defaults=False)
    index = own.task_index
    if all(_is_within(spec, index) or Path(spec).is_file() for spec in specs):
        return own
    return _whole_manager(tuple(folders))


def _is_within(spec: Any, index: Mapping[str, Any]) -> bool:
    """Tell whether a task or tag is in an index, or a group with all that it holds."""
    if spec not in index:
        return False
    members = (index[spec].cfg or {}).get("task")
    if not isinstance(members, list):
        return True
    return all(isinstance(member, str) and _is_within(member, index) for member in members)


@functools.cache
def _whole_manager(folders: tuple[str, ...]) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders))


def _load(manager: Any, name: str, spec: str, num_fewshot: int | None) -> dict[str, Any]:
    """Return a task with its data, or a group with all its tasks."""
    from datasets.exceptions import DatasetsError

    try:
        loaded: dict[str, Any] = manager.load([spec])
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadData(
            f"lm-eval task {name!r} cannot be set up: {lines[0]}",
            try_=f"check its data and the network; offline: {_LOCAL_DATA}",
        ) from error
    group = loaded["groups"].get(name)
    if group is not None and not group.has_aggregation:
        raise BadRecipe(
            f"lm-eval's group {name!r} has no score of its own",
            try_=f"name its tasks: {','.join(loaded['tasks'])}",
        )
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise BadRecipe(
                f"lm-eval task {name!r} would run code that the model writes, which is not done",
                try_="another task, or lm-eval itself on an exported model",
            )
        # As lm-eval does: a task that says 0 means it.
        given = task.get_config("num_fewshot")
        if given is None or (num_fewshot is not None and given != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=1234)
    return loaded


def _run(
    loaded: Mapping[str, dict[str, Any]],
    model: nn.Module,
    tokenizer: Any,
    limit: float | None,
    batch_tokens: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Return lm-eval's results of all loaded tasks."""
    from lm_eval.evaluator import evaluate

    from elastune.harness_model import HarnessModel

    tasks = {name: task for part in loaded.values() for name, task in part["tasks"].items()}
    groups = {name: group for part in loaded.values() for name, group in part["groups"].items()}

    @functools.cache
    def total() -> int:
        return sum(request.repeats or 1 for task in tasks.values() for request in task.instances)

    lm = HarnessModel(
        model,
        tokenizer,
        batch_tokens=batch_tokens,
        ranked={name for name, task in tasks.items() if _is_ranked(task)},
        total=total,
        progress=progress,
    )
    both = {"tasks": tasks, "groups": groups, "group_map": {}}
    given: Any = limit if limit is None or limit < 1 else int(limit)
    results: dict[str, Any] = evaluate(lm, both, limit=given, bootstrap_iters=_DRAWS)
    return results


def _is_ranked(task: Any) -> bool:
    """Tell whether a task asks no more than which choice is likeliest."""
    from lm_eval.api.task import ConfigurableTask

    return (
        type(task) is ConfigurableTask
        and task.OUTPUT_TYPE == "multiple_choice"
        and not callable(task.get_config("process_results"))
        and "exact_match" not in task.aggregation()
    )


@contextlib.contextmanager
def _by_itself() -> Iterator[None]:
    """Let lm-eval run without a word, with its own seeds and without a trace of them."""
    logger = logging.getLogger("lm_eval")
    level, draw, arrays = logger.level, random.getstate(), np.random.get_state()
    workers = os.environ.get("DISABLE_MULTIPROC")
    try:
        # Its bootstrap would fork a process with a model in it on every core.
        os.environ["DISABLE_MULTIPROC"] = "1"
        logger.setLevel(logging.ERROR)
        with (
            warnings.catch_warnings(action="ignore"),
            torch.random.fork_rng(),
            contextlib.redirect_stdout(io.StringIO()),
            _no_bars(),
        ):
            random.seed(0)
            np.random.seed(1234)
            torch.manual_seed(1234)
            yield
    finally:
        os.environ.pop("DISABLE_MULTIPROC", None)
        if workers is not None:
            os.environ["DISABLE_MULTIPROC"] = workers
        logger.setLevel(level)
        random.setstate(draw)
        np.random.set_state(arrays)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep progress bars of other libraries from being drawn over our own."""
    from tqdm import tqdm

    draw: Any = tqdm.__init__

    def silent(self: Any, *args: Any, **options: Any) -> None:
        draw(self, *args, **(options | {"disable": True}))

    setattr(tqdm, "__init__", silent)  # noqa: B010
    try:
        yield
    finally:
        setattr(tqdm, "__init__", draw)  # noqa: B010
