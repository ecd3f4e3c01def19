"""The run directory: the one contract between stages, and the only place that knows file names.

Everything is written beside its place and renamed into it, so that a killed run leaves the old or
the new and nothing between. A stage is done when the manifest says so for the same inputs.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from elastune.config import Recipe, dump_recipe, make_recipe
from elastune.errors import BadArtifact, BadRecipe
from elastune.files import (
    holding,
    read_json,
    refuse_links_outside,
    refuse_outside,
    remove,
    write_json,
    write_text,
)
from elastune.inputs import source_hashes
from elastune.seals import SealedFiles, check_rows, digest_of, seal
from elastune.yaml_text import parse_yaml

SCHEMA = 1

#: What a run that was refused, or killed before its first stage, may leave in a folder.
_TRACES = (".lock", ".recipe.yaml.partial")

_ROW: Mapping[str, Any] = {
    "status": str,
    "input_hash": str,
    "seconds": (int, float),
    "outputs": list,
    "seals": dict,
}
"""The fields of a stage in the manifest."""


class RunDirectory:
    """A folder that holds one run of one recipe."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe_file = root / "recipe.yaml"
        self.manifest_file = root / "manifest.json"
        self.base = root / "base"
        self.sparsity = self.base / "sparsity.json"
        self.levels = self.base / "levels.safetensors"
        self.grid = self.base / "int4_grid.safetensors"
        self.importance = root / "importance.safetensors"
        self.movement = root / "movement"
        self.generated = root / "generated.json"
        self.generated_choices = root / "generated_choices.jsonl"
        self.space = root / "space.json"
        self.supernet = root / "supernet"
        self.search = root / "search"
        self.trials = self.search / "trials.json"
        self.journal = self.search / "study.journal"
        self.single_choices = self.search / "single_choices.jsonl"
        self.budgets = self.search / "budgets.json"
        self.targets = self.search / "targets.json"
        self.latency_table = self.search / "latency_table.json"
        self.full_costs = self.search / "full_costs.json"
        self.reference_scores = self.search / "reference_scores.json"
        self.fit = root / "fit.json"
        self.fit_result = self.search / "fit_result.json"
        self.fit_reference = self.search / "fit_reference.json"
        self.subnets = root / "subnets"
        self.predictions = root / "predictions"
        self.metrics_file = root / "metrics.json"
        self.exports = root / "exports.json"
        self.report = root / "report.html"
        self._pending_recipe: Recipe | None = None
        self._sources: dict[str, str] | None = None
        self._sealed = SealedFiles(root)

    def estimated_losses(self, cost: str) -> Path:
        """Return where single-choice losses are kept, estimated in sub-networks of all costs."""
        return self.search / f"estimated_losses.{cost}.json"

    def teacher(self, key: str) -> Path:
        """Return where a teacher's outputs for the training examples are kept."""
        return self.root / "teacher" / key

    def baseline(self, name: str) -> Path:
        """Return the folder of a trained baseline, such as ``sparse+lora``."""
        return self.root / "baselines" / name.replace("+", "-")

    def prediction_file(self, row: str, task: str) -> Path:
        """Return where the answers of one system to one task are kept."""
        return self.predictions / f"{row}.{task.replace(':', '_').replace('/', '_')}.jsonl"

    # -- the recipe ------------------------------------------------------------------------

    def claim(self, recipe: Recipe, *, update: bool = False) -> None:
        """Take the folder for ``recipe``, or go on with it; written when the first stage starts.

        Raises:
            BadRecipe: the folder holds a run of another recipe, or something else entirely.
        """
        if self.recipe_file.exists():
            mine = recipe.model_dump(mode="json")
            theirs = self.recipe().model_dump(mode="json")
            if mine != theirs and not update:
                raise BadRecipe(
                    f"{self.root} holds a run of another recipe; they differ in "
                    f"{', '.join(_differences(theirs, mine)[:6])}",
                    try_="another --out, or --update to redo the stages that this changes",
                )
        elif self.root.exists() and any(p.name not in _TRACES for p in self.root.iterdir()):
            raise BadRecipe(
                f"{self.root} is not empty and not a run directory", try_="another --out"
            )
        self._pending_recipe = recipe

    def recipe(self) -> Recipe:
        """Return the recipe this folder belongs to.

        Raises:
            BadArtifact: there is none.
        """
        if not self.recipe_file.is_file():
            raise BadArtifact(
                f"{self.root} is not a run directory: it has no recipe.yaml",
                try_=f"elastune run RECIPE --out {self.root}",
            )
        try:
            data = parse_yaml(self.recipe_file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise BadArtifact(
                f"{self.recipe_file} is corrupt: {error}",
                try_="put the recipe of this run there again, or start anew in another --out",
            ) from None
        return make_recipe(data, str(self.recipe_file))

    def keep_recipe(self) -> None:
        """Write the claimed recipe; before this, a claim leaves no trace."""
        recipe, self._pending_recipe = self._pending_recipe, None
        if recipe is not None and not (self.recipe_file.exists() and self.recipe() == recipe):
            write_text(self.recipe_file, dump_recipe(recipe))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder, so that two runs never write to it at once.

        Raises:
            BadRecipe: another process holds it.
        BadArtifact: a link in it leads out of it, so that a run would write elsewhere.
        """
        created = [path for path in (self.root, *self.root.parents) if not path.exists()]
        self.root.mkdir(parents=True, exist_ok=True)
        refuse_links_outside(self.root)
        path = self.root / ".lock"
        with open(path, "w", opener=_not_through_a_link) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _is_at(path, file.fileno()):
                    raise BlockingIOError  # its last holder deleted it just now
            except BlockingIOError:
                raise BadRecipe(
                    f"another run is at work in {self.root}", try_="wait for it, or another --out"
                ) from None
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                for folder in created:  # innermost first; refused input leaves no trace
                    if not any(folder.iterdir()):
                        folder.rmdir()

    # -- stages ----------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """Return the manifest: stage -> status, input hash, seconds; and the versions used."""
        if not self.manifest_file.exists():
            return {"schema": SCHEMA, "stages": {}, "versions": versions()}
        found = check_schema(read_json(self.manifest_file), self.manifest_file)
        with holding(self.manifest_file):
            for row in found["stages"].values():
                known = {"seals": {}, **row}
                if not all(isinstance(known[name], kind) for name, kind in _ROW.items()):
                    raise TypeError("a stage has a field of another kind")
                refuse_outside(self.root, [*known["outputs"], *known["seals"]])
        return found

    def sources(self, recipe: Recipe) -> Mapping[str, str]:
        """Return hashes of the local files that ``recipe`` names, as they are at first sight."""
        if self._sources is None:
            self._sources = source_hashes(recipe, self.manifest().get("sources", {}))
        return self._sources

    def is_done(self, stage: str, inputs: str) -> bool:
        """Tell whether ``stage`` ended with these inputs and its outputs are still there.

        Raises:
            BadArtifact: a file of its outputs is not what the stage wrote.
        """
        row = self.manifest()["stages"].get(stage)
        if row is None or row["status"] != "done" or row["input_hash"] != inputs:
            return False
        outputs = [self.root / name for name in row["outputs"]]
        if not all(path.exists() for path in outputs):
            return False
        self._sealed.check(stage, outputs, row.get("seals", {}))
        return True

    @contextmanager
    def stage(self, name: str, inputs: str, *outputs: Path) -> Iterator[None]:
        """Run a stage: outputs of other inputs are removed first, success is recorded last.

        A stage that was begun with the same inputs keeps its outputs, to go on from them.
        """
        manifest = self.manifest()
        row = manifest["stages"].get(name, {})
        if row.get("input_hash") != inputs:
            for path in outputs:
                remove(path)
        started = time.monotonic()
        spent = row.get("seconds", 0.0) if row.get("input_hash") == inputs else 0.0
        self._record(name, "started", inputs, outputs, spent)
        try:
            yield
        except BaseException:
            # Time spent before an interruption counts.
            self._record(name, "started", inputs, outputs, spent + time.monotonic() - started)
            raise
        self._record(name, "done", inputs, outputs, spent + time.monotonic() - started)

    def _record(
        self, stage: str, status: str, inputs: str, outputs: Sequence[Path], seconds: float
    ) -> None:
        self.keep_recipe()
        manifest = self.manifest()
        done = status == "done"
        outputs = [path for path in outputs if path.exists() or not done]
        manifest["stages"][stage] = {
            "status": status,
            "input_hash": inputs,
            "seconds": round(seconds, 2),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "outputs": [path.relative_to(self.root).as_posix() for path in outputs],
            "seals": seal(self.root, outputs) if done else {},
        }
        manifest["sources"] = self._sources or manifest.get("sources", {})
        manifest["versions"] = versions()
        write_json(self.manifest_file, manifest)

    # -- metrics ---------------------------------------------------------------------------

    def metrics(self) -> dict[str, Any]:
        """Return metrics.json, or an empty one."""
        if not self.metrics_file.exists():
            return {"schema": SCHEMA, "rows": [], "environment": environment()}
        found = check_schema(read_json(self.metrics_file), self.metrics_file)
        check_rows(found, self.metrics_file)
        return found

    def set_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the rows of metrics.json."""
        data = {"schema": SCHEMA, "rows": list(rows), "environment": environment()}
        data["seal"] = digest_of(data["rows"])
        write_json(self.metrics_file, data)


class OthersRunDirectory(RunDirectory):
    """A run directory that another process writes: stages run, and nothing is recorded."""

    @contextmanager
    def stage(self, name: str, inputs: str, *outputs: Path) -> Iterator[None]:
        """Run a stage of which the other process keeps the account."""
        yield


def _not_through_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _is_at(path: Path, descriptor: int) -> bool:
    """Tell whether an open file is still the one at ``path``."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def check_schema(data: Any, path: Path) -> Any:
    """Return ``data`` if it has the schema number this version writes.

    Raises:
        BadArtifact: it has another.
    """
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise BadArtifact(
            f"{path} has schema {found!r}, this version reads {SCHEMA}",
            try_="the version of elastune that wrote it, or a new --out",
        )
    return data


def versions() -> dict[str, str]:
    """Return the versions of what results depend on."""
    from importlib.metadata import version
    from platform import python_version

    names = ("elastune", "torch", "transformers", "peft", "accelerate", "numpy")
    return {"python": python_version(), **{name: version(name) for name in names}}


def environment() -> dict[str, Any]:
    """Return what measured figures depend on: the machine and the versions."""
    import platform

    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        **versions(),
    }
    import torch

    facts["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Name the dotted keys in which two recipes differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in {**old, **new}:
            inner = f"{place}.{key}" if place else str(key)
            found += _differences(old.get(key), new.get(key), inner)
        return found
    return [] if old == new else [f"{place} ({old} there, {new} here)"]
