"""Generated problems of the reasoning-gym package: endless data, exact judging, no download."""

from __future__ import annotations

import dataclasses
import logging
import re
import warnings
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from elastune.errors import BadData, BadRecipe, nearest
from elastune.tasks.base import Example, Task, TaskContext, normalise

REPORT_SEED = 1_000_003
"""Far from usual seeds: problem i of a set is drawn from seed + i, so near seeds share problems."""

_LOG = logging.getLogger(__name__)
_PREFIX = re.compile(r"^.*\banswer is:?\s*", re.IGNORECASE)


class ReasoningGym(Task):
    """One data set of reasoning-gym, judged by the package itself (correct = its score is 1).

    Training and report problems come from different seeds; training problems that also occur in
    the report set are dropped, and no split holds a problem twice.

    Args:
        size: training problems; fewer come out where the data set has no more different ones.
        seed: of the training problems.
        report_size: report problems.
        report_seed: of the report problems; keep it when only the training seed varies.
        config: further options are those of the data set itself, e.g. ``max_terms=3``.
    """

    name = "reasoning_gym"
    max_new_tokens = 64
    default_template = "qa"

    def __init__(
        self,
        context: TaskContext,
        *,
        size: int = 1000,
        seed: int = 0,
        report_size: int = 200,
        report_seed: int = REPORT_SEED,
        max_new_tokens: int | None = None,
        **config: Any,
    ) -> None:
        super().__init__(context, max_new_tokens=max_new_tokens)
        if size < 1 or report_size < 1:
            raise BadRecipe(f"size {size} and report_size {report_size} must be at least 1.")
        self.dataset = context.argument
        self.name = f"reasoning_gym:{self.dataset}"
        self.size, self.seed = size, seed
        self.report_size, self.report_seed = report_size, report_seed
        self.config = config
        self._judge = self._create(size=1, seed=seed)

    def train_examples(self) -> list[Example]:
        return [self._example(entry) for entry in self._train.values()]

    def report_examples(self) -> list[Example]:
        return [self._example(entry) for entry in self._report.values()]

    def is_finished(self, text: str) -> bool:
        end = "\n\n" if self._multiline else "\n"
        return super().is_finished(text) or (bool(text.strip()) and end in text.lstrip())

    def extract(self, text: str) -> str | None:
        text = self.template.cut(text).strip()
        answer = text.split("\n\n" if self._multiline else "\n", 1)[0]
        return _PREFIX.sub("", answer).strip() or None

    def is_correct(self, text: str, example: Example) -> bool:
        answer = self.extract(text)
        if answer is None:
            return False
        return any(self._judged(given, example) == 1.0 for given in (answer, answer.rstrip(".")))

    def _judged(self, answer: str, example: Example) -> float:
        try:
            return float(self._judge.score_answer(answer, self._entry(example)))
        except Exception:  # some of the package's judges crash on malformed answers
            return 0.0

    def _entry(self, example: Example) -> dict[str, Any]:
        key = normalise(example.key)
        entry = self._report.get(key) or self._train.get(key)
        if entry is None:
            raise BadData(f"{example.key[:80]!r} is not a problem of task {self.name!r}.")
        return entry

    def _example(self, entry: dict[str, Any]) -> Example:
        answer = str(entry["answer"])
        return self.example(entry["question"].strip(), answer, answer)

    @cached_property
    def _report(self) -> dict[str, dict[str, Any]]:
        return self._distinct(self.report_size, self.report_seed, known=frozenset())

    @cached_property
    def _train(self) -> dict[str, dict[str, Any]]:
        return self._distinct(self.size, self.seed, known=frozenset(self._report))

    @cached_property
    def _multiline(self) -> bool:
        return any("\n" in str(entry["answer"]).strip() for entry in self._report.values())

    def _distinct(self, size: int, seed: int, known: frozenset[str]) -> dict[str, dict[str, Any]]:
        """Return up to ``size`` different problems that are not ``known``, by normalised text."""
        found: dict[str, dict[str, Any]] = {}
        # Small data sets repeat themselves: give up after four draws for each problem asked for.
        for entry in self._draw(size=4 * size, seed=seed):
            key = normalise(entry["question"])
            if key not in known and key not in found:
                found[key] = entry
                if len(found) == size:
                    break
        if not found:
            raise BadData(
                f"reasoning_gym {self.dataset!r} with {self.config} has no problem to draw"
                + (" outside its report set." if known else "."),
                try_="lower report_size, or widen the data set's own options",
            )
        if len(found) < size:
            _LOG.warning(
                "%s: %d of the %d problems asked for (seed %d); its options allow no more "
                "different ones outside the report set",
                self.name,
                len(found),
                size,
                seed,
            )
        return found

    def _draw(self, *, size: int, seed: int) -> Iterator[dict[str, Any]]:
        try:
            yield from self._create(size=size, seed=seed)
        except (AssertionError, ValueError, TypeError, IndexError) as error:
            # Some options pass the package's own check and fail in its generator.
            raise BadRecipe(
                f"reasoning_gym {self.dataset!r} cannot draw problems with {self.config}: {error}.",
                try_="other options in task.options; the package's documentation has them",
            ) from error

    def _create(self, *, size: int, seed: int) -> Any:
        known = _datasets()
        if self.dataset not in known:
            raise BadRecipe(
                f"reasoning_gym has no data set {self.dataset!r}{nearest(self.dataset, known)}.",
                try_="name one as reasoning_gym:chain_sum; reasoning_gym.factory.DATASETS has all",
            )
        dataset_class, config_class = known[self.dataset]
        allowed = {field.name for field in dataclasses.fields(config_class)} - {"seed", "size"}
        for option in self.config:
            if option not in allowed:
                raise BadRecipe(
                    f"reasoning_gym {self.dataset!r} has no option {option!r}"
                    f"{nearest(option, allowed)}; allowed: {', '.join(sorted(allowed))}."
                )
        try:
            config = config_class(size=size, seed=seed, **self.config)
            config.validate()
        except (AssertionError, ValueError, TypeError) as error:
            raise BadRecipe(
                f"reasoning_gym {self.dataset!r} refuses {self.config}: {error}.",
                try_="other options in task.options; the package's documentation has them",
            ) from error
        return dataset_class(config)


def _datasets() -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            # A dependency of the package has invalid comparisons that warn when compiled.
            warnings.simplefilter("ignore", SyntaxWarning)
            from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise BadData(
            "reasoning_gym tasks need the package reasoning-gym.",
            try_="pip install 'elastune[reasoning]'",
        ) from error
    return dict(DATASETS)
