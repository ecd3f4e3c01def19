"""Teachers from outside: a frozen network that runs, or what it said once, kept on disk.

Classifiers and readers say a few numbers an item. They are computed once (`cache_teacher`) in
float32, so that nothing is rounded: 8 bytes an example with two classes, 8 bytes a token of a
window. A language model says as many numbers a token as its vocabulary has; its teacher runs along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from elastune.config import DistillConfig
from elastune.errors import BadArtifact, BadRecipe
from elastune.features import FeatureHooks, check_features, feature_hooks
from elastune.files import read_json, whole_file, write_json
from elastune.heads import HEADS, Head, SoftTargets
from elastune.progress import Bar

_META = "teacher.json"
_OUTPUTS = "outputs.safetensors"
_PART = "part-*.safetensors"
_BATCHES_PER_PART = 16
"""So often, in batches, what a teacher says is written: a killed run loses no more."""
_HASHED_AT_ONCE = 256
#: Fields of configurations that say nothing of what a model computes, and change when it is saved.
_NOTES = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}
_NOTES |= {"problem_type", "id2label", "label2id"}


class Teacher:
    """A network that others learn from. It is frozen and in evaluation mode from here on.

    Args:
        model: reads the student's own token ids.
        head: of the task; as in training.

    Attributes:
        hooks: of the model, while features are learnt from, too.
    """

    hooks: FeatureHooks | None = None

    def __init__(self, model: PreTrainedModel, head: Head = HEADS["causal-lm"]) -> None:
        self.model: PreTrainedModel | None = model.requires_grad_(False).eval()
        self.head = head

    @torch.no_grad()
    def soft_targets(self, batch: dict[str, Any], numbers: Tensor | None = None) -> SoftTargets:
        """Return what the teacher says of a batch.

        Args:
            batch: made by ``head.collate``, on the teacher's device.
            numbers: int64 (B,), of the items in the batch; only a cache needs them.
        """
        assert self.model is not None
        with self.head.training(self.model):
            if self.hooks is None:
                return SoftTargets(self.head.outputs(self.model, batch))
            with self.hooks.capture() as seen:
                outputs = self.head.outputs(self.model, batch)
        return SoftTargets(outputs, self.hooks.features(seen))


class CachedTeacher:
    """What a teacher said of every training item; made by `cache_teacher`.

    Args:
        head: as in training.
        values: float32, the rows of all items laid end to end; may be mapped from a file.
        offsets: int64 (N + 1,): where the rows begin, and where the last one ends.
    """

    model: PreTrainedModel | None = None
    hooks: FeatureHooks | None = None

    def __init__(self, head: Head, values: Tensor, offsets: Tensor) -> None:
        self.head = head
        self.values = values
        self.offsets = offsets.tolist()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def soft_targets(self, batch: dict[str, Any], numbers: Tensor | None = None) -> SoftTargets:
        """Return what the teacher said of the items of a batch; see `Teacher.soft_targets`."""
        assert numbers is not None
        rows = [self.values[self.offsets[i] : self.offsets[i + 1]] for i in numbers.tolist()]
        return SoftTargets(self.head.from_rows(rows, batch))


AnyTeacher = Teacher | CachedTeacher


def check_teacher(
    model: PreTrainedModel, items: Sequence[Any], cfg: DistillConfig, teacher: AnyTeacher | None
) -> None:
    """Raise BadRecipe unless an outside teacher is asked for, there, and fit for a student.

    Args:
        model: the student.
        items: that it trains on.
        cfg: of the training.
        teacher: None if none was given.
    """
    if teacher is None:
        raise BadRecipe(
            f"train.distill.teacher is {cfg.teacher!r}, and no teacher was given",
            try_="train(..., teacher=Teacher(model, head)), or train.distill=in_place",
        )
    if not cfg.has_outside_teacher:
        raise BadRecipe(
            f"a teacher was given, and train.distill.teacher is {cfg.teacher!r}",
            try_="TrainConfig(distill={'teacher': NAME}), NAME being any other than largest",
        )
    if teacher.model is None:
        _check_cached(teacher, items, cfg)
        return
    if teacher.model is model:
        raise BadRecipe(
            "the teacher is the very network that trains", try_="a copy of it, loaded once more"
        )
    known, used = _n_tokens(teacher.model), _n_tokens(model)
    if known < used:
        raise BadRecipe(
            f"the teacher knows {known} tokens, the student {used}",
            try_="a teacher with the student's own tokenizer",
        )


def _check_cached(teacher: AnyTeacher, items: Sequence[Any], cfg: DistillConfig) -> None:
    assert isinstance(teacher, CachedTeacher)
    if len(teacher) != len(items):
        raise BadRecipe(
            f"the teacher's outputs are of {len(teacher)} items, and {len(items)} are trained on",
            try_="cache_teacher() with the items that are given here",
        )
    if cfg.needs_features:
        raise BadRecipe(
            "train.distill.hidden and relations are learnt of a teacher that runs, and this one's "
            "outputs come from a cache",
            try_="train(..., teacher=Teacher(model, head))",
        )


def teacher_hooks(
    student: FeatureHooks | None, teacher: AnyTeacher, cfg: DistillConfig
) -> FeatureHooks | None:
    """Return hooks for the features that a student, with hooks of its own, is to learn.

    Raises:
        BadRecipe: the two cannot be compared.
    """
    if student is None or teacher.model is None:
        return None
    hooks = feature_hooks(teacher.model, cfg)
    assert hooks is not None
    check_features(student, hooks)
    return hooks


def cache_teacher(
    model: PreTrainedModel | Callable[[], PreTrainedModel],
    items: Sequence[Any],
    head: Head,
    folder: Path,
    *,
    identity: str | None = None,
    batch_tokens: int = 8192,
    progress: Bar | None = None,
) -> CachedTeacher:
    """Run a teacher over all items once, and keep what it says in ``folder``.

    What is there already is not computed again; a run that was killed goes on where it was. One
    process at a time writes a folder.

    Args:
        model: the teacher, frozen by this; or a function that loads it, called only if needed.
        items: what ``head.encode`` made of the training examples, as they are given to `train`.
        head: of the task; one that is ``cacheable``.
        identity: says which teacher it is, such as a hash of what it was made from. By default its
            weights are hashed, for which it must be loaded.
        batch_tokens: tokens of a batch, padding included.
        progress: shown items done, of all.

    Raises:
        BadArtifact: ``folder`` holds what another teacher said, or of other items, or is damaged.
        BadRecipe: the head's outputs cannot be kept, or the teacher reads another vocabulary.
    """
    if not head.cacheable:
        raise BadRecipe(
            f"what a teacher says for {head.name} is a number for every token of the vocabulary at "
            "every target: too much to keep",
            try_="elastune.teacher.Teacher, which runs along with the training",
        )
    load = _once(model)
    meta = {
        "schema": 1,
        "teacher": identity or _hash_of_model(load()),
        "items": _hash_of_items(items, head),
        "n_items": len(items),
    }
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / _META).exists():
        _check(read_json(folder / _META), meta, folder)
    else:
        write_json(folder / _META, meta)
    if not (folder / _OUTPUTS).exists():
        _compute(load, items, head, folder, batch_tokens, progress)
        _merge(folder, len(items))
    for part in folder.glob(_PART):
        part.unlink()
    state = _load(folder / _OUTPUTS)
    return CachedTeacher(head, state["values"], state["offsets"])


def _once(model: PreTrainedModel | Callable[[], PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    """Return a function that loads the model at its first call alone."""
    held = [model] if isinstance(model, PreTrainedModel) else []

    def load() -> PreTrainedModel:
        if not held:
            held.append(model())  # type: ignore[arg-type]
        return held[0]

    return load


def _check(found: Any, wanted: dict[str, Any], folder: Path) -> None:
    """Raise BadArtifact unless a cache is of this teacher and these items."""
    way_out = f"delete {folder}; the next run makes it again"
    if not isinstance(found, dict) or found.get("schema") != wanted["schema"]:
        raise BadArtifact(f"{folder / _META} is not of this version", try_=way_out)
    if found.get("teacher") != wanted["teacher"]:
        raise BadArtifact(f"{folder} holds what another teacher said", try_=way_out)
    if found != wanted:
        raise BadArtifact(
            f"{folder} holds what the teacher said of {found.get('n_items')} other items, and "
            f"{wanted['n_items']} are trained on now",
            try_=way_out,
        )


def _compute(
    load: Callable[[], PreTrainedModel],
    items: Sequence[Any],
    head: Head,
    folder: Path,
    batch_tokens: int,
    progress: Bar | None,
) -> None:
    """Write in parts what the teacher says of the items that no part holds yet."""
    done = {i for part in folder.glob(_PART) for i in _load(part)["items"].tolist()}
    todo = [i for i in range(len(items)) if i not in done]
    if not todo:
        return
    model = load()
    teacher = Teacher(model, head)
    rows: dict[int, Tensor] = {}
    batches = list(_batches([head.length(items[i]) for i in todo], batch_tokens))
    for number, chosen in enumerate(batches, start=1):
        indices = [todo[k] for k in chosen]
        batch = head.collate([items[i] for i in indices])
        _check_ids(model, batch["input_ids"])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        outputs = teacher.soft_targets(batch).outputs
        found = [row.float().cpu() for row in head.to_rows(outputs, batch)]
        rows.update(zip(indices, found, strict=True))
        if number % _BATCHES_PER_PART == 0 or number == len(batches):
            _save_part(folder / _PART.replace("*", f"{len(done):09d}"), rows)
            done |= rows.keys()
            rows = {}
        if progress is not None:
            progress(len(done) + len(rows), len(items))


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices, longest first: what does not fit into memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def _check_ids(model: PreTrainedModel, ids: Tensor) -> None:
    known = _n_tokens(model)
    if int(ids.max()) >= known:
        raise BadRecipe(
            f"the teacher knows {known} tokens, and the items hold token {int(ids.max())}",
            try_="a teacher with the student's own tokenizer",
        )


def _n_tokens(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type,union-attr]


def _save_part(path: Path, rows: dict[int, Tensor]) -> None:
    sizes = torch.tensor([len(row) for row in rows.values()])
    values = torch.cat(list(rows.values()))
    _save(path, {"items": torch.tensor(list(rows)), "sizes": sizes, "values": values})


def _merge(folder: Path, n_items: int) -> None:
    """Write the rows of all parts in the order of the items."""
    parts = [_load(part) for part in sorted(folder.glob(_PART))]
    sizes = torch.zeros(n_items, dtype=torch.int64)
    for part in parts:
        sizes[part["items"]] = part["sizes"]
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    values = torch.empty(int(offsets[-1]))
    for part in parts:
        rows = part["values"].split(part["sizes"].tolist())
        for i, row in zip(part["items"].tolist(), rows, strict=True):
            values[offsets[i] : offsets[i + 1]] = row
    _save(folder / _OUTPUTS, {"values": values, "offsets": offsets})


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    with whole_file(path) as partial:
        save_file(tensors, partial)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadArtifact(
            f"{path}, what a teacher said, cannot be read: {error}",
            try_=f"delete {path.parent}; the next run makes it again",
        ) from error


def _hash_of_model(model: PreTrainedModel) -> str:
    """Return a hash of a model's class, sizes and weights."""
    fields = {k: v for k, v in model.config.to_dict().items() if k not in _NOTES}
    found = hashlib.sha256(f"{type(model).__name__} {sorted(fields.items())}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        _add(found, name, tensor)
    return found.hexdigest()[:16]


def _hash_of_items(items: Sequence[Any], head: Head) -> str:
    """Return a hash of all that a teacher reads of the items, which their labels are not."""
    found = hashlib.sha256(head.name.encode())
    for start in range(0, len(items), _HASHED_AT_ONCE):
        batch = head.collate(items[start : start + _HASHED_AT_ONCE])
        for name, tensor in sorted(batch.items()):
            if name != "labels":
                _add(found, name, tensor)
    return found.hexdigest()[:16]


def _add(found: Any, name: str, tensor: Tensor) -> None:
    found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
