"""Where benchmarks find data: --data, else ../shared/data beside the checkout, else the hub."""

from __future__ import annotations

import argparse
from pathlib import Path

_BESIDE = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """Add --data; None means that data sets come from the hub."""
    default = _BESIDE if _BESIDE.is_dir() else None
    parser.add_argument("--data", type=Path, default=default, help="folder of local data sets")
