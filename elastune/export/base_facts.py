"""What is known of the model that something was made from: its name on the hub, and its licence.

Only this machine is asked: the base's own folder, what the hub's cache holds of it, and the table
of built-in models.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from os.path import expanduser  # leaves ~name of nobody as it is
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache

UNKNOWN = "unknown: check the base"

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")


@dataclass(frozen=True)
class License:
    """A licence as model cards name it.

    Attributes:
        id: the hub's short name, such as ``apache-2.0``; ``other`` has a name or a link.
        name: of one without a short name.
        link: to its text.
        source: where this was read.
    """

    id: str
    name: str | None = None
    link: str | None = None
    source: str = ""

    def __str__(self) -> str:
        named = f"{self.id} ({self.name})" if self.name else self.id
        return f"{named}, {self.link}" if self.link else named


@dataclass(frozen=True)
class BaseFacts:
    """A base model: what to call it, and what is known of it.

    Attributes:
        name: for readers; never a path of this machine.
        hub_id: ``owner/name``, where it is known.
        license: None where nothing says it.
    """

    name: str
    hub_id: str | None = None
    license: License | None = None


#: Built-in name -> where the weights come from. Both say Apache 2.0 on their model cards.
_BUILTIN = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "minilm-l6": "sentence-transformers/all-MiniLM-L6-v2",
}


def base_facts(source: str | Path) -> BaseFacts:
    """Look up a base by what it was loaded from: a built-in name, a folder or a hub id.

    >>> base_facts("smollm2-135m").hub_id
    'HuggingFaceTB/SmolLM2-135M-Instruct'

    Nothing is fetched, and nothing is raised for what is not there or cannot be read.
    """
    text = str(source)
    folder = Path(expanduser(text))
    builtin = text if text in _BUILTIN else _cached_builtin(folder)
    if builtin is not None:
        licence = License("apache-2.0", source="the table of built-in models")
        return BaseFacts(builtin, _BUILTIN[builtin], licence)
    if folder.is_dir():
        hub_id = _id_in_cache(folder)
        return BaseFacts(hub_id or folder.resolve().name, hub_id, _license_in(folder))
    if not _HUB_ID.fullmatch(text):
        return BaseFacts(folder.name if folder.is_absolute() else text)
    card = try_to_load_from_cache(text, "README.md")
    found = license_of_card(Path(card)) if isinstance(card, str) else None
    return BaseFacts(text, text, found)


def _cached_builtin(folder: Path) -> str | None:
    """Return the name of a built-in model by the folder that it is kept in."""
    if folder.parent.name != "builtin":
        return None
    return next((n for n in _BUILTIN if folder.name == n or folder.name.startswith(f"{n}-")), None)


def _id_in_cache(folder: Path) -> str | None:
    """Return the hub id of a folder in the hub's cache."""
    names = (_CACHED.fullmatch(part) for part in folder.absolute().parts)
    found = next((match for match in names if match), None)
    return f"{found['owner']}/{found['name']}" if found else None


def _license_in(folder: Path) -> License | None:
    found = license_of_card(folder / "README.md")
    if found is not None:
        return found
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    said = config.get("license") if isinstance(config, dict) else None
    return License(said, source="its config.json") if isinstance(said, str) and said else None


def license_of_card(file: Path) -> License | None:
    """Return the licence that a model card says in its front matter."""
    try:
        text = file.read_text(encoding="utf-8")
        if not text.startswith("---"):
            return None
        data: Any = ModelCard(text, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):
        return None
    named = data.license[0] if isinstance(data.license, list) and data.license else data.license
    if not isinstance(named, str) or not named:
        return None
    return License(named, data.license_name, data.license_link, "its model card")
