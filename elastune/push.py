"""Upload a finished export to the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from elastune.errors import BadArtifact, BadRecipe, ElastuneError
from elastune.files import holding, read_json, refuse_links_outside, refuse_outside
from elastune.models.checkpoint import check_folder

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKEN = "huggingface-cli login, or HF_TOKEN in the environment"


@dataclass(frozen=True)
class Pushed:
    """An upload.

    Attributes:
        repo_id: ``owner/name``.
        url: of the commit.
        private: whether the repository was asked to be private, should it have been new.
        files: what was uploaded.
        n_bytes: of all files.
    """

    repo_id: str
    url: str
    private: bool
    files: tuple[str, ...]
    n_bytes: int


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Pushed:
    """Upload a folder that `save_subnetwork`, `PeftAdapter.save` or an export wrote, as one commit.

    Args:
        folder: a complete export; others are refused before anything is sent.
        repo_id: ``owner/name``; made where there is none. Files of an older push that are not in
            the folder stay.
        private: of a repository that is made; one that is there stays as it is.
        message: of the commit.
        token: None takes HF_TOKEN of the environment, else that of the hub's login.
        endpoint: None takes HF_ENDPOINT of the environment, else the hub.

    Raises:
        BadArtifact: the folder is no complete export; says what is missing.
        BadRecipe: a repo id of another form, or no token.
        ElastuneError: the hub refused, or cannot be reached.
    """
    folder = Path(folder)
    files = complete_export(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise BadRecipe(f"a repository is named owner/name, got {repo_id!r}: {error}") from error
    if not _REPO_ID.fullmatch(repo_id):
        raise BadRecipe(f"a repository is named owner/name, got {repo_id!r}")
    token = token or get_token()
    if not token:
        raise BadRecipe("there is no token to upload with", try_=_TOKEN)
    api = HfApi(endpoint=endpoint, token=token, library_name="elastune")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        # Not upload_folder, which may cut a large folder into several commits.
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, folder / name) for name in files],
            commit_message=message or f"Upload {folder.resolve().name}",
        )
    except HfHubHTTPError as error:
        raise _refused(error, repo_id) from error
    except RuntimeError as error:  # how a file that could not be sent is told
        raise ElastuneError(
            f"{error} ({error.__cause__ or 'no reason given'}); nothing was committed",
            try_="push again: what was sent is not sent twice",
        ) from error
    except (HTTPError, OSError) as error:
        raise ElastuneError(
            f"{api.endpoint} cannot be reached: {error}",
            try_="check the network; HF_HUB_OFFLINE must not be set",
        ) from error
    n_bytes = sum((folder / name).stat().st_size for name in files)
    return Pushed(repo_id, str(commit.commit_url), private, files, n_bytes)


def _refused(error: HfHubHTTPError, repo_id: str) -> ElastuneError:
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return ElastuneError(
            f"the hub does not let this token write to {repo_id} ({status})",
            try_=f"a token with the right to write: {_TOKEN}",
        )
    said = error.server_message or str(error).splitlines()[0]
    return ElastuneError(
        f"the hub refused the upload to {repo_id}: {said}",
        try_="a token with the right to write there: HF_TOKEN, or the hub's login",
    )


def complete_export(folder: str | Path) -> tuple[str, ...]:
    """Return the files of a complete export: one whose README.md and weights are all there.

    Raises:
        BadArtifact: not a folder, no export, or one that lacks something; says what.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadArtifact(f"there is no folder {str(folder)!r}", try_="the folder of an export")
    is_run = (folder / "recipe.yaml").is_file() and (folder / "manifest.json").is_file()
    if is_run:
        raise BadArtifact(
            f"{str(folder)!r} is a run directory, not an export",
            try_="one of the folders under subnets/, or what `elastune extract` wrote",
        )
    refuse_links_outside(folder)
    if not _check_weights(folder):
        raise BadArtifact(
            f"{str(folder)!r} is no export: it has no config.json, adapter_config.json, "
            "export.json or .gguf file",
            try_="the folder that `elastune extract` wrote",
        )
    if not (folder / "README.md").is_file():
        raise BadArtifact(
            f"{str(folder)!r} has no README.md, so nobody could tell what it is",
            try_="write it again: exports come with a model card",
        )
    found = [p for p in folder.rglob("*") if p.is_file()]
    return tuple(
        sorted(p.relative_to(folder).as_posix() for p in found if not _is_left_over(p, folder))
    )


def _is_left_over(file: Path, folder: Path) -> bool:
    parts = file.relative_to(folder).parts
    hidden = any(p.startswith(".") and p != ".gitattributes" for p in parts)
    return hidden or "__pycache__" in parts or file.suffix in (".partial", ".lock")


def _check_weights(folder: Path) -> bool:
    """Check the files of every form of export that is there; False where there is none."""
    checks = {
        "adapter_config.json": _check_adapter,
        "export.json": _check_runtime,
        "config.json": check_folder,
    }
    for name, check in checks.items():
        if (folder / name).is_file():
            check(folder)
            if (folder / "adapter" / "adapter_config.json").is_file():
                _check_adapter(folder / "adapter")
            return True
    ggufs = list(folder.glob("*.gguf"))
    for file in ggufs:
        _check_gguf(file)
    return bool(ggufs)


def _check_adapter(folder: Path) -> None:
    read_json(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise BadArtifact(f"{file} is missing", try_="write the adapter again")
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise BadArtifact(
            f"{file} is truncated or corrupt: {error}", try_="export it again"
        ) from error
    if not names:
        raise BadArtifact(f"{file} holds no tensors", try_="write the adapter again")


def _check_runtime(folder: Path) -> None:
    """Check an export for a runtime: the files that its record names."""
    with holding(folder / "export.json"):
        about = dict(read_json(folder / "export.json"))
        named: Sequence[str] = [
            *(about.get("sha256") or ()),
            *([about["file"]] if "file" in about else []),
        ]
    refuse_outside(folder, named)
    lost = [name for name in dict.fromkeys(named) if not (folder / name).is_file()]
    if lost:
        raise BadArtifact(f"{folder} lacks {', '.join(lost)}", try_="export it again")


def _check_gguf(file: Path) -> None:
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise BadArtifact(f"{file} is no GGUF file", try_="export it again")
