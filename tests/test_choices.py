"""Log-likelihoods of choices against one sequence at a time, and against lm-evaluation-harness."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_llama import tiny_llama, tiny_tokenizer
from tiny_models import token_ids
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from elastune.choices import (
    ChoiceScorer,
    Pair,
    context_length,
    encode_pairs,
    loglikelihoods,
    question_of,
)
from elastune.errors import BadData
from elastune.predict.multiple_choice import predict_choices
from elastune.tasks.base import MultipleChoiceExample

EXAMPLES = [
    MultipleChoiceExample("How many apples are there now?", (" 7", " 48 friends", " 3"), 0, "a"),
    MultipleChoiceExample("Question: water? Answer:", (" yes", " no"), 1, "b"),
    MultipleChoiceExample("A bucket  ", ("contains water", "of gallons"), 0, "c"),
    MultipleChoiceExample("", ("Natalia sold", "Natalia", "Derek adds 6.8"), 2, "d"),
    MultipleChoiceExample("a", ("b", " b", "ab", "\nb"), 2, "e"),
]
MIXED = ["sliding_attention", "full_attention"]
SIZES = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_llama(tokenizer)


def naive(model: Any, row: list[int], n_scored: int) -> float:
    """The whole sequence alone through transformers, softmax over all its logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row[:-1]])).logits[0].double()
    logprobs = logits.log_softmax(dim=-1)[-n_scored:]
    return float(sum(line[token] for line, token in zip(logprobs, row[-n_scored:], strict=True)))


def build(family: str) -> Any:
    from tiny_models import tiny_model

    match family:
        case "gpt2":
            torch.manual_seed(0)
            config = GPT2Config(
                n_layer=2, n_head=4, n_embd=32, n_positions=64, initializer_range=0.2, **SIZES
            )
            return GPT2LMHeadModel(config).eval()
        case "bloom":
            torch.manual_seed(0)
            config = BloomConfig(
                n_layer=2, n_head=4, hidden_size=32, initializer_range=0.2, **SIZES
            )
            return BloomForCausalLM(config).eval()
        case "qwen2-window":
            return tiny_model("qwen2", use_sliding_window=True, sliding_window=5, layer_types=MIXED)
        case "gemma3":
            return tiny_model("gemma3_text", sliding_window=5, layer_types=MIXED)
        case "gemma2":
            return tiny_model(
                "gemma2", sliding_window=5, layer_types=MIXED, attn_implementation="eager"
            )
        case "mistral-window":
            return tiny_model("mistral", sliding_window=5)
    return tiny_model(family)


#: Family -> whether its choices share their beginning.
FAMILIES = {
    "llama": True,
    "qwen3": True,
    "qwen2-window": True,
    "mistral-window": True,
    "gemma3": True,
    "gpt2": True,
    "gemma2": False,  # soft-capped scores
    "bloom": False,  # no positions to give
}


def random_questions(max_length: int = 60) -> list[Any]:
    """Long and short contexts; one-token, equal, nested and long choices; nothing in common."""
    contexts = token_ids(17, 1, 8, 30, seed=1)
    continuations = [token_ids(*sizes, seed=2) for sizes in ((3, 9, 1), (4, 4), (1, 1), (12, 2))]
    continuations[1][1] = list(continuations[1][0])
    continuations[3][1] = continuations[3][0][:2]
    pairs = [
        [Pair(context, continuation) for continuation in choices]
        for context, choices in zip(contexts, continuations, strict=True)
    ]
    pairs.append([Pair(ids[:-2], ids[-2:]) for ids in token_ids(9, 14, seed=3)])
    return [question_of(question, max_length) for question in pairs]


@pytest.mark.parametrize("family", FAMILIES)
def test_loglikelihoods_are_those_of_each_sequence_alone(family: str) -> None:
    model = build(family)
    assert ChoiceScorer(model).shares == FAMILIES[family]
    questions = random_questions()
    expected = [
        [naive(model, row, n) for row, n in zip(q.rows, q.n_scored, strict=True)] for q in questions
    ]
    for batch_tokens in (8192, 60, 1):
        found = dict(loglikelihoods(model, questions, batch_tokens=batch_tokens))
        for index, values in enumerate(expected):
            np.testing.assert_allclose(found[index], values, atol=2e-5)


def test_the_context_of_a_question_is_read_once(tokenizer) -> None:
    model = build("llama")
    seen = []
    scorer = ChoiceScorer(model)
    model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    context, *rests = token_ids(40, 5, 5, 1)
    scorer([question_of([Pair(context, rest) for rest in rests], 64)])
    assert seen == [40 + 4 + 4]


def test_a_model_whose_sharing_fails_its_trial_scores_padded_rows(monkeypatch) -> None:
    model = build("llama")
    forward = model.model.forward

    def no_positions(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.model.forward = no_positions
    assert not ChoiceScorer(model).shares
    questions = random_questions()
    row, n = questions[0].rows[1], questions[0].n_scored[1]
    assert dict(loglikelihoods(model, questions))[0][1] == pytest.approx(naive(model, row, n))


def test_the_attention_and_mode_of_the_model_are_put_back(model) -> None:
    before = model.config._attn_implementation
    model.train()
    next(loglikelihoods(model, random_questions()))
    assert model.training
    assert model.config._attn_implementation == before
    model.eval()


def test_done_questions_are_not_scored_again(model) -> None:
    questions = random_questions()
    whole = dict(loglikelihoods(model, questions))
    rest = dict(loglikelihoods(model, questions, done={0, 3}))
    assert rest.keys() == {1, 2, 4}
    for index, values in rest.items():
        np.testing.assert_allclose(values, whole[index], atol=1e-5)
    assert list(loglikelihoods(model, questions, done=set(range(5)))) == []


def test_long_contexts_lose_their_beginning(model) -> None:
    context, rest = token_ids(80, 6)
    question = question_of([Pair(context, rest)], 30)
    assert question.rows == ((context + rest)[-31:],)
    assert dict(loglikelihoods(model, [question]))[0] == [
        pytest.approx(naive(model, question.rows[0], 6))
    ]
    with pytest.raises(BadData, match="6 tokens is longer than the 5"):
        question_of([Pair(context, rest)], 5)


def test_a_choice_without_text_is_refused(tokenizer) -> None:
    with pytest.raises(BadData, match="nothing to score"):
        encode_pairs(tokenizer, [("Question?", "")])


def predictions(model: Any, tokenizer: Any, **options: Any) -> list[dict[str, Any]]:
    plan = predict_choices(
        model, tokenizer, None, EXAMPLES, **({"batch_tokens": 8192, "done": set()} | options)
    )
    assert plan.total == len(EXAMPLES)
    return sorted(plan.records, key=lambda record: record["index"])


def test_records_hold_the_likeliest_choices(model, tokenizer) -> None:
    for record, example in zip(predictions(model, tokenizer), EXAMPLES, strict=True):
        values = record["loglikelihoods"]
        lengths = [len(choice.removeprefix(" ")) for choice in example.choices]
        assert record["prediction"] == values.index(max(values))
        ratios = [value / length for value, length in zip(values, lengths, strict=True)]
        assert record["prediction_norm"] == ratios.index(max(ratios))
        assert record["correct"] == (record["prediction"] == example.gold)
        assert record["correct_norm"] == (record["prediction_norm"] == example.gold)
        assert record["choices"] == list(example.choices)


def test_batch_size_and_resuming_change_no_record(model, tokenizer) -> None:
    whole = predictions(model, tokenizer)
    small = predictions(model, tokenizer, batch_tokens=10)
    resumed = predictions(model, tokenizer, done={0, 2})
    assert [record["index"] for record in resumed] == [1, 3, 4]
    for record in [*small, *resumed]:
        expected = whole[record["index"]]
        np.testing.assert_allclose(
            record.pop("loglikelihoods"), expected["loglikelihoods"], atol=1e-5
        )
        assert record == {key: expected[key] for key in record}


class _Partial:
    """A question whose choices differ in the middle and are scored by what follows."""

    prompt = "The trophy did not fit because the"
    choices = (" trophy is big", " case is big")
    scored_from = (7, 5)
    gold = 0
    key = "p"


def test_scored_from_scores_the_rest_of_a_choice_alone(model, tokenizer) -> None:
    plan = predict_choices(model, tokenizer, None, [_Partial()], batch_tokens=999, done=set())
    record = next(plan.records)
    for value, option in zip(record["loglikelihoods"], (" trophy", " case"), strict=True):
        context = tokenizer(_Partial.prompt + option).input_ids
        whole = tokenizer(_Partial.prompt + option + " is big").input_ids
        assert value == pytest.approx(naive(model, whole, len(whole) - len(context)), abs=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adds_bos", [False, True])
def test_loglikelihoods_equal_those_of_the_lm_evaluation_harness(model, adds_bos) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        assert tokenizer("a").input_ids[0] == 1
    texts = [(example.prompt, choice) for example in EXAMPLES for choice in example.choices]
    texts += [("<s>Natalia sold", " clips"), ("", "<s>Natalia"), ("water " * 150, "contains 3")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts)]
    harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    expected = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    limit = context_length(model, tokenizer)
    assert limit == harness.max_length
    questions = [question_of([pair], limit) for pair in encode_pairs(tokenizer, texts)]
    found = dict(loglikelihoods(model, questions))
    np.testing.assert_allclose([found[i][0] for i in range(len(texts))], expected, atol=1e-4)
