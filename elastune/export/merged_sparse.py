"""``merged-sparse``: a checkpoint with its adapter merged and its zeros kept, counted and proved.

The weights are dense tensors with exact zeros, which everything loads; ``sparsity.json`` says how
many each has. Nothing is packed: a packed file would need this library to be read.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.errors import BadRecipe, ElastuneError
from elastune.export import merged_sparse_run
from elastune.export.card_facts import CardFacts
from elastune.export.recorded import refuse_changed, refuse_missing
from elastune.export.saved import Saved, save_subnetwork
from elastune.export.source import load_any
from elastune.export.verify import auto_class
from elastune.files import file_digest, read_json, whole_folder, write_json
from elastune.subnetwork import Subnetwork
from elastune.version import __version__

FILE = "sparsity.json"


@dataclass(frozen=True)
class Zeros:
    """How a merge treated the zeros of one weight.

    Attributes:
        size: of the weight.
        base: its zeros before.
        merged: its zeros after.
        lost: zeros before that are none after.
    """

    size: int
    base: int
    merged: int
    lost: int


def zeros_kept(
    base: Subnetwork | PreTrainedModel, merged: Subnetwork | PreTrainedModel
) -> dict[str, Zeros]:
    """Compare the zeros of all matrices of two models, by name.

    Args:
        base: before an adapter was merged, cut to the same sizes.
        merged: after that.

    Raises:
        BadRecipe: they have other matrices, or of other sizes.
    """
    old, new = _matrices(base), _matrices(merged)
    unlike = [n for n in old.keys() | new.keys() if _shape(old, n) != _shape(new, n)]
    if unlike:
        name = min(unlike)
        raise BadRecipe(
            f"{name} is {_shape(old, name)} in the base and {_shape(new, name)} in the merged "
            "model: zeros of models of other sizes cannot be compared",
            try_="base=extract_model(net, config, merge=False), of the same configuration",
        )
    found = {}
    for name, after in new.items():
        before = old[name].to(after.device) == 0
        is_zero = after == 0
        lost = int((before & ~is_zero).sum())
        found[name] = Zeros(after.numel(), int(before.sum()), int(is_zero.sum()), lost)
    return found


def save_merged_sparse(
    sub: Subnetwork,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    base: Subnetwork | PreTrainedModel | str | Path,
    format: str = "auto",
    origin: str | None = None,
    facts: CardFacts | None = None,
) -> Saved:
    """Save a merged sub-network whose zeros are those of its base, and prove that they are.

    The folder is what `save_subnetwork` writes, and ``sparsity.json``; it is replaced whole, once a
    fresh process has loaded it and counted as many zeros in every weight.

    Args:
        sub: with its adapter merged so that zeros stay.
        tokenizer: saved beside it.
        folder: where to.
        base: the same sub-network before (``extract_model(net, config, merge=False)``), or a
            folder that it was saved in.
        format: as of `save_subnetwork`.
        origin: the name of the model it was cut from, for the README.md.
        facts: what else the README.md is to say.

    Raises:
        BadRecipe: an adapter that is not merged, or a base of other sizes or without zeros.
        ElastuneError: zeros were lost, in the merge or in the file; nothing is left of it.
    """
    if sub.adapter is not None:
        raise BadRecipe(
            "the adapter of this sub-network is not merged",
            try_="extract_model(net, config, merge=True), or save_subnetwork for both parts",
        )
    whole = load_any(Path(base)) if isinstance(base, str | Path) else base
    found = zeros_kept(whole, sub)
    _refuse_lost(found)
    target = Path(folder).absolute()
    with whole_folder(target) as partial:
        inner = partial / target.name  # the README.md calls the folder by its name
        saved = save_subnetwork(sub, tokenizer, inner, format=format, origin=origin, facts=facts)
        for file in list(inner.iterdir()):
            shutil.move(file, partial)
        inner.rmdir()
        about = _record(partial, found, auto_class(sub.model).__name__)
        write_json(partial / FILE, about)
        check_merged_sparse(partial)
        n_bytes = sum(p.stat().st_size for p in partial.rglob("*") if p.is_file())
    total = about["total"]
    note = (
        f"{total['zeros']:,} of {total['weights']:,} weights in matrices are exactly 0 "
        f"({total['zeros'] / total['weights']:.1%}); all {total['zeros_of_base']:,} zeros of the "
        "base are kept. They are stored as they are: packing or faster kernels are the loader's."
    )
    return replace(
        saved,
        folder=target,
        format="merged-sparse",
        n_bytes=n_bytes,
        files=tuple(sorted([*saved.files, FILE])),
        notes=(*saved.notes, note),
    )


def check_merged_sparse(folder: str | Path) -> dict[str, int]:
    """Load a saved model in a fresh process and return its zeros by weight.

    Raises:
        BadArtifact: no such folder.
        ElastuneError: it cannot be loaded, has other zeros, or a file changed.
    """
    folder = Path(folder).absolute()
    about = read_json(folder / FILE)
    refuse_missing(folder, about["sha256"], try_="save it again")
    refuse_changed(folder, about["sha256"], said="it was saved", try_="save it again")
    counts = _fresh_counts(folder, about["auto_class"])
    for name, wanted in about["tensors"].items():
        if counts.get(name) != wanted["zeros"]:
            raise ElastuneError(
                f"{name} has {counts.get(name)} zeros when it is loaded, not {wanted['zeros']}",
                try_="save it again",
            )
    return counts


def _fresh_counts(folder: Path, auto: str) -> dict[str, int]:
    """Return the zeros of each weight as a fresh process loads them."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "counts.json"
        # Without -P, modules that lie beside the script would hide others of their names.
        command = [sys.executable, "-P", merged_sparse_run.__file__, str(folder), auto, str(out)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=_environment()
        )
        if done.returncode != 0 or not out.is_file():
            lines = done.stderr.strip().splitlines()
            said = lines[-1] if lines else f"exit code {done.returncode}"
            raise ElastuneError(f"{folder.name} cannot be loaded: {said}", try_="export it again")
        counts: dict[str, int] = read_json(out)
        return counts


def _refuse_lost(found: Mapping[str, Zeros]) -> None:
    lost = {name: zeros.lost for name, zeros in found.items() if zeros.lost}
    if lost:
        worst = max(lost, key=lambda name: lost[name])
        of_base = sum(zeros.base for zeros in found.values())
        raise ElastuneError(
            f"the merge lost {sum(lost.values()):,} of {of_base:,} zeros, in {len(lost)} weights "
            f"({worst}: {lost[worst]:,})",
            try_="an adapter trained to keep zeros (SparsePEFT), or save the adapter beside the "
            "model: extract_model(net, config, merge=False)",
        )
    if not any(zeros.base for zeros in found.values()):
        raise BadRecipe(
            "the base has no zeros to keep",
            try_="save_subnetwork, or a base that was sparsified first",
        )


def _record(folder: Path, found: Mapping[str, Zeros], auto: str) -> dict[str, Any]:
    """Return what ``sparsity.json`` says: of the weights in the files, pads included."""
    tensors: dict[str, Any] = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  (no mapping)
                tensor = stored.get_tensor(name)
                if tensor.dim() == 2:
                    base = found[name].base if name in found else 0
                    tensors[name] = {
                        "shape": list(tensor.shape),
                        "zeros": int((tensor == 0).sum()),
                        "zeros_of_base": base,
                    }
    short = [n for n, zeros in found.items() if n in tensors and tensors[n]["zeros"] < zeros.merged]
    if short:
        raise ElastuneError(
            f"{', '.join(short[:4])} lost zeros when the model was written",
            try_="free disk space, and export it again",
        )
    return {
        "elastune": __version__,
        "format": "merged-sparse",
        "auto_class": auto,
        "total": {
            "weights": sum(t["shape"][0] * t["shape"][1] for t in tensors.values()),
            "zeros": sum(t["zeros"] for t in tensors.values()),
            "zeros_of_base": sum(t["zeros_of_base"] for t in tensors.values()),
        },
        "tensors": tensors,
        "sha256": {file.name: file_digest(file) for file in files},
    }


def _matrices(model: Subnetwork | PreTrainedModel) -> dict[str, Tensor]:
    plain = model.model if isinstance(model, Subnetwork) else model
    return {n: p.detach() for n, p in plain.named_parameters() if p.dim() == 2}


def _shape(matrices: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(matrices[name].shape) if name in matrices else None


def _environment() -> dict[str, str]:
    """Return the environment of a process that finds elastune where this one does."""
    root = str(Path(merged_sparse_run.__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"PYTHONPATH": path}
