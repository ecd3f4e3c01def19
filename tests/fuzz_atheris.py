"""Coverage-guided fuzzing of what is parsed in Python; needs atheris, which the tests do not.

Run as ``python tests/fuzz_atheris.py TARGET -max_total_time=60``, after ``pip install atheris``
(Linux and macOS). It ends with a traceback at the first input that is neither read nor refused.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["elastune", "yaml"]):
    from elastune.config import apply_override, make_recipe
    from elastune.errors import BadRecipe, ElastuneError
    from elastune.models.gguf_header import check_gguf_header
    from elastune.search.limits import parse_limits, resolve
    from elastune.space import SearchSpace, SubnetConfig
    from elastune.tasks.sources import read_rows
    from elastune.yaml_text import parse_yaml

FOLDER = Path(tempfile.mkdtemp())


def recipe(data: bytes) -> None:
    import yaml

    try:
        found = parse_yaml(data.decode("utf-8", "replace"))
    except yaml.YAMLError as error:
        raise BadRecipe(str(error)) from error
    if isinstance(found, dict):
        make_recipe({"model": "m", "task": "gsm8k", **found}, "fuzz")


def limit(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    for one in parse_limits(text):
        assert parse_limits(str(one)) == (one,)
    resolve(text, {"dense": {"params": 1e8, "latency_ms": 3.0}})


def override(data: bytes) -> None:
    apply_override({"model": "m", "task": "gsm8k"}, data.decode("utf-8", "replace"))


def space(data: bytes) -> None:
    import json

    text = data.decode("utf-8", "replace")
    SubnetConfig.from_json(text)
    SearchSpace.from_dict({"dims": [{"name": "a", "kind": "rank", **json.loads(text)}]})


def gguf(data: bytes) -> None:
    file = FOLDER / "m.gguf"
    file.write_bytes(b"GGUF\x03\0\0\0" + data)
    try:
        check_gguf_header(file)
    except ValueError as error:
        raise BadRecipe(str(error)) from error


def rows(suffix: str) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        file = FOLDER / f"rows{suffix}"
        file.write_bytes(data)
        read_rows(file)

    return read


TARGETS: dict[str, Callable[[bytes], None]] = {
    "recipe": recipe,
    "limit": limit,
    "override": override,
    "space": space,
    "gguf": gguf,
    "jsonl": rows(".jsonl"),
    "csv": rows(".csv"),
}


def main() -> None:
    """Fuzz one target until its time is over."""
    target = TARGETS[sys.argv.pop(1)]

    def one(data: bytes) -> Any:
        try:
            target(data)
        except ElastuneError:
            return

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
