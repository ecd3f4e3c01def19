"""Configuration -> numbers to be minimised: the quality on validation examples, and the cost.

What makes it cheap, each to be switched off: configurations that are the same network share one
measurement; hidden states in front of the first difference are used again; adapters are added to
the weights for a while; and candidates that a rival surely beats are dropped early.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from elastune.block_choices import Effective, EffectiveChoices
from elastune.cost import Cost
from elastune.evaluate import evaluate
from elastune.merged import MergedAdapters
from elastune.outcomes import Answers, HeadLosses, Outcomes, TokenLosses, is_mean
from elastune.prefix_reuse import PrefixReuse
from elastune.race import ERROR_RATE, RUNGS, is_worse, rung_ends
from elastune.search.base import Measurement, Trial
from elastune.space import SubnetConfig
from elastune.supernet import SuperNetwork
from elastune.tasks import Task
from elastune.tasks.base import AnyExample, Score

Costs = Callable[[SubnetConfig], Cost | Mapping[str, float]]
"""Configuration -> what it costs, by name; such as a `CostModel`."""


def make_objective(
    net: SuperNetwork,
    tokenizer: Any,
    task: Task,
    examples: Sequence[AnyExample],
    cost: Costs,
    *,
    kind: Literal["loss", "score"],
    against: str = "params",
    batch_tokens: int = 8192,
    cache: bool = True,
    reuse: bool = True,
    prefix_mb: int = 2048,
    merge: bool = True,
    race: bool = True,
    error_rate: float = ERROR_RATE,
    rungs: Sequence[float] = RUNGS,
) -> tuple[ValidationObjective, tuple[str, ...]]:
    """Return an objective and the names of its two values, quality first.

    What the objective measures holds every other count of the `Cost`, too, by its name, and for a
    score the score itself, as ``score``. None of the switches changes a whole measurement by more
    than rounding.

    Args:
        net: activated for each measurement, and put back. Its weights must stay as they are while
            the objective is in use.
        tokenizer: of the model.
        task: that the examples belong to.
        examples: the validation split; never the one that is reported.
        cost: counts what a configuration costs.
        kind: ``"loss"``, the mean loss of the right answers (one forward pass; in nats per token
            for language models), or ``"score"``, the task's first metric (turned into an error to
            minimise).
        against: the cost that is minimised beside the quality.
        batch_tokens: tokens in a batch.
        cache: remember what was measured.
        reuse: share work between sub-networks: ``prefix_mb`` and ``merge``; False is neither.
        prefix_mb: memory for hidden states to be used again, in MiB; 0 switches that off.
        merge: add adapters to copies of the float32 weights, while they are evaluated.
        race: let `ValidationObjective.measure` drop candidates early; only of losses and of scores
            that are means over examples.
        error_rate: of candidates as good as their rival, the part that a race may drop.
        rungs: parts of the examples after which candidates are compared, ascending to 1.

    Raises:
        BadData: there is nothing to score in the examples.
        BadRecipe: rungs that do not ascend to 1.
    """
    outcomes = _outcomes(net, tokenizer, task, examples, kind, batch_tokens)

    def whole() -> Score:
        return evaluate(net.model, tokenizer, task, examples, batch_tokens=batch_tokens)

    n = len(examples)
    objective = ValidationObjective(
        net,
        cost,
        outcomes or whole,
        n,
        is_score=kind == "score",
        higher_is_better=kind == "score" and task.higher_is_better,
        ends=rung_ends(n, rungs) if race and outcomes is not None else (n,),
        error_rate=error_rate,
        prefix=PrefixReuse(net, prefix_mb) if reuse and prefix_mb > 0 else None,
        merged=MergedAdapters(net.adapters.values()) if reuse and merge else None,
        remembers=cache,
    )
    return objective, (objective.quality, against)


def _outcomes(
    net: SuperNetwork,
    tokenizer: Any,
    task: Task,
    examples: Sequence[AnyExample],
    kind: str,
    batch_tokens: int,
) -> Outcomes | None:
    """Return what measures single examples; None where only all of them have a score."""
    if kind == "score":
        metric = task.metrics[0]
        if not is_mean(metric) or not examples:
            return None
        return Answers(net.model, tokenizer, task, examples, metric, batch_tokens)
    if task.head == "causal-lm":
        return TokenLosses(net.model, tokenizer, examples, batch_tokens)
    return HeadLosses(net.model, tokenizer, task, examples, batch_tokens)


@dataclass
class _Seen:
    """What has been measured of one network."""

    outcomes: np.ndarray
    """``(examples,)``, NaN where not looked at."""
    n_seen: int = 0
    """Examples looked at, in the order of the race."""
    score: Score | None = None
    """Where only all examples together have one."""


class ValidationObjective:
    """Measures the quality of sub-networks on validation examples; a `RacingObjective`.

    Made by `make_objective`.

    Attributes:
        quality: name of the first value, ``"loss"`` or ``"error"``.
        ends: examples seen after each rung of a race.
        prefix: the hidden states that are used again.
        merged: the merged adapters.
    """

    def __init__(
        self,
        net: SuperNetwork,
        cost: Costs,
        source: Outcomes | Callable[[], Score],
        n_examples: int,
        *,
        is_score: bool,
        higher_is_better: bool,
        ends: tuple[int, ...],
        error_rate: float,
        prefix: PrefixReuse | None,
        merged: MergedAdapters | None,
        remembers: bool,
    ) -> None:
        self.quality = "error" if is_score else "loss"
        self.ends = ends
        self.prefix = prefix
        self.merged = merged
        self._net = net
        self._cost = cost
        self._source = source
        self._is_score = is_score
        self._higher_is_better = higher_is_better
        self._error_rate = error_rate
        self._remembers = remembers
        self._effective = EffectiveChoices(net)
        self._seen: dict[Effective, _Seen] = {}
        # One order for all, so that any two have seen the same examples.
        self._order = np.random.default_rng(0).permutation(n_examples)
        self._full_macs = self._costs(net.space.largest()).get("block_macs", 0.0)

    def __call__(self, config: SubnetConfig) -> Mapping[str, float]:
        """Return the quality on all examples, the costs, and of a score the score itself."""
        return self.measure(config, ()).values

    def measure(self, config: SubnetConfig, rivals: Sequence[Trial]) -> Measurement:
        """Measure, until it is clear that a rival is better and no dearer; else on all examples.

        The rival is the best of those that cost no more in any value and miss no limit: whoever
        is as good as that one is as good as all of them. One that is dropped has an estimate for
        its quality: the rival's, plus the mean difference so far.

        Args:
            config: of the super-network's space.
            rivals: trials of this objective; those without outcomes are passed over.
        """
        costs = self._costs(config)
        choices = self._effective(config)
        seen = self._seen.get(choices) or _Seen(np.full(len(self._order), np.nan))
        if self._remembers:
            self._seen[choices] = seen
        rival = self._strongest(costs, rivals) if len(self.ends) > 1 else None
        work = 0.0
        for stop in self.ends:
            if seen.n_seen < stop:
                work += self._look(config, seen, stop)
            if rival is None or seen.n_seen == len(self._order):
                continue
            shared = self._order[:stop]
            differences = seen.outcomes[shared] - cast(np.ndarray, rival.outcomes)[shared]
            if is_worse(differences, self._error_rate / (len(self.ends) - 1)):
                estimate = rival.values[self.quality] + float(differences.mean())
                return self._measurement(estimate, costs, seen, work, dropped=True)
        return self._measurement(self._whole(seen), costs, seen, work)

    def _look(self, config: SubnetConfig, seen: _Seen, stop: int) -> float:
        """Look at the examples up to ``stop``; return the part of all the work that this took."""
        part = self._order[seen.n_seen : stop]
        with ExitStack() as stack:
            stack.enter_context(self._net.active(config))
            if self.merged is not None:
                stack.enter_context(self.merged.in_force())
            if self.prefix is not None:
                stack.enter_context(self.prefix.using(config))
            if len(self.ends) == 1 and not isinstance(self._source, _PER_EXAMPLE):
                seen.score = cast(Callable[[], Score], self._source)()
            else:
                seen.outcomes[part] = cast(Outcomes, self._source)(part.tolist())
        seen.n_seen = stop
        share = 1.0 if self.prefix is None else self.prefix.take_share()
        return share * len(part) / len(self._order)

    def _whole(self, seen: _Seen) -> float:
        """Return the quality on all examples."""
        if seen.score is None:
            return float(seen.outcomes.mean())
        return 1 - seen.score.value if self._higher_is_better else seen.score.value

    def _measurement(
        self,
        quality: float,
        costs: Mapping[str, float],
        seen: _Seen,
        work: float,
        *,
        dropped: bool = False,
    ) -> Measurement:
        values = {self.quality: quality}
        if self._is_score:
            values["score"] = 1 - quality if self._higher_is_better else quality
        size = costs["block_macs"] / self._full_macs if self._full_macs else 1.0
        outcomes = None if seen.score is not None else seen.outcomes.astype(np.float32)
        return Measurement({**values, **costs}, dropped, outcomes, work * size)

    def _costs(self, config: SubnetConfig) -> dict[str, float]:
        found = self._cost(config)
        counts = vars(found) if isinstance(found, Cost) else found
        return {name: float(count) for name, count in counts.items()}

    def _strongest(self, costs: Mapping[str, float], rivals: Sequence[Trial]) -> Trial | None:
        """Return the rival of the best quality among those no dearer that saw all examples."""
        return min(
            (rival for rival in rivals if self._is_rival(costs, rival)),
            key=lambda rival: rival.values[self.quality],
            default=None,
        )

    def _is_rival(self, costs: Mapping[str, float], trial: Trial) -> bool:
        if trial.failed or trial.dropped or trial.violation > 0 or trial.outcomes is None:
            return False
        others = {name: value for name, value in trial.values.items() if name != self.quality}
        return (
            trial.outcomes.shape == self._order.shape
            and bool(np.isfinite(trial.outcomes).all())
            and all(name in costs and value <= costs[name] for name, value in others.items())
        )


_PER_EXAMPLE = (TokenLosses, HeadLosses, Answers)
