"""Answers as spans of the context: the best over its windows, or none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn

from elastune.errors import BadData
from elastune.generate import evaluating
from elastune.heads.question_answering import Window, padded, span_logits, windows
from elastune.metrics import Record
from elastune.predict.base import Plan
from elastune.tasks.base import QuestionAnsweringExample
from elastune.tasks.spans import exact_match, token_f1

_Spans = list[tuple[float, float, str]]
"""Of each window: the score of its best span, that of no answer, the span's text."""


def predict_spans(
    model: nn.Module,
    tokenizer: Any,
    task: Any,
    examples: Sequence[QuestionAnsweringExample],
    *,
    batch_tokens: int,
    done: Set[int],
) -> Plan:
    """Record ``prediction``, ``gold``, ``exact`` and ``f1`` of each question.

    The prediction is the span of the largest start + end logit over all windows of the context, of
    at most ``task.max_answer_length`` tokens, its ends among the ``task.n_best`` of a window. Where
    ``task.has_unanswerable``, it is ``""`` when ``no_answer_score`` is above
    ``task.no_answer_threshold``: the least score, over the windows, of their first token as both
    start and end, less the best span's (Devlin et al., 2019, section 4.3). ``best_span`` is then
    what would be answered otherwise.
    """
    todo = [i for i in range(len(examples)) if i not in done]
    return Plan(len(examples), _records(model, tokenizer, task, examples, todo, batch_tokens))


def _records(
    model: nn.Module,
    tokenizer: Any,
    task: Any,
    examples: Sequence[QuestionAnsweringExample],
    todo: Sequence[int],
    batch_tokens: int,
) -> Iterator[Record]:
    if not todo:
        return
    limit = min(task.max_length, _positions(model))
    found = windows([examples[i] for i in todo], tokenizer, limit, task.stride)
    missing = {k: len(list(group)) for k, group in groupby(found, key=lambda w: w.example)}
    spans: dict[int, _Spans] = {k: [] for k in missing}
    for batch in _batches(found, batch_tokens):
        for window, start, end in _logits(model, batch):
            k = window.example
            context = examples[todo[k]].context
            best, text = _best_span(start, end, window.offsets, context, task)
            spans[k].append((best, float(start[0] + end[0]), text))
            if len(spans[k]) == missing[k]:
                yield _record(todo[k], task, examples[todo[k]], spans.pop(k))


def _positions(model: nn.Module) -> int:
    """Return how many tokens the model can read at once."""
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9
    for name, module in model.named_modules():
        # RoBERTa counts positions from after the padding's own.
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return int(limit) - int(padding) - 1
    return int(limit)


def _batches(found: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Cut windows into batches, longest first; the windows of one example follow each other."""
    longest: dict[int, int] = {}
    for window in found:
        longest[window.example] = max(longest.get(window.example, 0), window.n_tokens)
    batch: list[Window] = []
    width = 0
    for window in sorted(found, key=lambda w: (-longest[w.example], w.example)):
        width = max(width, window.n_tokens)
        if batch and (len(batch) + 1) * width > batch_tokens:
            yield batch
            batch, width = [], window.n_tokens
        batch.append(window)
    if batch:
        yield batch


def _logits(
    model: nn.Module, batch: Sequence[Window]
) -> Iterator[tuple[Window, np.ndarray, np.ndarray]]:
    """Yield each window with its start and end logits, float64 (L,) each."""
    device = next(model.parameters()).device
    with torch.inference_mode(), evaluating(model):
        logits = span_logits(model, {k: v.to(device) for k, v in padded(batch).items()})
        start, end = (part.double().cpu().numpy() for part in logits)
    for row, window in enumerate(batch):
        n = window.n_tokens
        yield window, start[row, :n], end[row, :n]


def _best_span(
    start: np.ndarray, end: np.ndarray, offsets: np.ndarray, context: str, task: Any
) -> tuple[float, str]:
    """Return a window's best span; minus infinity and ``""`` where no span is allowed."""
    tokens = np.flatnonzero(offsets[:, 0] >= 0)
    starts = tokens[np.argsort(-start[tokens], kind="stable")[: task.n_best]]
    ends = tokens[np.argsort(-end[tokens], kind="stable")[: task.n_best]]
    length = ends[None] - starts[:, None] + 1
    allowed = (length >= 1) & (length <= task.max_answer_length)
    if not allowed.any():
        return -math.inf, ""
    scores = np.where(allowed, start[starts][:, None] + end[ends][None], -np.inf)
    s, e = np.unravel_index(int(scores.argmax()), scores.shape)
    # Tokens of byte-level vocabularies begin with the blank before the word.
    return float(scores[s, e]), context[offsets[starts[s], 0] : offsets[ends[e], 1]].strip()


def _record(index: int, task: Any, example: QuestionAnsweringExample, spans: _Spans) -> Record:
    best, _, text = max(spans, key=lambda span: span[0])
    golds = list(example.answers)
    record: Record = {
        "index": index,
        "id": example.id,
        "question": example.question,
        "context": example.context,
        "prediction": text,
        "gold": golds,
    }
    if task.has_unanswerable:
        # Without any allowed span "no answer" is certain; JSON knows no infinity.
        score = round(min(null for _, null, _ in spans) - best, 4) if best > -math.inf else 1e9
        record |= {"no_answer_score": score, "best_span": text}
        if score > task.no_answer_threshold:
            record["prediction"] = ""
    prediction = record["prediction"]
    return record | {
        "exact": exact_match(prediction, golds),
        "f1": token_f1(prediction, golds),
    }


def best_threshold(records: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the no-answer threshold of the largest mean F1 on ``records``, and that F1 in [0, 1].

    Choose it on the validation split and give it to the task as ``no_answer_threshold``: chosen on
    the split that is reported, the result would be too good.

    Raises:
        BadData: no records, or records of a task whose questions all have an answer.
    """
    if not records or "no_answer_score" not in records[0]:
        raise BadData(
            "a no-answer threshold is chosen from records with a no_answer_score, and there are "
            "none",
            try_="evaluate a task that has unanswerable questions, such as squad_v2",
        )
    scores = np.array([record["no_answer_score"] for record in records])
    golds = [record["gold"] for record in records]
    none = np.array([token_f1("", gold) for gold in golds])
    gain = [token_f1(r["best_span"], gold) for r, gold in zip(records, golds, strict=True)] - none
    order = np.argsort(scores, kind="stable")
    totals = none.sum() + np.concatenate([[0.0], np.cumsum(gain[order])])
    thresholds = np.concatenate([[scores.min() - 1], scores[order]])
    # Equal scores fall on one side together: only the last of them is a threshold.
    last = np.append(thresholds[1:] != thresholds[:-1], True)
    best = int(np.argmax(np.where(last, totals, -np.inf)))
    return float(thresholds[best]), float(totals[best]) / len(records)
