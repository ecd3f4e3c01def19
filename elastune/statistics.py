"""Standard errors, and whether two systems differ on the same examples."""

from __future__ import annotations

import math
from collections.abc import Sequence

from elastune.metrics import Metric, Record


def stderr(metric: Metric, records: Sequence[Record]) -> float:
    """Return one standard error of ``metric``: by its formula, else by the bootstrap."""
    if metric.stderr is not None:
        return metric.stderr(*metric.arrays(records))
    return math.nan
