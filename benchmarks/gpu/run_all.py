"""All benchmarks for a GPU, one after another, within ten minutes; their output as it comes.

Each has a limit of time, and one that fails or is cut off stops nobody. Options that this script
does not know go to every script. The last line is one JSON object of all figures.

    python benchmarks/gpu/run_all.py [--out build/bench-gpu] [--quick] [--device cpu ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SCRIPTS = {"latency": 100, "train_step": 180, "sparsify": 290}
"""Name -> seconds after which it is cut off; in the order they run in."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench-gpu"))
    args, others = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name, limit in SCRIPTS.items():
        started = time.monotonic()
        print(f"== {name}", flush=True)
        log = args.out / f"{name}.log"
        with log.open("w", encoding="utf-8") as file:
            try:
                code: int | str = subprocess.run(
                    [sys.executable, str(HERE / f"{name}.py"), *others],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"cut off after {limit} s"
        text = log.read_text(encoding="utf-8", errors="replace")
        print(text[-4000:])
        found[name] = _answer(text) if code == 0 else {"error": code}
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        (args.out / "gpu.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(json.dumps({"benchmark": "gpu", "figures": found}))
    sys.exit(1 if any("error" in answer for answer in found.values()) else 0)


def _answer(text: str) -> dict[str, Any]:
    """Return the figures of a script's last line, or why it was skipped."""
    row = json.loads(text.strip().splitlines()[-1])
    return row["figures"] or {"skipped": row.get("skipped")}


if __name__ == "__main__":
    main()
