"""Hub ids and HF_HOME: what the hub's cache holds loads offline, and what it lacks is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tiny_run import save_tiny_model

CODE = (
    "import elastune as et\nmodel, _ = et.load_model('owner/tiny')\nprint(model.num_parameters())"
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def loaded(home: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Load a hub id as a process does that has no network."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))
    }
    return subprocess.run(
        [sys.executable, "-c", CODE],
        env=environment | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )


def test_a_model_in_the_cache_of_the_hub_loads_offline_and_another_is_told(tmp_path: Path) -> None:
    repo = tmp_path / "home/hub/models--owner--tiny"
    save_tiny_model(repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(COMMIT)
    done = loaded(tmp_path / "home", tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000
    done = loaded(tmp_path / "empty", tmp_path)
    assert done.returncode != 0
    last = done.stderr[done.stderr.index("BadArtifact: ") :]
    assert "no folder 'owner/tiny' here, and the hub gives no model of that name" in last
    assert "try: check the spelling and the network (HF_HUB_OFFLINE must not be set)" in last
