"""How sub-networks are looked for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from elastune.sections.base import Section, listed

Cost = Literal[
    "params", "nonzero", "macs", "block_macs", "decode_macs", "latency_ms", "decode_latency_ms"
]


class SearchConfig(Section):
    """How sub-networks are looked for, on the validation examples (docs/search.md)."""

    algorithm: Literal[
        "auto",
        "exhaustive",
        "heuristic",
        "hill_climb",
        "milp",
        "nsga2",
        "random",
        "rnsga2",
        "tpe",
    ] = "auto"
    """auto: knapsacks over single-choice losses first, then evolution guided by what they and the
    trials so far say."""
    trials: int = Field(12, ge=0)
    """Configurations to score; heuristic, largest and smallest come before those of the algorithm.
    """
    objective: Literal["loss", "score"] = "loss"
    """Mean loss of the right answers, or the task's own metric."""
    cost: Cost = "params"
    """What is minimised beside it; MACs are of a pass over ``evaluate.macs_length`` tokens, block
    MACs those without embedding and head; latencies come from a table measured once here."""
    losses: Literal["estimated", "measured"] | None = None
    """Where the single-choice losses that auto and milp begin with come from: all from a backward
    pass over ``structure.probes`` validation examples, in about 16 sub-networks of all sizes (the
    default), or each from forward passes of its own beside the largest."""
    limits: Annotated[list[str], BeforeValidator(listed)] = []
    """What the best sub-network must keep, such as ["latency<=60%", "score>=dense-1.0"]."""
    population: int = Field(40, ge=2)
    """Trials of a generation (nsga2, rnsga2)."""
    reference_points: list[list[float]] = []
    """Aspired quality and cost, for rnsga2: 0 is the best of the front so far, 1 its worst."""
    random: int = Field(6, ge=0)
    """Random sub-networks within the limits whose best is compared with the search's."""
    front: int = Field(4, ge=0)
    """Members of the front, besides the named ones, that are scored on the report examples."""
    race: bool = True
    """Leave a sub-network once a paired test on some of the examples says that it cannot reach the
    front."""
    reuse: bool = True
    """Reuse hidden states in front of the first block that differs, and merged adapters."""
    hours: float | None = Field(None, gt=0)
    """Begin no trial after so many hours."""
    workers: int = Field(1, ge=1)
    """Processes of this machine that search together."""
    storage: str | None = None
    """A database such as postgresql://user@host/name, for searches that several machines share;
    by default a journal in the run directory."""

    @property
    def losses_from(self) -> Literal["estimated", "measured", "nothing"]:
        """Where single-choice losses come from."""
        has_losses = self.algorithm in ("auto", "milp")
        return (self.losses or "estimated") if has_losses else "nothing"

    @model_validator(mode="after")
    def _points_have_two_values(self) -> SearchConfig:
        if any(len(point) != 2 for point in self.reference_points):
            raise ValueError("reference_points are pairs of quality and cost, such as [[0, 0.5]]")
        return self
