"""``hf``, ``hf-padded``, ``hf-hetero`` and ``peft``: proved in a process without elastune.

`save_subnetwork` has shown that a folder computes what the sub-network does. A fresh process then
shows that transformers alone (and PEFT, where there is an adapter) computes the same from it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.errors import BadArtifact, BadRecipe, ElastuneError
from elastune.export import checkpoint_run
from elastune.export.card import adapter_card
from elastune.export.card_facts import CardFacts
from elastune.export.compressed import FORMAT as COMPRESSED
from elastune.export.compressed import save_compressed
from elastune.export.recorded import refuse_changed, refuse_missing
from elastune.export.result import Export
from elastune.export.saved import save_subnetwork
from elastune.export.source import (
    Exportable,
    base_of,
    check_adapter,
    is_adapter,
    load_any,
    read_subnetwork,
)
from elastune.export.verify import TOLERANCE, auto_class, example_inputs
from elastune.extract import PeftAdapter
from elastune.files import (
    file_digest,
    read_json,
    refuse_links_outside,
    whole_folder,
    write_json,
    write_text,
)
from elastune.models.checkpoint import check_folder
from elastune.models.registration import AUTO_CLASSES
from elastune.version import __version__

_OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")
_RECORD = ("export.json", "reference.safetensors", "README.md")


def export_checkpoint(
    source: Exportable,
    format: str,
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    origin: str | None = None,
    facts: CardFacts | None = None,
) -> Export:
    """Save a checkpoint as `save_subnetwork` does, and prove it in a process without elastune.

    Raises:
        BadRecipe: no tokenizer, or a format that cannot hold these sizes.
        ElastuneError: it computes something else; nothing is left of it.
    """
    sub, tokenizer = read_subnetwork(source, tokenizer)
    target = Path(out).absolute()
    with whole_folder(target) as partial:
        inner = partial / target.name  # the README.md calls the folder by its name
        started = time.monotonic()
        if format == COMPRESSED:
            saved = save_compressed(sub, tokenizer, inner, origin=origin, facts=facts)
        else:
            saved = save_subnetwork(
                sub, tokenizer, inner, format=format, origin=origin, facts=facts
            )
        if sub.adapter is not None:
            # It says where its base is, which is where the folder will be.
            config = read_json(inner / "adapter" / "adapter_config.json")
            where = {"base_model_name_or_path": str(target)}
            write_json(inner / "adapter" / "adapter_config.json", config | where)
        for file in list(inner.iterdir()):
            shutil.move(file, partial)
        inner.rmdir()
        seconds = time.monotonic() - started
        auto = auto_class(load_any(partial)).__name__
        worst = _record_and_prove(partial, saved.format, auto, _loaded(partial))
        found = _listed(partial)
    return Export(
        folder=target,
        format=saved.format,
        weights="int4" if sub.grids else str(sub.model.dtype).removeprefix("torch."),
        runtime="transformers",
        loads_with=saved.loads_with.removeprefix("loads with "),
        largest_difference=max(worst, saved.largest_difference),
        seconds=seconds,
        notes=saved.notes,
        **found,
    )


def export_adapter(
    source: PeftAdapter | str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    facts: CardFacts | None = None,
    origin: str | None = None,
) -> Export:
    """Save an adapter as PEFT reads it, and prove it on its base in a process without elastune.

    Args:
        source: an adapter, or the folder of one.
        out: where to.
        base: folder of the base; None takes the one that the folder's config names.
        facts: what else the README.md is to say.
        origin: what the base is called in the README.md.

    Raises:
        BadRecipe: neither an adapter nor its folder, or no base.
        ElastuneError: base and adapter compute something else than W + s B A does.
    """
    if not isinstance(source, PeftAdapter) and not is_adapter(Path(source)):
        raise BadRecipe(
            f"{source} is no adapter, and format peft holds nothing else",
            try_="another format, or the folder of an adapter",
        )
    if base is None and isinstance(source, PeftAdapter):
        raise BadRecipe("an adapter is proved on its base, and none is given", try_="base=")
    home = Path(base).absolute() if base is not None else base_of(Path(str(source))).absolute()
    check_folder(home)
    model = load_any(home).eval()
    target = Path(out).absolute()
    with whole_folder(target) as partial:
        started = time.monotonic()
        expected = _write_adapter(source, home, model, partial, target.name, origin, facts)
        seconds = time.monotonic() - started
        auto = auto_class(model).__name__
        worst = _record_and_prove(partial, "peft", auto, expected, base=home)
        found = _listed(partial)
    return Export(
        folder=target,
        format="peft",
        weights="float32",
        runtime="transformers",
        loads_with=f"plain PEFT, on the model in {home.name}",
        largest_difference=worst,
        seconds=seconds,
        **found,
    )


def _write_adapter(
    source: PeftAdapter | str | Path,
    home: Path,
    model: PreTrainedModel,
    partial: Path,
    title: str,
    origin: str | None,
    facts: CardFacts | None,
) -> PreTrainedModel:
    """Write or copy an adapter, and return a model that computes what it should."""
    if isinstance(source, PeftAdapter):
        inner = partial / "adapter"
        source.save(inner, base=str(home))
        for file in list(inner.iterdir()):
            shutil.move(file, partial)
        inner.rmdir()
        text = adapter_card(
            source, model, folder=title, origin=origin or str(home), base=str(home), facts=facts
        )
        write_text(partial / "README.md", text)
        return merged_by_hand(model, source)
    refuse_links_outside(Path(source))
    check_adapter(Path(source))
    for file in Path(source).iterdir():
        if file.is_file() and file.name not in ("export.json", "reference.safetensors"):
            shutil.copy(file, partial)
    config = read_json(partial / "adapter_config.json")
    write_json(partial / "adapter_config.json", config | {"base_model_name_or_path": str(home)})
    whole: Any = PeftModel.from_pretrained(model, str(source))
    merged: PreTrainedModel = whole.merge_and_unload()
    return merged


@torch.no_grad()
def merged_by_hand(model: PreTrainedModel, adapter: PeftAdapter) -> PreTrainedModel:
    """Add s B A to a model's weights, in place, without PEFT; trained heads take their weights."""
    for name, (a, b, scale) in adapter.weights.items():
        weight: Any = model.get_submodule(name).weight
        delta = scale * (b.float() @ a.float())
        weight += (delta.T if adapter.transposed else delta).to(weight)
    for name, state in adapter.head.items():
        model.get_submodule(name).load_state_dict(state)
    return model.eval()


def check_checkpoint(folder: str | Path) -> float:
    """Load an export in a fresh process again, and return the largest difference of an output.

    Raises:
        BadArtifact: it lacks a file.
        ElastuneError: it cannot be loaded or computes something else, or a file changed.
    """
    folder = Path(folder).absolute()
    about = read_json(folder / "export.json")
    wanted = [*about["sha256"], "reference.safetensors"]
    refuse_missing(folder, wanted)
    made = getattr(transformers, str(about["auto_class"]), None)
    if about["auto_class"] not in AUTO_CLASSES and not hasattr(made, "base_model_prefix"):
        raise BadArtifact(
            f"{folder}: {about['auto_class']!r} is no class that loads a model",
            try_="export it again",
        )
    if about["format"] == "peft" and not is_adapter(folder):
        raise BadArtifact(f"{folder} has no adapter_config.json", try_="export it again")
    check_folder(Path(about["base"]) if about["format"] == "peft" else folder)
    for adapter in (folder, folder / "adapter"):
        if is_adapter(adapter):
            check_adapter(adapter)
    worst = _proved(folder, about)
    said = "the export, by too little to show in its outputs"
    refuse_changed(folder, about["sha256"], said=said)
    return worst


def _loaded(folder: Path) -> PreTrainedModel:
    """Load what was written, its adapter merged."""
    model: Any = load_any(folder)
    if is_adapter(folder / "adapter"):
        model = PeftModel.from_pretrained(model, str(folder / "adapter")).merge_and_unload()
    return model.eval()  # type: ignore[no-any-return]


@torch.no_grad()
def _record_and_prove(
    folder: Path, format: str, auto: str, model: PreTrainedModel, *, base: Path | None = None
) -> float:
    """Write what a model computes beside an export, and let a fresh process compute it, too."""
    inputs = example_inputs(model)
    found: Any = model(**inputs)
    outputs = {name: found[name] for name in _OUTPUTS if name in found}
    about = {
        "elastune": __version__,
        "format": format,
        "runtime": "transformers",
        "auto_class": auto,
        "base": None if base is None else str(base),
        "outputs": list(outputs),
        "sha256": {
            name: file_digest(folder / name) for name in _names(folder) if name not in _RECORD
        },
    }
    write_json(folder / "export.json", about)
    stored = {f"in.{n}": t for n, t in inputs.items()} | outputs
    held: dict[str, Tensor] = {name: tensor.contiguous() for name, tensor in stored.items()}
    save_file(held, folder / "reference.safetensors")
    return _proved(folder, about)


def _proved(folder: Path, about: Any) -> float:
    try:
        expected = load_file(folder / "reference.safetensors")
    except Exception as error:
        raise BadArtifact(
            f"{folder}/reference.safetensors cannot be read: {error}", try_="export it again"
        ) from error
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "found.safetensors"
        command = [sys.executable, "-IB", checkpoint_run.__file__, str(folder), str(out)]
        # What a modelling file is copied to must not outlive this, nor be what an older one was.
        environment = os.environ | {"HF_MODULES_CACHE": str(Path(temporary) / "modules")}
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment
        )
        if done.returncode != 0 or not out.is_file():
            lines = done.stderr.strip().splitlines()
            said = lines[-1] if lines else f"exit code {done.returncode}"
            raise ElastuneError(
                f"transformers cannot load what was exported: {said}",
                try_="the version of transformers that it was written with: elastune doctor",
            )
        found = load_file(out)
    worst = max(float((expected[n] - found[n]).abs().max()) for n in about["outputs"])
    largest = max(float(expected[n].abs().max()) for n in about["outputs"])
    allowed = TOLERANCE * max(1.0, largest / 10)
    if not worst <= allowed:  # NaN, too
        raise ElastuneError(
            f"the checkpoint does not compute what the model does: outputs differ by up to "
            f"{worst:.1e}, {allowed:.0e} is allowed",
            try_="export it again",
        )
    return worst


def _names(folder: Path) -> list[str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p.relative_to(folder).as_posix() for p in files)


def _listed(folder: Path) -> dict[str, Any]:
    names = _names(folder)
    shipped = (name for name in names if name != "reference.safetensors")
    return {"files": tuple(names), "n_bytes": sum((folder / n).stat().st_size for n in shipped)}
