"""Classification heads on encoders and decoders: losses, predictions and adapters that reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_llama import tiny_tokenizer
from tiny_models import tiny_model
from transformers import AutoModelForSequenceClassification

from elastune.build_space import lora_space
from elastune.config import AdapterConfig
from elastune.errors import BadData
from elastune.extract import extract
from elastune.finetune import adapted
from elastune.heads import HEADS
from elastune.length_groups import LengthGroups
from elastune.models import architecture
from elastune.predict.classification import predict_labels
from elastune.tasks.base import ClassificationExample, Task

HEAD = HEADS["sequence-classification"]
FAMILIES = ("bert", "roberta", "distilbert", "llama", "qwen3")
TEXTS = ["3 + 4", "Natalia sold clips to 48 of her friends", "A", "How many apples are there now?"]
EXAMPLES = [
    ClassificationExample(text, pair, label, f"{text}\n{pair}")
    for text, pair, label in [
        (TEXTS[0], None, 0),
        (TEXTS[1], None, 2),
        (TEXTS[2], None, 1),
        (TEXTS[3], None, 2),
    ]
]
PAIRS = [ClassificationExample(e.text, TEXTS[0], e.label, e.key) for e in EXAMPLES]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def classifier(family: str, tokenizer: Any, num_labels: int = 3) -> Any:
    """Return a tiny classifier whose dropout is off, so that training mode changes nothing."""
    off = (
        {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
        if family == "distilbert"
        else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    )
    return tiny_model(
        family,
        auto=AutoModelForSequenceClassification,
        vocab_size=len(tokenizer),
        num_labels=num_labels,
        **(off if family in ("bert", "roberta", "distilbert") else {}),
    )


class Labels(Task):
    """A classification task of three classes."""

    name = "labels"
    kind = "classification"
    default_template = "none"

    def __init__(self) -> None: ...
    def train_examples(self) -> Any: ...
    def report_examples(self) -> Any: ...


class Numbers(Labels):
    kind = "regression"


@pytest.mark.parametrize("examples", [EXAMPLES, PAIRS], ids=["texts", "pairs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_padded_batch_is_the_sum_of_transformers_own_losses(
    family: str, examples: list[ClassificationExample], tokenizer: Any
) -> None:
    model = classifier(family, tokenizer)
    batch = HEAD.collate(HEAD.encode(examples, tokenizer, 64))
    assert int(HEAD.n_targets(batch)) == len(examples)
    alone = 0.0
    for example in examples:
        inputs = tokenizer(example.text, example.text_pair, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        alone += model(**inputs, labels=torch.tensor([int(example.label)])).loss.item()
    assert HEAD.loss(model, batch).item() == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_one_label_means_squared_error(family: str, tokenizer: Any) -> None:
    model = classifier(family, tokenizer, num_labels=1)
    rated = [ClassificationExample(text, None, 1.5 * i, text) for i, text in enumerate(TEXTS)]
    batch = HEAD.collate(HEAD.encode(rated, tokenizer, 64))
    expected = 0.0
    for example in rated:
        logit = model(**tokenizer(example.text, return_tensors="pt")).logits[0, 0]
        expected += ((logit - example.label) ** 2).item()
    assert HEAD.loss(model, batch).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_equal_one_text_at_a_time_at_any_batch_size(
    family: str, tokenizer: Any
) -> None:
    model = classifier(family, tokenizer)
    expected = [
        model(**tokenizer(example.text, return_tensors="pt")).logits[0].detach().numpy()
        for example in EXAMPLES
    ]
    for batch_tokens in (1, 40, 4096):
        plan = predict_labels(
            model, tokenizer, Labels(), EXAMPLES, batch_tokens=batch_tokens, done=set()
        )
        records = sorted(plan.records, key=lambda record: record["index"])
        assert plan.total == len(EXAMPLES)
        for record, logits, example in zip(records, expected, EXAMPLES, strict=True):
            np.testing.assert_allclose(record["logits"], logits, atol=1e-3)
            assert record["prediction"] == int(np.argmax(logits))
            assert record["gold"] == example.label
            assert record["correct"] == (record["prediction"] == example.label)


def test_a_number_is_predicted_as_it_is_and_done_examples_are_left_out(tokenizer: Any) -> None:
    model = classifier("bert", tokenizer, num_labels=1)
    plan = predict_labels(model, tokenizer, Numbers(), EXAMPLES, batch_tokens=64, done={0, 2})
    records = {record["index"]: record for record in plan.records}
    assert sorted(records) == [1, 3]
    logit = model(**tokenizer(EXAMPLES[1].text, return_tensors="pt")).logits[0, 0]
    assert records[1]["prediction"] == pytest.approx(logit.item(), rel=1e-4)
    assert records[1]["gold"] == 2


def test_texts_are_cut_and_the_longer_of_a_pair_first(tokenizer: Any) -> None:
    (item,) = HEAD.encode(PAIRS[1:2], tokenizer, 12)
    assert HEAD.length(item) == 12
    short = tokenizer(TEXTS[0], add_special_tokens=False).input_ids
    assert item.inputs["input_ids"][-len(short) :] == short
    with pytest.raises(BadData, match="no examples"):
        HEAD.encode([], tokenizer, 12)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_and_its_head_reload_in_stock_peft_to_the_same_logits(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = classifier(family, tokenizer)
    model.save_pretrained(tmp_path / "base")
    space = lora_space(model, (8, 4))
    net = adapted(model, "sequence-classification", space, AdapterConfig(), 0)
    heads = architecture(model).head_names(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(tuple(heads))}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in net.trained_state().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
    config = space.heuristic()
    batch = HEAD.collate(HEAD.encode(EXAMPLES, tokenizer, 64))
    batch.pop("labels")
    with net.active(config), torch.no_grad():
        expected = net.model(**batch).logits
    extract(net, config).save(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_every_epoch_has_each_item_once_in_batches_of_like_length() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 200, size=1003).tolist()
    groups = LengthGroups(lengths, 16, seed=3)
    orders = []
    for epoch in range(2):
        groups.set_epoch(epoch)
        orders.append(list(groups))
        assert orders[-1] == list(groups)
        assert sorted(orders[-1]) == list(range(len(lengths)))
    assert orders[0] != orders[1]
    batches = [orders[0][i : i + 16] for i in range(0, len(lengths), 16)]
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert padded < 1.1 * sum(lengths)
    longest = [max(lengths[i] for i in b) for b in batches]
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.5
