"""Scores against numbers computed by transformers and by hand."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from tiny_llama import LINES, tiny_llama, tiny_tokenizer
from transformers import GraniteConfig, GraniteForCausalLM

from elastune.errors import BadData
from elastune.evaluate import evaluate, example_losses, mean_loss
from elastune.likelihood import TokenScorer, ratio_of_sums, text_loss
from elastune.tasks import Example, get_task

EXAMPLES = [
    Example("Question: 3 + 4 =\nAnswer:", " 7", "7", "3 + 4 ="),
    Example("Question: How many apples are there now?\nAnswer:", " The answer is 48.", "48", "b"),
    Example("A", " bucket contains water", "", "c"),
    Example("", "Natalia sold clips", "", "d"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny_llama(tokenizer)


def hf_completion_loss(model, tokenizer, example: Example) -> tuple[float, int]:
    """Summed loss and tokens by transformers' own labels."""
    prompt = tokenizer(example.prompt).input_ids
    completion = [*tokenizer(example.completion).input_ids, tokenizer.eos_token_id]
    labels = [-100] * len(prompt) + completion
    with torch.no_grad():
        ids = torch.tensor([prompt + completion])
        loss = model(input_ids=ids, labels=torch.tensor([labels])).loss
    n = len(completion) - (not prompt)  # the very first token has no prediction
    return float(loss) * n, n


def test_example_losses_equal_transformers_losses(model, tokenizer):
    expected = [hf_completion_loss(model, tokenizer, e) for e in EXAMPLES]
    sums, counts = example_losses(model, tokenizer, EXAMPLES)
    assert counts.tolist() == [n for _, n in expected]
    np.testing.assert_allclose(sums, [s for s, _ in expected], rtol=1e-5)


def test_batch_size_changes_no_loss(model, tokenizer):
    whole, _ = example_losses(model, tokenizer, EXAMPLES)
    single, _ = example_losses(model, tokenizer, EXAMPLES, batch_tokens=1)
    np.testing.assert_allclose(single, whole, rtol=1e-5)


def test_mean_loss_weighs_tokens(model, tokenizer):
    expected = [hf_completion_loss(model, tokenizer, e) for e in EXAMPLES]
    loss, stderr, n = mean_loss(model, tokenizer, EXAMPLES)
    assert n == sum(count for _, count in expected)
    assert loss == pytest.approx(sum(total for total, _ in expected) / n, rel=1e-5)
    assert stderr > 0


def test_examples_cut_inside_the_prompt_score_nothing(model, tokenizer):
    sums, counts = example_losses(model, tokenizer, EXAMPLES, max_length=6)
    assert counts[1] == 0
    assert sums[1] == 0
    with pytest.raises(BadData, match="no completion token"):
        mean_loss(model, tokenizer, EXAMPLES[:2], max_length=4)


def test_scaled_logits_are_not_bypassed(tokenizer):
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        logits_scaling=8.0,
        initializer_range=0.4,
        pad_token_id=0,
    )
    model = GraniteForCausalLM(config).eval()
    sums, _ = example_losses(model, tokenizer, EXAMPLES)
    expected = [hf_completion_loss(model, tokenizer, e)[0] for e in EXAMPLES]
    np.testing.assert_allclose(sums, expected, rtol=1e-5)


def test_first_token_of_a_row_cannot_be_scored(model):
    ids = torch.tensor([[3, 4]])
    with pytest.raises(ValueError, match="first token"):
        TokenScorer(model)(ids, None, torch.ones_like(ids, dtype=torch.bool))


def test_perplexity_is_that_of_transformers_losses_by_window(model, tokenizer, tmp_path):
    text = "\n".join(LINES) * 3
    path = tmp_path / "text.txt"
    path.write_text(text)
    ids = tokenizer(text).input_ids
    total, n = 0.0, 0
    for start in range(0, len(ids), 16):
        piece = torch.tensor([ids[start : start + 16]])
        if piece.shape[1] > 1:
            with torch.no_grad():
                loss = model(input_ids=piece, labels=piece).loss
            total += float(loss) * (piece.shape[1] - 1)
            n += piece.shape[1] - 1
    task = get_task(f"perplexity:{path}", window=16)
    score = evaluate(model, tokenizer, task, task.report_examples())
    assert score.value == pytest.approx(math.exp(total / n), rel=1e-5)
    assert (score.n, score.metric, score.higher_is_better) == (n, "perplexity", False)
    assert 0 < score.stderr < score.value


def test_chunked_logits_change_no_perplexity(model, tokenizer, monkeypatch):
    text = "\n".join(LINES)
    whole = text_loss(model, tokenizer, text, window=16)
    monkeypatch.setattr("elastune.likelihood._CHUNK_ELEMENTS", 1000)
    assert text_loss(model, tokenizer, text, window=16).loss == pytest.approx(whole.loss, rel=1e-6)


def test_stderr_agrees_with_the_bootstrap():
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 60, size=400)
    sums = counts * rng.normal(2.0, 0.5, size=400)
    picks = rng.integers(0, 400, size=(2000, 400))
    bootstrap = (sums[picks].sum(1) / counts[picks].sum(1)).std()
    assert ratio_of_sums(sums, counts).stderr == pytest.approx(bootstrap, rel=0.1)


def test_a_single_text_has_no_standard_error():
    assert math.isnan(ratio_of_sums(np.array([3.0]), np.array([2])).stderr)


def write_answers(tmp_path, answers: list[str]):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"q{i}", "completion": a} for i, a in enumerate(answers)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return get_task(f"custom:{path}", report=str(path), template="qa", max_new_tokens=8)


def test_accuracy_counts_correct_answers_with_binomial_stderr(
    model, tokenizer, tmp_path, monkeypatch
):
    task = write_answers(tmp_path, ["yes", "no", "yes", "yes"])
    examples = task.report_examples()
    answers = [(i, "yes") for i in (2, 0, 3, 1)]  # as they are finished
    module = sys.modules["elastune.predict.generation"]
    monkeypatch.setattr(module, "generate_each", lambda *a, **k: iter(answers))
    target = tmp_path / "out" / "predictions.jsonl"
    score = evaluate(model, tokenizer, task, examples, predictions=target)
    assert (score.value, score.n) == (0.75, 4)
    assert score.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["correct"] for row in rows] == [True, False, True, True]
    assert rows[1] == {
        "index": 1,
        "prompt": "Question: q1\nAnswer:",
        "text": "yes",
        "extracted": "yes",
        "gold": "no",
        "correct": False,
    }
    assert [p.name for p in target.parent.iterdir()] == ["predictions.jsonl"]


def test_generated_answers_reach_the_metric(model, tokenizer, tmp_path):
    task = write_answers(tmp_path, ["yes", "no"])
    score = evaluate(model, tokenizer, task, task.report_examples())
    assert score.value == 0.0
    assert score.seconds > 0


def test_no_examples_are_refused(model, tokenizer, tmp_path):
    task = write_answers(tmp_path, ["yes"])
    with pytest.raises(BadData, match="no examples"):
        evaluate(model, tokenizer, task, [])
