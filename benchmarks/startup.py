"""How long a user waits before anything happens: importing the package, and asking for help.

Each is done by fresh interpreters, one after another; figures are medians of wall time.

- import_s: `import elastune`, the interpreter's own start not included. Goal 0.3 s.
- help_s: `elastune --help`, from the command to its end. Goal 0.5 s.
- torch_imported: whether either of them imported torch, which alone takes seconds. Goal 0.

    python benchmarks/startup.py [--quick] [--repeats 15]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

_IMPORT = """
import sys, time
started = time.perf_counter()
import elastune
print(time.perf_counter() - started, int("torch" in sys.modules))
"""
# The command's own entry point, so that what it imports can be asked for at its end.
_HELP = """
import sys
from elastune.cli import app
sys.argv = ["elastune", "--help"]
try:
    app()
finally:
    print(int("torch" in sys.modules), file=sys.stderr)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="5 repeats")
    args = parser.parse_args()
    imports, helps = [], []
    torch_imported = False
    for number in range((5 if args.quick else args.repeats) + 1):
        seconds, torch_then = _python(_IMPORT).stdout.split()
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "elastune", "--help"], check=True, capture_output=True
        )
        took = time.perf_counter() - started
        torch_imported |= torch_then == "1"
        if number:  # the first reads files that later ones find in memory
            imports.append(float(seconds))
            helps.append(took)
    torch_imported |= _python(_HELP).stderr.strip().endswith("1")
    figures = {
        "import_s": statistics.median(imports),
        "import_s_max": max(imports),
        "help_s": statistics.median(helps),
        "help_s_max": max(helps),
        "torch_imported": int(torch_imported),
    }
    print(f"import {figures['import_s']:.3f} s, --help {figures['help_s']:.3f} s (medians)")
    print(json.dumps({"benchmark": "startup", "figures": figures}))


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


if __name__ == "__main__":
    main()
