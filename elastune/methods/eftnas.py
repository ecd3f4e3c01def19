"""EFTNAS (Munoz et al., LREC-COLING 2024): the search space made from first-order importance.

1. Heads and feed-forward channels are scored to first order: how much the loss changes without
   them, learned in a fine-tuning run (movement pruning) or at once (section 3.1).
2. One threshold on all scores for each of a few budgets gives as many sub-networks; together they
   are the search space. The best come first in every half of a block (section 3.2).
3. All weights of the super-network train: the largest, a random and the smallest sub-network in
   every step, each taught by a model fine-tuned on the task (section 3.3).
4. Sub-networks are searched for on examples cut from the training set (section 3.4).

Beyond the paper: any family, decoders too; blocks that no budget keeps leave the model; what is
chosen leaves as a plain smaller model; the same sizes are trained alone, as a baseline; nothing is
searched on what is reported.
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


def eftnas(run: Run) -> None:
    """Run the whole method; stages that are done are skipped."""
    make_base(run)
    train_supernet(run)
    train_baselines(run)
    allocate_budgets(run)
    search(run)
    train_alone(run)
    measure(run)
    extract_chosen(run)
