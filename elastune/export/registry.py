"""All formats under one name each: export a model as any of them, and check any export again."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.errors import BadArtifact, BadRecipe, nearest
from elastune.export.card_facts import CardFacts
from elastune.export.compressed import FORMAT as COMPRESSED
from elastune.export.compressed import LOADS_WITH
from elastune.export.foreign import refuse_code
from elastune.export.formats import FORMATS
from elastune.export.gguf_file import WEIGHTS as GGUF_WEIGHTS
from elastune.export.merged_sparse import check_merged_sparse, save_merged_sparse
from elastune.export.result import Checked, Export
from elastune.export.runtimes import RUNTIME_FORMATS, RuntimeExport, check_graph, export_graph
from elastune.export.saved import Saved
from elastune.export.source import Exportable, read_subnetwork
from elastune.export.to_checkpoint import check_checkpoint, export_adapter, export_checkpoint
from elastune.export.to_gguf import check_gguf, export_gguf
from elastune.export.to_nemotron_nas import check_nemotron_nas, export_nemotron_nas
from elastune.extract import PeftAdapter
from elastune.files import holding, read_json
from elastune.subnetwork import Subnetwork

Anything = Exportable | PeftAdapter


@dataclass(frozen=True)
class Order:
    """What is to be exported, and where to.

    Attributes:
        source: a sub-network, a model, an adapter or a folder of either.
        out: the folder that is replaced.
        weights: how they are to be kept; None: as the source does, or in float32.
        tokenizer: saved beside it; None takes the folder's.
        base: what ``merged-sparse`` and ``peft`` compare with.
        origin: name of the model it was made from, for the README.md.
        facts: what else the README.md is to say.
    """

    source: Anything
    out: Path
    weights: str | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    base: Subnetwork | PreTrainedModel | str | Path | None = None
    origin: str | None = None
    facts: CardFacts | None = None


@dataclass(frozen=True)
class ExportFormat:
    """One format.

    Attributes:
        name: as users write it.
        loads_with: where it loads, in a few words.
        write: writes an order, proves it, and tells of it.
        check: proves a folder once more.
        weights: how they can be kept, the default first; empty: as the source keeps them.
        packages: what writing and checking need besides elastune's own requirements.
        install: how to get them.
    """

    name: str
    loads_with: str
    write: Callable[[Order], Export]
    check: Callable[[Path], Checked]
    weights: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    install: str = ""


def export_model(
    source: Anything,
    format: str,
    out: str | Path,
    *,
    weights: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base: Subnetwork | PreTrainedModel | str | Path | None = None,
    origin: str | None = None,
    facts: CardFacts | None = None,
) -> Export:
    """Export a model, and prove it in a fresh process by what loads it.

    The folder is replaced whole, once that process computes what the torch model does; else it is
    as it was. It holds the export, the tokenizer, a README.md, and what `check_export` needs.

    Args:
        source: a sub-network, a model, or a folder that `save_subnetwork` or transformers wrote,
            whose adapter is then merged; an adapter for format ``peft``.
        format: one of `EXPORT_FORMATS`, or with weights such as ``openvino:int8``.
        out: where to.
        weights: float32 by default; ``openvino`` has int8 and int4, ``gguf`` its own kinds.
        tokenizer: saved beside it; None takes the folder's.
        base: for ``merged-sparse``: the model before the adapter was merged, whose zeros must all
            be there; for ``peft``: the folder of the adapter's base.
        origin: the name of the model it was made from, for the README.md.
        facts: what else the README.md is to say: recipe, budget, figures (`run_facts`).

    Raises:
        BadRecipe: an unknown format or kind of weights, a missing package, or a source that the
            format cannot hold.
        UnsupportedModel: a family that the format does not know.
        ElastuneError: what was written computes something else; nothing is left of it.
    """
    chosen, kept = parse_format(format if weights is None else f"{format}:{weights}")
    if isinstance(source, PeftAdapter) and chosen.name != "peft":
        raise BadRecipe(
            f"an adapter alone is no model, and format {chosen.name} holds one",
            try_="format peft, or the folder of the adapter, which names its base",
        )
    return chosen.write(Order(source, Path(out), kept, tokenizer, base, origin, facts))


def check_export(folder: str | Path, *, trust_remote_code: bool = False) -> Checked:
    """Load an export in a fresh process once more, and compare with what was recorded.

    Args:
        folder: that `export_model` wrote, or the .gguf file in it.
        trust_remote_code: run code that the folder brings and that this elastune would not have
            written, and load torch.export archives, which can hold code. Off by default.

    Raises:
        BadArtifact: no export, or one that lacks a file.
        ElastuneError: it cannot be run, computes something else, a file changed, or it brings code.
    """
    folder = Path(folder).absolute()
    if folder.suffix == ".gguf" and folder.is_file():
        folder = folder.parent
    chosen = _needed(EXPORT_FORMATS[format_of(folder)])
    record = folder / ("export.json" if (folder / "export.json").is_file() else "sparsity.json")
    with holding(record):
        refuse_code(folder, chosen.name, trust_remote_code=trust_remote_code)
        return chosen.check(folder)


def parse_format(text: str) -> tuple[ExportFormat, str | None]:
    """Read ``onnx`` or ``openvino:int8``.

    Raises:
        BadRecipe: an unknown format or kind of weights, or packages that are missing.
    """
    name, _, weights = text.partition(":")
    if name not in EXPORT_FORMATS:
        raise BadRecipe(
            f"unknown format {name!r}{nearest(name, EXPORT_FORMATS)}; known are "
            f"{', '.join(EXPORT_FORMATS)}",
            try_="one of these",
        )
    chosen = EXPORT_FORMATS[name]
    if weights and weights not in chosen.weights:
        known = f"known are {', '.join(chosen.weights)}" if chosen.weights else "it keeps its own"
        raise BadRecipe(
            f"format {name} has no weights {weights!r}{nearest(weights, chosen.weights)}; {known}",
            try_="leave it out, or format openvino for int8 and int4, or gguf for its own kinds",
        )
    _needed(chosen)
    return chosen, weights or next(iter(chosen.weights), None)


def missing_packages(chosen: ExportFormat) -> list[str]:
    """Return the packages that a format needs and that are not installed."""
    return [p for p in chosen.packages if importlib.util.find_spec(p) is None]


def _needed(chosen: ExportFormat) -> ExportFormat:
    missing = missing_packages(chosen)
    if missing:
        raise BadRecipe(
            f"format {chosen.name} needs {', '.join(missing)}, which is not installed",
            try_=chosen.install,
        )
    return chosen


def format_of(folder: Path) -> str:
    """Return the format of an export.

    Raises:
        BadArtifact: it is none, or nothing was recorded with it.
    """
    for file in ("export.json", "sparsity.json"):
        if (folder / file).is_file():
            about = read_json(folder / file)
            name = about.get("format") if isinstance(about, dict) else None
            if isinstance(name, str) and name in EXPORT_FORMATS:
                return name
    if not folder.is_dir():
        raise BadArtifact(f"there is no folder {str(folder)!r}", try_="the folder of an export")
    is_model = any((folder / n).is_file() for n in ("config.json", "adapter_config.json"))
    found = "a model with which nothing was recorded to check it by" if is_model else "no export"
    raise BadArtifact(
        f"{str(folder)!r} is {found}: it has no export.json", try_="elastune export it first"
    )


def _graph(order: Order, name: str) -> Export:
    made = export_graph(
        order.source,  # type: ignore[arg-type]
        name,
        order.out,
        weights=order.weights,
        tokenizer=order.tokenizer,
        facts=order.facts,
    )
    return _of_runtime(made)


def _gguf(order: Order) -> Export:
    made = export_gguf(
        order.source,  # type: ignore[arg-type]
        order.out,
        weights=order.weights or "float32",
        tokenizer=order.tokenizer,
        facts=order.facts,
    )
    return _of_runtime(made)


def _of_runtime(made: RuntimeExport) -> Export:
    return Export(
        folder=made.folder,
        format=made.format,
        weights=made.weights,
        runtime=made.runtime,
        loads_with=made.runtime,
        largest_difference=made.largest_difference,
        n_bytes=made.n_bytes,
        files=made.files,
        seconds=made.seconds,
        agreement=made.agreement,
        code=made.code,
        notes=made.notes,
    )


def _nemotron(order: Order) -> Export:
    started = time.monotonic()
    made = export_nemotron_nas(
        order.source,  # type: ignore[arg-type]
        order.out,
        tokenizer=order.tokenizer,
        facts=order.facts,
    )
    return _of_saved(made, "vllm", "float32", started)


def _merged_sparse(order: Order) -> Export:
    if order.base is None:
        raise BadRecipe(
            "format merged-sparse counts zeros against those of the base, and none is given",
            try_="base=: the same sub-network before its adapter was merged",
        )
    started = time.monotonic()
    sub, tokenizer = read_subnetwork(order.source, order.tokenizer)  # type: ignore[arg-type]
    made = save_merged_sparse(
        sub, tokenizer, order.out, base=order.base, origin=order.origin, facts=order.facts
    )
    weights = str(sub.model.dtype).removeprefix("torch.")
    return _of_saved(made, "transformers", weights, started)


def _of_saved(made: Saved, runtime: str, weights: str, started: float) -> Export:
    return Export(
        folder=made.folder,
        format=made.format,
        weights=weights,
        runtime=runtime,
        loads_with=made.loads_with.removeprefix("loads with "),
        largest_difference=made.largest_difference,
        n_bytes=made.n_bytes,
        files=made.files,
        seconds=time.monotonic() - started,
        notes=made.notes,
    )


def _checkpoint(order: Order, name: str) -> Export:
    return export_checkpoint(
        order.source,  # type: ignore[arg-type]
        name,
        order.out,
        tokenizer=order.tokenizer,
        origin=order.origin,
        facts=order.facts,
    )


def _peft(order: Order) -> Export:
    source, base = order.source, order.base
    if isinstance(source, Subnetwork | PreTrainedModel):
        raise BadRecipe(
            "format peft holds an adapter alone",
            try_="hf or hf-hetero, which keep an adapter that is not merged beside the model",
        )
    if isinstance(base, Subnetwork | PreTrainedModel):
        raise BadRecipe("the base of an adapter is given by its folder", try_="base=FOLDER")
    return export_adapter(source, order.out, base=base, facts=order.facts, origin=order.origin)


def _check_runtime(check: Callable[[Path], Any]) -> Callable[[Path], Checked]:
    def checked(folder: Path) -> Checked:
        about = read_json(folder / "export.json")
        found = check(folder)
        is_number = isinstance(found, float)
        return Checked(
            folder,
            about["format"],
            about["runtime"],
            found if is_number else found.largest_difference,
            None if is_number else found,
        )

    return checked


def _check_sparse(folder: Path) -> Checked:
    zeros = sum(check_merged_sparse(folder).values())
    return Checked(folder, "merged-sparse", "transformers", zeros=zeros)


def _formats() -> Mapping[str, ExportFormat]:
    found = [
        ExportFormat(
            name,
            format.loads_with,
            lambda order, name=name: _checkpoint(order, name),  # type: ignore[misc]
            _check_runtime(check_checkpoint),
        )
        for name, format in FORMATS.items()
    ]
    plain = "plain transformers"
    found += [
        ExportFormat(
            COMPRESSED,
            LOADS_WITH,
            lambda order: _checkpoint(order, COMPRESSED),
            _check_runtime(check_checkpoint),
            packages=("compressed_tensors",),
            install="pip install 'elastune[quantise]'",
        ),
        ExportFormat("peft", "plain PEFT", _peft, _check_runtime(check_checkpoint)),
        ExportFormat("merged-sparse", plain, _merged_sparse, _check_sparse),
    ]
    found += [
        ExportFormat(
            name,
            graph.runtime,
            lambda order, name=name: _graph(order, name),  # type: ignore[misc]
            _check_runtime(check_graph),
            tuple(graph.tolerances),
            graph.packages,
            "pip install 'elastune[runtimes]'",
        )
        for name, graph in RUNTIME_FORMATS.items()
    ]
    found += [
        ExportFormat(
            "gguf",
            "llama.cpp",
            _gguf,
            _check_runtime(check_gguf),
            tuple(GGUF_WEIGHTS),
            ("gguf", "xllamacpp"),
            "pip install gguf xllamacpp",
        ),
        ExportFormat(
            "nemotron-nas", "vLLM", _nemotron, _check_runtime(check_nemotron_nas), ("float32",)
        ),
    ]
    return {format.name: format for format in found}


EXPORT_FORMATS: Mapping[str, ExportFormat] = _formats()
