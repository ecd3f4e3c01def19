"""Tasks of lm-evaluation-harness as further columns of a run's table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from elastune.errors import UnsupportedModel
from elastune.harness import harness_scores, harness_tasks
from elastune.inputs import content_hash
from elastune.measure import Measurement, score_row
from elastune.run import Run


def harness_measurements(
    run: Run,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
) -> list[Measurement]:
    """Return a measurement for each task of lm-evaluation-harness (see `harness_scores`).

    Raises:
        BadRecipe: lm_eval is not installed, or a task it does not know.
        UnsupportedModel: the run's models do not generate text.
    """
    task = run.task_of(run.recipe.task)
    if task.head != "causal-lm":
        raise UnsupportedModel(
            f"lm-eval tasks need causal language models, and those of this run have a {task.head} "
            "head",
            try_="a run whose task is done by generating text",
        )
    found = []
    for name, spec in harness_tasks(tasks, include_path).items():
        settings: dict[str, Any] = {
            "include_path": None if include_path is None else str(include_path),
            "limit": limit,
            "num_fewshot": num_fewshot,
        }

        def score(
            system: str,
            model: PreTrainedModel,
            key: str,
            name: str = name,
            spec: str = spec,
            settings: dict[str, Any] = settings,
        ) -> dict[str, Any]:
            with run.reporter.bar(f"evaluate {system}, lm-eval:{name}", "requests") as bar:
                (result,) = harness_scores(
                    model,
                    run.tokenizer,
                    [spec],
                    batch_tokens=run.recipe.evaluate.batch_tokens,
                    progress=bar,
                    predictions=lambda label: run.dir.prediction_file(system, label),
                    **settings,
                )
            return score_row(result)

        own = None if include_path is None else content_hash(include_path)
        options = {"lm_eval": spec, **settings, "files": own}
        found.append(Measurement(f"lm-eval:{name}", options, score, recorded=True))
    return found
