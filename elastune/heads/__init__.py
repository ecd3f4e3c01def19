"""Heads: one file each, one line each in ``HEADS``."""

from __future__ import annotations

from collections.abc import Mapping

from elastune.heads.base import Head, Outputs, SoftTargets
from elastune.heads.causal_lm import CausalLM
from elastune.heads.question_answering import QuestionAnswering
from elastune.heads.sequence_classification import SequenceClassification
from elastune.tasks.base import HeadName

__all__ = ["HEADS", "Head", "Outputs", "SoftTargets"]

HEADS: Mapping[HeadName, Head] = {
    "causal-lm": CausalLM(),
    "sequence-classification": SequenceClassification(),
    "question-answering": QuestionAnswering(),
}
