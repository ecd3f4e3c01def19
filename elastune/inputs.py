"""What the outcome of each stage depends on: settings of the recipe, and the files they name.

Files count by content, so that a stage is redone when its data or model changed under the same
path, and not when they were only copied or touched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from os.path import expanduser  # leaves ~name of nobody as it is
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from elastune.config import BASELINES, Recipe, StructureConfig, TaskConfig, TrainConfig
from elastune.tasks import TASKS

_CHUNK = 1 << 16
_CHUNKS = 64
_NO_PATHS = {*TASKS, "task", "c4"}
"""Names that are never looked for where one happens to be."""


def fingerprint(*parts: Any) -> str:
    """Return a short hash of plain data and of sections of a recipe."""
    plain = [p.model_dump(mode="json") if isinstance(p, BaseModel) else p for p in parts]
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stage_inputs(recipe: Recipe, stage: str, sources: Mapping[str, str]) -> str:
    """Return the hash of what the outcome of a stage depends on.

    Args:
        recipe: of the run.
        stage: importance, generate, sparsify, train, trials, search, single choices, latency
            table, full costs, allocate, or the name of a baseline.
        sources: what `source_hashes` returned.
    """
    task = recipe.task.model_copy(update={"limit": None})  # of the report alone
    # The task decides the head; a head that the checkpoint lacks is drawn by the seed.
    model = [recipe.model, recipe.dtype, recipe.seed, task, sources.get("model")]
    data: list[Any] = [task, recipe.data, recipe.seed, sources.get("task")]
    model += [recipe.vocabulary, *data] if recipe.vocabulary == "task" else []
    plain = [*data, plain_training(recipe)]
    start = [*model, recipe.start, *(plain if recipe.start != "model" else [])]
    base: list[Any] = [*start, _sparsify(recipe), recipe.seed, sources.get("calibration")]
    base += [] if recipe.quantise is None else [recipe.quantise]
    texts = [recipe.sparsify.calibration.source]
    trained = [*data, _adapter(recipe), recipe.train, sources.get("teacher")]
    cut: list[Any] = []
    structure = recipe.structure
    length = recipe.evaluate.macs_length
    scored: list[Any] = []
    if recipe.importance is not None:
        scored = [*start, *data, *_importance(recipe, sources)]
        base += scored
    if structure is not None:
        base += [structure.order, structure.calibration, sources.get("order")]
        texts.append(structure.calibration.source)
        cut = _choices(structure)
        if structure.generate is not None:
            base += [structure.generate, structure.round_to, structure.probes, length]
    if "task" in texts:
        base += data
    parts: dict[str, list[Any]] = {
        "importance": scored,
        "data": data,
        "teacher": _teacher(recipe, plain, model, sources),
        "generate": base,
        "sparsify": base,
        "train": [*base, *trained, *cut],
        "trials": [*base, *trained, *cut, _measured(recipe), length],
        "search": [*base, *trained, *cut, _search(recipe), length, *_budgets(recipe)],
        "latency table": [*base, *trained, *cut, length],
        "full costs": [*start, length],
        "single choices": [*base, *trained, *cut],
        "allocate": [*base, *trained, *cut, *_budgets(recipe)],
        "dense": model,
        "dense+full": [*model, *plain],
        "dense+lora": [*model, *plain, _plain_adapter(recipe)],
        "sparse": base,
        "sparse+lora": [*base, *plain, _plain_adapter(recipe)],
        # Not those of the super-network: rows of equal inputs share their figures.
        "alone": ["alone", *base, *trained, *cut],
    }
    return fingerprint(*parts[stage])


def _teacher(
    recipe: Recipe, plain: list[Any], model: list[Any], sources: Mapping[str, str]
) -> list[Any]:
    """Return what the outside teacher's weights depend on, if there is one."""
    name = recipe.train.distill.teacher
    if name not in recipe.baselines:
        return [name, sources.get("teacher")]
    return [name, *model, *plain, _plain_adapter(recipe)]


def _sparsify(recipe: Recipe) -> dict[str, Any]:
    """Return how the base is made; what shares a sparsity tells nothing where none is chosen."""
    cfg = recipe.sparsify
    unused = {"stream"} if cfg.choices else {"stream", "choices", "per"}  # streamed or not: alike
    return cfg.model_dump(mode="json", exclude=unused)


def _adapter(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of the adapter; how it keeps something says nothing where it does not."""
    cfg = recipe.adapter
    unused = {"keep", "token_share"} if cfg.keep == "nothing" else None
    return cfg.model_dump(mode="json", exclude=unused)


def _plain_adapter(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of the adapters of baselines, which are plain LoRA."""
    return recipe.adapter.model_dump(mode="json", exclude={"keep", "token_share"})


def _importance(recipe: Recipe, sources: Mapping[str, str]) -> list[Any]:
    """Return what the scores depend on besides the model and the data."""
    generate = recipe.structure and recipe.structure.generate
    reach = [generate.range[0], generate.cost] if generate else []
    length = recipe.evaluate.macs_length
    parts: list[Any] = [recipe.importance, recipe.train.max_length, length, reach]
    if recipe.importance is not None and recipe.importance.method == "movement":
        parts += [recipe.train, sources.get("teacher")]
    return parts


def _choices(structure: StructureConfig) -> list[Any]:
    by_hand = [structure.ffn, structure.heads, structure.depth]
    return [*by_hand, structure.round_to, structure.shared, structure.embedding]


def _search(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that decide which trials there are, and which of them is best."""
    return recipe.search.model_dump(mode="json", exclude={"storage", "workers", "front"})


def _measured(recipe: Recipe) -> list[Any]:
    """Return what the figures of one trial depend on: another algorithm goes on from them."""
    return [recipe.search.objective, recipe.search.cost]


def _budgets(recipe: Recipe) -> list[Any]:
    structure = recipe.structure
    if structure is None:
        return []
    length = recipe.evaluate.macs_length
    return [structure.budgets, structure.allocation, structure.probes, length]


def plain_training(recipe: Recipe) -> TrainConfig:
    """Return the settings of training that matter where there is no choice and no teacher."""
    of_choice = ("sampler", "n_random", "distill", "draw_per", "update")
    usual = TrainConfig()
    return recipe.train.model_copy(update={name: getattr(usual, name) for name in of_choice})


def report_key(task: TaskConfig) -> str:
    """Return the name in `source_hashes` of the files that a report task reads."""
    return f"report:{task.label}"


def source_hashes(recipe: Recipe, recorded: Mapping[str, str]) -> dict[str, str]:
    """Hash the content of the local files and folders that a recipe names.

    Args:
        recipe: of the run.
        recorded: earlier hashes, used for files that are gone: a finished stage does not need them.
    """
    named = {
        "model": [recipe.model],
        "task": [recipe.task.name],
        "calibration": [recipe.sparsify.calibration.source],
    }
    if recipe.train.distill.teacher not in (None, "largest", *BASELINES):
        named["teacher"] = [recipe.train.distill.teacher]
    if recipe.structure is not None:
        named["order"] = [recipe.structure.calibration.source]
    for task in recipe.report_tasks:
        named[report_key(task)] = [task.name, str(task.options.get("report") or "")]
    found: dict[str, str] = {}
    for key, names in named.items():
        paths = [path for name in names if (path := _local(name, recipe.data.dir)) is not None]
        if paths:
            found[key] = fingerprint([content_hash(path) for path in paths])
        elif key in recorded:
            found[key] = recorded[key]
    return found


def _local(name: str, data_dir: Path | None) -> Path | None:
    """Return the file or folder that a model, task or text is read from, if it is local."""
    # Names of tasks may hold the path after a colon: "classification:train.csv".
    spellings = [text for text in (name, name.partition(":")[2]) if text]
    # A run called like its task would otherwise depend on its own folder.
    places = [] if name in _NO_PATHS else [Path(expanduser(text)) for text in spellings]
    places += [data_dir / text for text in spellings if data_dir]
    return next((path for path in places if path.exists()), None)


def content_hash(path: Path) -> str:
    """Hash a file, or the files of a folder (not of folders in it).

    Files up to 4 MiB are read whole; of larger ones the size and 64 evenly spaced pieces. Training
    moves every weight a little, so pieces tell two checkpoints apart.
    """
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if _counts(p))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{'' if file == path else file.name}\0{size}\0".encode())
        step = max(_CHUNK, (size - _CHUNK) // (_CHUNKS - 1)) if size else _CHUNK
        with file.open("rb") as stream:
            for start in range(0, size, step):
                stream.seek(start)
                digest.update(stream.read(_CHUNK))
    return digest.hexdigest()


def _counts(path: Path) -> bool:
    """Tell whether a file of a folder can matter to what is read from the folder."""
    return path.is_file() and not path.name.startswith(".") and path.suffix != ".md"
