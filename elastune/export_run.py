"""Export a run's sub-network, or a saved model, as several formats.

A format that cannot hold it, or that fails its proof, does not keep the others from being written.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from elastune.choose import chosen, named_config
from elastune.errors import BadRecipe, ElastuneError, nearest
from elastune.export.card_facts import CardFacts, run_facts
from elastune.export.registry import Anything, export_model, parse_format
from elastune.export.result import Export
from elastune.extract import extract
from elastune.files import read_json, write_json
from elastune.progress import Reporter
from elastune.run import Run
from elastune.space import SearchSpace, SubnetConfig
from elastune.subnetwork import Subnetwork, extract_model
from elastune.supernet import SuperNetwork

_PREFERRED = ("fit", "best", "heuristic")
"""The sub-network that a run is about, the first of these that it has."""

_AS_TRAINED = ("hf", "hf-padded", "hf-hetero", "merged-sparse", "compressed-tensors")
"""Formats that keep the type of the weights."""

_MARKS = ("export.json", "sparsity.json")


@dataclass(frozen=True)
class Failed:
    """A format that could not be written; its folder is as it was.

    Attributes:
        label: of the format.
        error: why.
    """

    label: str
    error: ElastuneError


def export_folder(
    source: Path,
    formats: Sequence[str],
    out: Path | None,
    reporter: Reporter,
    *,
    base: Path | None = None,
) -> tuple[list[Export], list[Failed]]:
    """Export a saved model or adapter as several formats.

    Args:
        source: a folder that `save_subnetwork`, `PeftAdapter.save` or transformers wrote.
        formats: such as ``onnx`` or ``openvino:int8``.
        out: gets a folder for each of them.
        reporter: is told how far it is.
        base: of ``merged-sparse`` and ``peft``.

    Raises:
        BadRecipe: no ``out``, an unknown format, or a folder there that is no export.
    """
    if not source.is_dir():
        raise BadRecipe(f"there is no folder {str(source)!r}", try_="a run, or a saved model")
    if out is None:
        raise BadRecipe(
            f"{source} is a saved model and no run directory, so it must be said where to",
            try_="--out DIR, which gets a folder for each format",
        )
    places = _places(out, formats, source)
    return _each(places, lambda name: (source, {"base": base}), reporter)


def export_run(
    run: Run,
    formats: Sequence[str],
    out: Path | None = None,
    *,
    config: str | None = None,
) -> tuple[list[Export], list[Failed]]:
    """Export a sub-network of a run as several formats.

    Adapters are merged, but for ``peft``. ``merged-sparse`` compares with the base as it was cut.

    Args:
        run: trained.
        formats: such as ``onnx`` or ``openvino:int8``.
        out: gets a folder for each; ``RUN/export``, with the sub-network's name below that where
            one is asked for, by default.
        config: name or JSON; the best that was found by default, else the heuristic one.

    Raises:
        BadRecipe: no such sub-network or format, or a folder there that is no export.
    """
    name, wanted = named(run, config)
    folder = out or (run.dir.root / "export" / (name if config else ""))
    places = _places(folder, formats, run.dir.root)
    facts = run_facts(run.dir.root, name)
    net = run.load_supernet()
    made = _Made(run, net, wanted, facts)
    run.reporter.say(f"exporting {name}")
    written, failed = _each(places, made.order, run.reporter)
    _keep_account(run, name, written)
    return written, failed


def named(run: Run, text: str | None) -> tuple[str, SubnetConfig]:
    """Return the name and configuration of the sub-network that is asked for.

    Raises:
        BadRecipe: the run has none, or none of that name.
    """
    known = chosen(run)
    if not known:
        raise BadRecipe(
            f"a run of method {run.recipe.method} has no sub-networks",
            try_="give the folder of a saved model",
        )
    if text is None:
        text = next(name for name in (*_PREFERRED, *known) if name in known)
    if text in known:
        return text, known[text]
    if text.lstrip().startswith("{"):
        space = SearchSpace.from_dict(read_json(run.dir.space))
        return "custom", named_config(space, text)
    raise BadRecipe(
        f"this run has no sub-network {text!r}{nearest(text, known)}; it has {', '.join(known)}",
        try_="one of these, or a JSON object of dim -> choice",
    )


class _Made:
    """What of a run each format is made from, cut when it is first asked for."""

    def __init__(self, run: Run, net: SuperNetwork, config: SubnetConfig, facts: CardFacts) -> None:
        self.run = run
        self.net = net
        self.config = config
        self.facts = facts
        self._merged: Subnetwork | None = None

    def order(self, format: str) -> tuple[Anything, dict[str, Any]]:
        """Return what a format is made from, and the options that go with it."""
        options = {
            "tokenizer": self.run.tokenizer,
            "origin": self.run.recipe.model,
            "facts": self.facts,
        }
        if format == "peft":
            return extract(self.net, self.config), options | {"base": self.run.dir.base.resolve()}
        if format == "merged-sparse":
            keeps = self.net.keep != "nothing"  # then no size is elastic, and the base is on disk
            unmerged = None if keeps else extract_model(self.net, self.config, merge=False)
            options["base"] = unmerged or self.run.dir.base
        if self._merged is None:
            self._merged = extract_model(self.net, self.config)
        return (self._merged if format in _AS_TRAINED else _in_float32(self._merged)), options


def _in_float32(sub: Subnetwork) -> Subnetwork:
    model = sub.model
    if model.dtype == torch.float32 and model.device.type == "cpu":
        return sub
    found: Any = copy.deepcopy(model)
    return replace(sub, model=found.to("cpu", torch.float32))


def _places(out: Path, formats: Sequence[str], source: Path) -> Mapping[str, Path]:
    """Return the folder of each format, having made sure that all can be written.

    Raises:
        BadRecipe: no or unknown formats, or a folder that holds something else.
    """
    if not formats:
        raise BadRecipe("no format is given", try_="--format onnx")
    places = {text: out / re.sub(r"[^\w.-]", "-", text) for text in formats}
    for text, place in places.items():
        parse_format(text)
        inside = source.resolve()
        if place.resolve() in (inside, *inside.parents):
            raise BadRecipe(f"{place} holds what is to be exported", try_="another --out")
        if place.exists() and not _replaceable(place):
            raise BadRecipe(
                f"{place} is there already and is no export, so it is not replaced",
                try_="another --out",
            )
    return places


def _replaceable(place: Path) -> bool:
    if not place.is_dir():
        return False
    return not any(place.iterdir()) or any((place / mark).is_file() for mark in _MARKS)


def _keep_account(run: Run, name: str, written: Sequence[Export]) -> None:
    """Write down what was exported where, for the report; a folder written again has one row."""
    path, rows = run.dir.exports, {}
    if path.exists():
        rows = {row["folder"]: row for row in read_json(path)["exports"]}
    for one in written:
        folder = one.folder.absolute()
        inside = folder.is_relative_to(run.dir.root.absolute())
        place = str(folder.relative_to(run.dir.root.absolute()) if inside else folder)
        kept = ("format", "weights", "runtime", "loads_with", "n_bytes", "seconds", "code")
        row = {field: getattr(one, field) for field in (*kept, "largest_difference")}
        rows[place] = {"folder": place, "label": one.label, "subnet": name, **row}
    if written:
        write_json(path, {"schema": 1, "exports": list(rows.values())})


def _each(places: Mapping[str, Path], order: Any, reporter: Reporter) -> Any:
    made: list[Export] = []
    failed: list[Failed] = []
    with reporter.bar("export", "formats") as show:
        for number, (text, place) in enumerate(places.items()):
            show(number, len(places), text)
            try:
                source, options = order(parse_format(text)[0].name)
                found = export_model(source, text, place, **options)
            except ElastuneError as error:
                failed.append(Failed(text, error))
                continue
            made.append(found)
            for note in found.notes:
                reporter.say(f"{text}: {note}")
        show(len(places), len(places))
    return made, failed
