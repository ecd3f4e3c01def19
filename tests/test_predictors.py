"""Records of perplexity and generation: what they hold, resuming, and when they come."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_llama import LINES, tiny_llama, tiny_tokenizer

from elastune.errors import BadData
from elastune.likelihood import text_loss
from elastune.metrics import PERPLEXITY
from elastune.predict.generation import predict_texts
from elastune.predict.perplexity import predict_windows
from elastune.tasks import Example

TEXT = "\n".join(LINES) * 3


class _Windows:
    window = 16


class _Answers:
    max_new_tokens = 12

    def is_finished(self, text: str) -> bool:
        return len(text) > 20

    def extract(self, text: str) -> str:
        return text[:3]

    def is_correct(self, text: str, example: Example) -> bool:
        return self.extract(text) == example.answer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return tiny_llama(tokenizer)


def pieces(text: str) -> list[Example]:
    return [Example("", text[i : i + 50], "", "") for i in range(0, len(text), 50)]


def windows(model: Any, tokenizer: Any, text: str = TEXT, **options: Any) -> Any:
    options = {"batch_tokens": 64, "done": set()} | options
    return predict_windows(model, tokenizer, _Windows(), pieces(text), **options)


def test_windows_are_scored_as_transformers_does_and_cover_the_text(model, tokenizer) -> None:
    plan = windows(model, tokenizer)
    records = list(plan.records)
    assert [record["index"] for record in records] == list(range(plan.total))
    ids = tokenizer(TEXT).input_ids
    assert sum(record["tokens"] + 1 for record in records) == len(ids)
    for record in records:
        piece = torch.tensor([ids[record["index"] * 16 :][:16]])
        with torch.no_grad():
            loss = model(input_ids=piece, labels=piece).loss
        assert record["tokens"] == piece.shape[1] - 1
        assert record["nll"] == pytest.approx(float(loss) * record["tokens"], rel=1e-5)


def test_perplexity_of_the_records_is_that_of_text_loss(model, tokenizer) -> None:
    loss = text_loss(model, tokenizer, TEXT, window=16)
    records = list(windows(model, tokenizer).records)
    value = PERPLEXITY.value(*PERPLEXITY.arrays(records))
    assert value == pytest.approx(np.exp(loss.loss), rel=1e-6)
    assert PERPLEXITY.stderr is not None
    stderr = PERPLEXITY.stderr(*PERPLEXITY.arrays(records))
    assert stderr == pytest.approx(value * loss.stderr, rel=1e-6)


def test_windows_done_before_are_not_scored_again(model, tokenizer) -> None:
    whole = {record["index"]: record for record in windows(model, tokenizer).records}
    plan = windows(model, tokenizer, done={0, 2})
    rest = list(plan.records)
    assert plan.total == len(whole)
    assert [record["index"] for record in rest] == sorted(whole.keys() - {0, 2})
    for record in rest:
        assert record["nll"] == pytest.approx(whole[record["index"]]["nll"], rel=1e-5)
    assert list(windows(model, tokenizer, done=whole.keys()).records) == []


def test_a_last_window_of_one_token_is_left_out(model, tokenizer) -> None:
    text = tokenizer.decode(tokenizer(TEXT).input_ids[:33])
    assert len(tokenizer(text).input_ids) == 33
    assert windows(model, tokenizer, text).total == 2


def test_a_text_of_one_token_is_refused(model, tokenizer) -> None:
    with pytest.raises(BadData, match="needs at least 2"):
        windows(model, tokenizer, "a")


EXAMPLES = [
    Example(prompt, "", answer, prompt)
    for prompt, answer in (("How many", "x"), ("3 + 4 =", "y"), ("A bucket contains", "z"))
]


def texts(model: Any, tokenizer: Any, **options: Any) -> Any:
    options = {"batch_tokens": 8192, "done": set()} | options
    return predict_texts(model, tokenizer, _Answers(), EXAMPLES, **options)  # type: ignore[arg-type]


def test_answers_are_extracted_and_judged_by_the_task(model, tokenizer) -> None:
    records = sorted(texts(model, tokenizer).records, key=lambda record: record["index"])
    for record, example in zip(records, EXAMPLES, strict=True):
        assert record["prompt"] == example.prompt
        assert record["extracted"] == record["text"][:3]
        assert record["gold"] == example.answer
        assert record["correct"] == (record["extracted"] == example.answer)


def test_answers_done_before_are_not_generated_again(model, tokenizer) -> None:
    whole = {record["index"]: record for record in texts(model, tokenizer).records}
    plan = texts(model, tokenizer, done={1})
    assert plan.total == 3
    assert {record["index"]: record for record in plan.records} == {0: whole[0], 2: whole[2]}


def test_answers_come_before_later_ones_are_generated(model, tokenizer) -> None:
    calls: list[int] = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    # One row at a time.
    records = texts(model, tokenizer, batch_tokens=1).records
    next(records)
    first = len(calls)
    list(records)
    hook.remove()
    assert len(calls) > first + 2
