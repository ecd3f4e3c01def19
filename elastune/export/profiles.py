"""What exports take, side by side: disk, loading, reading a prompt, generating, memory.

Each export runs in a fresh process by the runtime that it is for. Rounds go through all of them in
turn, so that a machine that drifts drifts for all, and ratios are taken within a round.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastune.errors import BadArtifact, ElastuneError
from elastune.export import profile_run
from elastune.export.foreign import is_own, refuse_code
from elastune.export.runtimes import RUNTIME_FORMATS, refuse_settings
from elastune.export.source import base_of, check_adapter, is_adapter
from elastune.files import holding, read_json

_MB = 2**20
_NOT_SHIPPED = ("reference.safetensors", "README.md")
"""Files of an export that no runtime reads."""


@dataclass(frozen=True)
class ExportProfile:
    """What one export takes.

    Attributes:
        name: of its folder or file.
        runtime: the package that ran it.
        disk_mb: of all files that are needed to run it, in MB of 2**20 bytes; of an adapter
            with its base.
        load_s: from the files to a model that is ready; the runtime was imported before.
        prefill_tokens_per_s: of a prompt, one sequence.
        decode_tokens_per_s: after it; None for models that generate nothing.
        peak_memory_mb: of the whole process, the runtime's own libraries included.
        prefill_speed_up: times as fast as the first export, the median over rounds.
        decode_speed_up: likewise; None where either generates nothing.
    """

    name: str
    runtime: str
    disk_mb: float
    load_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    peak_memory_mb: float
    prefill_speed_up: float
    decode_speed_up: float | None


def profile_exports(
    exports: Sequence[str | Path],
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    threads: int | None = None,
    rounds: int = 3,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[ExportProfile]:
    """Measure exports in turns; the first is what the others are compared with.

    Args:
        exports: folders of checkpoints (``hf...``, with or without an adapter beside the model), of
            adapters, of graphs for other runtimes, or GGUF files.
        prompt_tokens: length of the prompt; encoders read a text of that length.
        new_tokens: generated after it.
        threads: of every runtime; all processors by default.
        rounds: each a fresh process for every export.
        trust_remote_code: run code that an export brings and that this elastune would not have
            written, and load torch.export archives, which can hold code. Off by default.
        progress: called with (processes done, processes in all).

    Raises:
        BadArtifact: nothing there that a runtime could load.
        ElastuneError: a runtime refused an export, with its last words; or it brings code.
    """
    places = [Path(export).absolute() for export in exports]
    runtimes = [runtime_of(place) for place in places]
    # An adapter is no use without its base, which may be gone.
    bases = [base_of(place) if is_adapter(place) else None for place in places]
    runs_code = [_runs_code(place, trust_remote_code) for place in places]
    options = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "threads": threads or os.cpu_count() or 1,
        "repeats": 2,
    }
    found: list[list[dict[str, Any]]] = [[] for _ in places]
    for turn in range(rounds):
        for number, place in enumerate(places):
            mine = options | {"runs_code": runs_code[number]}
            found[number].append(_measured(place, mine))
            if progress is not None:
                progress(turn * len(places) + number + 1, rounds * len(places))
    return [
        ExportProfile(
            name=name,
            runtime=runtime,
            disk_mb=round((_bytes_of(place) + (_bytes_of(base) if base else 0)) / _MB, 2),
            load_s=_median(own, "load_s"),
            prefill_tokens_per_s=prompt_tokens / _median(own, "prefill_s"),
            decode_tokens_per_s=_per_second(new_tokens, own),
            peak_memory_mb=_median(own, "peak_mb"),
            prefill_speed_up=_speed_up(found[0], own, "prefill_s") or 0.0,
            decode_speed_up=_speed_up(found[0], own, "decode_s"),
        )
        for name, place, base, runtime, own in zip(
            names_of(places), places, bases, runtimes, found, strict=True
        )
    ]


def names_of(places: Sequence[Path]) -> list[str]:
    """Return what to call exports: the last parts of their paths, as many as tell them apart."""
    for count in range(1, max((len(place.parts) for place in places), default=0)):
        names = ["/".join(place.parts[-count:]) for place in places]
        if len(set(names)) == len(set(places)):
            return names
    return [str(place) for place in places]


def runtime_of(place: Path) -> str:
    """Return the package that runs an export.

    Raises:
        BadArtifact: it is no export.
    """
    if place.suffix == ".gguf" and place.is_file():
        return "llama.cpp"
    if place.is_dir():
        if any(place.glob("*.gguf")):
            return "llama.cpp"
        if (place / "export.json").is_file():
            record = place / "export.json"
            with holding(record):
                about = dict(read_json(record))
                format, runtime = str(about["format"]), str(about["runtime"])
            if format == "nemotron-nas":
                raise BadArtifact(
                    f"{place} is for vLLM, which is not run here",
                    try_="the same sub-network as another format, such as hf-hetero or gguf",
                )
            if format in RUNTIME_FORMATS:
                refuse_settings(place, about)
            elif runtime != "transformers":
                raise BadArtifact(
                    f"{place} is an export of format {format}, which is not known",
                    try_="elastune check takes an export of any format",
                )
            return runtime
        if any((place / name).is_file() for name in ("config.json", "adapter_config.json")):
            return "transformers"
    raise BadArtifact(
        f"{place} is no export: no folder with config.json, export.json or a .gguf file, and no "
        ".gguf file either",
        try_="a folder under RUN/subnets or RUN/export",
    )


def _runs_code(place: Path, trust_remote_code: bool) -> bool:
    """Tell whether a checkpoint's own Python is to be run; see that it may be.

    Raises:
        ElastuneError: the export brings code of others.
    """
    if place.is_file() or any(place.glob("*.gguf")):
        return False
    for adapter in (place, place / "adapter"):
        if is_adapter(adapter):
            check_adapter(adapter)
    if (place / "export.json").is_file():
        name = str(read_json(place / "export.json")["format"])
        refuse_code(place, name, trust_remote_code=trust_remote_code)
        if name in RUNTIME_FORMATS:
            return False
    return trust_remote_code or is_own(base_of(place) if is_adapter(place) else place)


def _measured(place: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Run one export in a fresh process; each time is the best of its repeats."""
    environment = os.environ | {"OMP_NUM_THREADS": str(options["threads"])}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answer.json"
        done = subprocess.run(
            [sys.executable, "-P", profile_run.__file__, str(place), json.dumps(options), str(out)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        if done.returncode != 0 or not out.exists():
            lines = done.stderr.strip().splitlines()
            said = lines[-1] if lines else f"exit code {done.returncode}"
            raise ElastuneError(f"{place} cannot be run: {said}", try_="export it again")
        answer: dict[str, Any] = read_json(out)
    for name in ("prefill_s", "decode_s"):
        answer[name] = min(answer[name], default=None)
    return answer


def _bytes_of(place: Path) -> int:
    if place.is_file():
        return place.stat().st_size
    files = (p for p in place.rglob("*") if p.is_file() and p.name not in _NOT_SHIPPED)
    return sum(file.stat().st_size for file in files)


def _median(rounds: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.median(one[name] for one in rounds)


def _per_second(tokens: int, rounds: Sequence[dict[str, Any]]) -> float | None:
    if tokens == 0 or any(one["decode_s"] is None for one in rounds):
        return None
    return tokens / _median(rounds, "decode_s")


def _speed_up(
    first: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]], name: str
) -> float | None:
    pairs = list(zip(first, own, strict=True))
    if any(not a[name] or not b[name] for a, b in pairs):
        return None
    return statistics.median(a[name] / b[name] for a, b in pairs)
