"""The notebooks run from top to bottom without a hub, and are kept without outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
FILES = sorted(NOTEBOOKS.glob("*.ipynb"))

#: In a process of its own: the kernel's libraries warn of what is not ours to mend.
RUN = """
import sys, nbformat
from nbclient import NotebookClient
book = nbformat.read(sys.argv[1], as_version=4)
nbformat.validate(book)
where = {"metadata": {"path": sys.argv[2]}}
NotebookClient(book, timeout=300, kernel_name="python3", resources=where).execute()
nbformat.write(book, sys.argv[3])
"""


def code_cells(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_there_are_notebooks() -> None:
    assert [path.stem for path in FILES] == ["search_and_extract", "shears_tiny"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    for cell in code_cells(path):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.e2e
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_notebooks_run_from_top_to_bottom(path: Path, tmp_path: Path) -> None:
    done_file = tmp_path / "done.ipynb"
    own = {"IPYTHONDIR": "ipython", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_CONFIG_DIR": "own"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), str(NOTEBOOKS), str(done_file)],
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
        | {name: str(tmp_path / folder) for name, folder in own.items()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    outputs = [cell["outputs"] for cell in code_cells(done_file)]
    assert all(outputs), "every cell of code shows something"
