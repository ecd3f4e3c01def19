"""LoNAS (Munoz et al., LREC-COLING 2024): elastic adapters on an elastic frozen base.

1. The base's widths (heads, depth) become elastic by taking their first parts (section 3); the base
   stays frozen, and the adapter learns to make up for what is cut off.
2. One random sub-network trains a step.
3. Sub-networks are chosen: the heuristic, by search, and for budgets.

Beyond the paper: heads and channels are sorted by importance first, so that the part that is kept
is the best; what is chosen leaves as a plain smaller model; every baseline is trained for the same
steps on the same batches. ``train.update: full`` trains the base, too.
"""

from __future__ import annotations

from elastune.alone import train_alone
from elastune.budgets import allocate_budgets
from elastune.choose import extract_chosen
from elastune.measure import measure
from elastune.methods.baselines import train_baselines
from elastune.prepare import make_base
from elastune.run import Run
from elastune.search_stage import search
from elastune.stages import train_supernet


def lonas(run: Run) -> None:
    """Run the whole method; stages that are done are skipped."""
    make_base(run)
    train_supernet(run)
    train_baselines(run)
    allocate_budgets(run)
    search(run)
    train_alone(run)
    measure(run)
    extract_chosen(run)
