"""The promised names: lazy, complete and documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import elastune as et


@pytest.mark.parametrize("name", et.__all__)
def test_every_promised_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(et, name)
    assert not inspect.ismodule(value)
    if name != "__version__":
        assert callable(value)
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"
        assert value.__name__ == name


def test_promised_names_are_sorted_listed_and_typed() -> None:
    assert sorted(et.__all__, key=lambda name: (name[0] != name[0].upper(), name)) == et.__all__
    assert dir(et) == sorted(et.__all__)
    tree = ast.parse(Path(et.__file__).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {
        a.name for b in blocks for n in b.body if isinstance(n, ast.ImportFrom) for a in n.names
    }
    assert typed | {"__version__"} == set(et.__all__)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import elastune, sys; print(sorted({'torch', 'transformers', 'optuna'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_functions_are_not_shadowed_by_the_files_they_live_in() -> None:
    for name in ("train", "search", "evaluate", "extract", "generate"):
        importlib.import_module(f"elastune.{name}")
        assert inspect.isfunction(getattr(et, name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = et.trian  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(n for n in et.__all__ if n[0].islower()))
def test_docstrings_begin_with_one_imperative_line(name: str) -> None:
    first, *rest = inspect.getdoc(getattr(et, name)).splitlines()  # type: ignore[union-attr]
    assert first.endswith(".")
    assert not rest or rest[0] == ""
    assert not first.split()[0].endswith("s"), f"{name}: {first}"
