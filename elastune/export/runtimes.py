"""Export a sub-network for a runtime other than transformers, and check it again at any time."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.errors import BadArtifact, BadRecipe, ElastuneError, nearest
from elastune.export.card import CardText, card, pipeline_tag
from elastune.export.card_facts import CardFacts
from elastune.export.graph import Graph, graph_of
from elastune.export.recorded import refuse_changed, refuse_missing
from elastune.export.reference import (
    Agreement,
    Tolerance,
    agreement,
    complaint,
    reference,
    run_fresh,
)
from elastune.export.runtime_base import RuntimeFormat
from elastune.export.source import read_model
from elastune.export.to_onnx import ONNX
from elastune.export.to_openvino import OPENVINO
from elastune.export.to_torch_export import TORCH_EXPORT
from elastune.files import file_digest, read_json, whole_folder, write_json, write_text
from elastune.subnetwork import Subnetwork
from elastune.version import __version__

RUNTIME_FORMATS: dict[str, RuntimeFormat] = {f.name: f for f in (ONNX, OPENVINO, TORCH_EXPORT)}

#: Of rounded weights: what the runtime computes later, against what it computed when written.
_AGAIN = Tolerance(None, 1e-3, False)


@dataclass(frozen=True)
class RuntimeExport:
    """A model exported for a runtime.

    Attributes:
        folder: where.
        format: one of `RUNTIME_FORMATS`.
        weights: how they are kept.
        runtime: the package that runs it.
        agreement: with the torch model, found in a fresh process.
        n_bytes: of all files but the reference that proves it.
        files: their names.
        seconds: to write it, the check left out.
        code: Python lines that load and run it, from inside the folder.
        notes: what else the user should know, a sentence each.
    """

    folder: Path
    format: str
    weights: str
    runtime: str
    agreement: Agreement
    n_bytes: int
    files: tuple[str, ...]
    seconds: float
    code: str
    notes: tuple[str, ...] = ()

    @property
    def largest_difference(self) -> float:
        """Between its outputs and those of the torch model."""
        return self.agreement.largest_difference


def export_graph(
    source: Subnetwork | PreTrainedModel | str | Path,
    format: str,
    out: str | Path,
    *,
    weights: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    facts: CardFacts | None = None,
) -> RuntimeExport:
    """Export a model as a graph, and prove it in a fresh process by the runtime that loads it.

    The folder is replaced whole, once the runtime computes in it what the torch model does: logits
    of single rows, of padded batches and with a cache, and greedy text. It holds the graph, the
    tokenizer, a README.md with the lines that run it, and ``export.json`` and
    ``reference.safetensors`` for `check_graph`.

    Args:
        source: a sub-network, a folder that `save_subnetwork` or transformers wrote, or a model;
            in float32 on the CPU.
        format: one of `RUNTIME_FORMATS`.
        out: where to.
        weights: ``"float32"``, and for ``openvino`` also ``"int8"`` or ``"int4"``.
        tokenizer: saved beside it; None takes the folder's.
        facts: for the README.md: recipe, figures and licence, as far as they are known.

    Raises:
        BadRecipe: an unknown format or kind of weights, a missing package, or an adapter that is
            not merged.
        UnsupportedModel: the model's code cannot be traced.
        ElastuneError: the export computes something else; nothing is left of it.
    """
    chosen = _format(format)
    kept = _weights(chosen, weights)
    model, tokenizer, name = read_model(source, tokenizer)
    graph = graph_of(model)
    with whole_folder(out) as partial:
        started = time.monotonic()
        chosen.write(model, graph, partial, kept)
        seconds = time.monotonic() - started
        found = _prove(partial, chosen, kept, model, graph, tokenizer)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        code = chosen.example(graph)
        title = Path(out).absolute().name
        text = _card(title, name, chosen, kept, found, code)
        text = replace(text, pipeline_tag=pipeline_tag(model))
        write_text(partial / "README.md", card(text, facts))
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        names = tuple(p.relative_to(partial).as_posix() for p in files)
        n_bytes = sum(p.stat().st_size for p in files if p.name != "reference.safetensors")
    return RuntimeExport(
        Path(out).absolute(),
        chosen.name,
        kept,
        chosen.runtime,
        found,
        n_bytes,
        names,
        seconds,
        code,
        chosen.notes,
    )


def check_graph(folder: str | Path) -> Agreement:
    """Run an export once more in a fresh process, and compare with what the torch model computed.

    Raises:
        BadArtifact: no export, or one that lacks a file.
        ElastuneError: the runtime cannot run it, or computes something else, or a file changed.
    """
    folder = Path(folder).absolute()
    about = read_json(folder / "export.json")
    refuse_settings(folder, about)
    refuse_missing(folder, (*about["sha256"], "reference.safetensors"))
    try:
        expected = load_file(folder / "reference.safetensors")
    except Exception as error:
        raise BadArtifact(
            f"{folder}/reference.safetensors cannot be read: {error}", try_="export it again"
        ) from error
    found = run_fresh(folder)
    _judge(about, expected, found)
    said = "the export, by too little to show in its outputs"
    refuse_changed(folder, about["sha256"], said=said)
    return agreement(about, expected, found)


def refuse_settings(folder: Path, about: Mapping[str, Any]) -> None:
    """Make sure that the record of a graph names the file and options of its format, not others.

    Raises:
        BadArtifact: another runtime or file, or options such as a folder for OpenVINO's cache.
    """
    chosen = RUNTIME_FORMATS.get(str(about.get("format")))
    if chosen is None:
        raise BadArtifact(
            f"{folder}: export.json names no format of graphs", try_="export it again"
        )
    wanted = {
        "runtime": chosen.runtime,
        "file": chosen.file,
        "runtime_options": dict(chosen.runtime_options),
    }
    for name, value in wanted.items():
        if about.get(name) != value:
            raise BadArtifact(
                f"{folder}: export.json has {name} {json.dumps(about.get(name))[:80]}, which for "
                f"{chosen.name} is {json.dumps(value)}",
                try_="export it again",
            )


def _prove(
    folder: Path,
    chosen: RuntimeFormat,
    weights: str,
    model: PreTrainedModel,
    graph: Graph,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Agreement:
    """Write the record beside a graph, run it in a fresh process, and compare."""
    runs, expected = reference(model, graph, tokenizer)
    about = {
        "elastune": __version__,
        "format": chosen.name,
        "runtime": chosen.runtime,
        "runtime_options": dict(chosen.runtime_options),
        "file": chosen.file,
        "weights": weights,
        "model": str(model.config.model_type),
        "generates": graph.generates,
        "inputs": list(graph.inputs),
        "outputs": [name for name in graph.outputs if not name.startswith("present.")],
        "cache": [list(size) for size in graph.cache],
        "tolerance": chosen.tolerances[weights]._asdict(),
        **runs,
    }
    about["sha256"] = {p.name: file_digest(p) for p in sorted(folder.iterdir())}
    write_json(folder / "export.json", about)
    _save(expected, folder)
    found = run_fresh(folder)
    _judge(about, expected, found)
    if weights != "float32":  # what rounding made of it is to stay as it is
        expected |= {f"written.{name}": value for name, value in found.items()}
        _save(expected, folder)
    agreed = agreement(about, expected, found)
    write_json(folder / "export.json", about | {"agreement": asdict(agreed)})
    return agreed


def _judge(about: Any, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise if outputs are not those of the torch model, or not those of the graph as written."""
    why = complaint(about, expected, found, Tolerance(**about["tolerance"]))
    if why is None:
        written = {n.removeprefix("written."): expected[n] for n in expected if "written." in n}
        if written:
            masks = {n: v for n, v in expected.items() if n.endswith("attention_mask")}
            why = complaint(about, masks | written, found, _AGAIN)
    if why is None:
        return
    if about["weights"] != "float32":
        raise ElastuneError(
            f"with weights rounded to {about['weights']} the exported graph does not compute what "
            f"the model does: {why}",
            try_="weights float32, if this model bears no rounding; else export it again",
        )
    raise ElastuneError(
        f"the exported graph does not compute what the model does: {why}",
        try_="export it again; if that fails too, another format",
    )


def _save(arrays: dict[str, Any], folder: Path) -> None:
    held = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    save_file(held, folder / "reference.safetensors")


def _format(name: str) -> RuntimeFormat:
    if name not in RUNTIME_FORMATS:
        raise BadRecipe(
            f"unknown format {name!r}{nearest(name, RUNTIME_FORMATS)}; known are "
            f"{', '.join(RUNTIME_FORMATS)}",
            try_="one of these; export_model knows the other formats",
        )
    chosen = RUNTIME_FORMATS[name]
    missing = [p for p in chosen.packages if importlib.util.find_spec(p) is None]
    if missing:
        raise BadRecipe(
            f"format {name} needs {', '.join(missing)}, which is not installed",
            try_="pip install 'elastune[runtimes]'",
        )
    return chosen


def _weights(chosen: RuntimeFormat, weights: str | None) -> str:
    known = chosen.tolerances
    if weights is not None and weights not in known:
        raise BadRecipe(
            f"format {chosen.name} has no weights {weights!r}{nearest(weights, known)}; known are "
            f"{', '.join(known)}",
            try_="leave it out for float32, or format openvino for int8 and int4",
        )
    return weights or next(iter(known))


def _card(
    title: str, name: str, chosen: RuntimeFormat, weights: str, found: Agreement, code: str
) -> CardText:
    text = (
        f"; greedy tokens equal: {found.same_tokens:.0%}" if found.same_tokens is not None else ""
    )
    proof = (
        f"Against the torch model, in a fresh process: largest difference of an output "
        f"{found.largest_difference:.1e}, relative error {found.relative_error:.1e}, largest "
        f"logit at the same place {found.same_argmax:.1%}{text}. `elastune.check_export` runs this "
        "again."
    )
    return CardText(
        title=title,
        about=f"{name}, exported with elastune {__version__} as `{chosen.name}`, weights "
        f"{weights}.",
        loads_with=chosen.runtime,
        code=code,
        parts=[proof, *chosen.notes],
        library=chosen.runtime,
        tags=[chosen.name],
    )
