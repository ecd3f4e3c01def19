"""Ways to score examples: one file per kind of task, one line in ``PREDICTORS``."""

from __future__ import annotations

from collections.abc import Mapping

from elastune.predict.base import Plan, Predictor
from elastune.predict.classification import predict_labels
from elastune.predict.generation import predict_texts
from elastune.predict.multiple_choice import predict_choices
from elastune.predict.perplexity import predict_windows
from elastune.predict.question_answering import predict_spans
from elastune.tasks.base import Kind

__all__ = ["PREDICTORS", "Plan", "Predictor"]

PREDICTORS: Mapping[Kind, Predictor] = {
    "generation": predict_texts,
    "perplexity": predict_windows,
    "multiple-choice": predict_choices,
    "classification": predict_labels,
    "regression": predict_labels,
    "question-answering": predict_spans,
}
