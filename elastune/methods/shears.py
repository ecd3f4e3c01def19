"""Shears (Munoz et al., NAACL 2024): a sparse base, an elastic adapter, and a choice of its parts.

1. Wanda zeroes a share of the frozen base's weights (section 3.1).
2. Neural Low-rank adapter Search trains one random sub-adapter a step (section 3.2).
3. A sub-adapter is chosen: the heuristic needs no search (section 3.3).

Beyond the paper: every baseline is trained for the same steps on the same batches and scored on
the same examples.
"""

from __future__ import annotations

from elastune.choose import extract_chosen
from elastune.measure import measure
from elastune.methods.baselines import train_baselines
from elastune.run import Run
from elastune.search_stage import search
from elastune.stages import sparsify, train_supernet


def shears(run: Run) -> None:
    """Run the whole method; stages that are done are skipped."""
    sparsify(run)
    train_supernet(run)
    train_baselines(run)
    search(run)
    measure(run)
    extract_chosen(run)
