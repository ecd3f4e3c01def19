"""SQFT (Munoz et al., EMNLP Findings 2024): adapters that merge without losing a zero, or the grid.

1. Wanda zeroes a share of the frozen base's weights; for INT4 what is left is quantised (3.1).
2. Neural Low-rank adapter Search trains merged weights: nothing is added where the base is zero
   (SparsePEFT, 3.2), and sums are rounded to the grid of the base (QA-SparsePEFT, 3.3).
3. A sub-adapter is chosen and merged: one sparse, or sparse INT4, model.

Beyond the paper: gradients from a sample of the tokens, so that a step costs about what an
unmerged one does; every merge is counted zero by zero; every baseline is trained for the same
steps on the same batches.
"""

from __future__ import annotations

from elastune.choose import extract_chosen
from elastune.measure import measure
from elastune.methods.baselines import train_baselines
from elastune.run import Run
from elastune.search_stage import search
from elastune.stages import sparsify, train_supernet


def sqft(run: Run) -> None:
    """Run the whole method; stages that are done are skipped."""
    sparsify(run)
    train_supernet(run)
    train_baselines(run)
    search(run)
    measure(run)
    extract_chosen(run)
