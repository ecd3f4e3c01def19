"""Whether the Python code that an export brings is elastune's own.

To prove or to time an export is to run it, and some formats are run by Python files of the folder.
Those that elastune writes are known to the letter; any others are run only for who trusts them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from elastune.errors import BadArtifact, ElastuneError, UnsupportedModel
from elastune.export import nemotron_nas_config
from elastune.files import read_json
from elastune.models.families import HETERO_PREFIX
from elastune.models.registration import family_classes

_VERSION = re.compile(r"^Written by elastune [^;]*;", re.MULTILINE)
_FOR_WHO_TRUSTS = "export it again, or --trust-remote-code if you have read that code and trust it"


def refuse_code(folder: Path, format: str, *, trust_remote_code: bool = False) -> None:
    """Make sure that running an export runs no Python of others.

    Args:
        folder: of the export, or of a checkpoint.
        format: of the export.
        trust_remote_code: run what the folder brings.

    Raises:
        ElastuneError: it brings code that this elastune would not have written, or is of a kind
            that cannot be told from code.
    """
    if trust_remote_code:
        return
    if format == "torch-export":
        raise ElastuneError(
            f"{folder} is a torch.export archive, and loading one can run code that it holds",
            try_="--trust-remote-code if it is you who exported it",
        )
    if format == "nemotron-nas":
        _refuse_changed(folder / "configuration_decilm.py", _text_of(nemotron_nas_config))
    elif format == "hf-hetero":
        _refuse_other_classes(folder)


def is_own(folder: Path) -> bool:
    """Tell whether a checkpoint has its classes from a modelling file that elastune wrote."""
    try:
        config = read_json(folder / "config.json")
        if not isinstance(config, dict) or "auto_map" not in config:
            return False
        _refuse_other_classes(folder)
    except ElastuneError:
        return False
    return True


def _refuse_other_classes(folder: Path) -> None:
    """Raise unless config.json and the modelling file are what elastune writes for the family."""
    config = read_json(folder / "config.json")
    model_type = str(config.get("model_type")) if isinstance(config, dict) else ""
    try:
        classes = family_classes(model_type.removeprefix(HETERO_PREFIX))
    except UnsupportedModel:
        classes = None
    if classes is None or config.get("auto_map", classes.auto_map()) != classes.auto_map():
        raise _foreign(folder, "config.json, which names classes of other files")
    _refuse_changed(folder / classes.file_name, classes.source())


def _refuse_changed(file: Path, own: str) -> None:
    try:
        found = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadArtifact(f"{file} cannot be read: {error}", try_="export it again") from error
    if _VERSION.sub("", found) != _VERSION.sub("", own):
        raise _foreign(file.parent, file.name)


def _foreign(folder: Path, what: str) -> ElastuneError:
    return ElastuneError(
        f"{folder} brings Python code that this elastune did not write ({what}), which is not run",
        try_=_FOR_WHO_TRUSTS,
    )


def _text_of(module: Any) -> str:
    return Path(module.__file__).read_text(encoding="utf-8")
