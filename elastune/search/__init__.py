"""Search over sub-networks: one algorithm, one file, behind one ``propose``."""

from __future__ import annotations

from collections.abc import Mapping

from elastune.search import (
    auto,
    exhaustive,
    heuristic,
    hill_climb,
    milp,
    nsga2,
    random_search,
    rnsga2,
    tpe,
)
from elastune.search.base import Known, Measurement, Objective, Propose, SearchResult, Trial
from elastune.search.engine import search
from elastune.search.surrogate import Additivity, additivity

ALGORITHMS: Mapping[str, Propose] = {
    "auto": auto.propose,
    "exhaustive": exhaustive.propose,
    "heuristic": heuristic.propose,
    "hill_climb": hill_climb.propose,
    "milp": milp.propose,
    "nsga2": nsga2.propose,
    "random": random_search.propose,
    "rnsga2": rnsga2.propose,
    "tpe": tpe.propose,
}

__all__ = [
    "ALGORITHMS",
    "Additivity",
    "Known",
    "Measurement",
    "Objective",
    "Propose",
    "SearchResult",
    "Trial",
    "additivity",
    "search",
]
