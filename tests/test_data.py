"""Splits that share no question, token ids, packing and calibration rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_llama import LINES, tiny_tokenizer

from elastune.data import (
    IGNORED_LABEL,
    Encoded,
    Splits,
    calibration_rows,
    encode,
    encode_all,
    make_splits,
    pack,
    row_batches,
)
from elastune.errors import BadData, BadRecipe
from elastune.tasks import Example

TOKENIZER = tiny_tokenizer()


def question(number: int, key: str | None = None) -> Example:
    return Example(f"What is {number} + 1?", f" {number + 1}", str(number + 1), key or f"q{number}")


POOL = [question(i) for i in range(40)]
REPORT = {"gym": [question(i) for i in range(100, 110)]}


def cut(pool: list[Example] | None = None, **changes: Any) -> Splits:
    settings: dict[str, Any] = {"n_train": None, "n_validation": 8, "n_calibration": 5, "seed": 0}
    report = changes.pop("report", REPORT)
    return make_splits(pool or POOL, report, **(settings | changes))


def keys(examples: list[Example]) -> list[str]:
    return [example.key for example in examples]


def test_splits_cut_the_whole_pool_without_overlap() -> None:
    splits = cut()
    assert len(splits.validation) == 8
    assert len(splits.train) == 32
    assert sorted(keys(splits.validation + splits.train)) == sorted(keys(POOL))
    assert splits.calibration == splits.train[:5]
    assert splits.report == REPORT


def test_the_seed_alone_decides_the_splits() -> None:
    assert cut(seed=3) == cut(seed=3)
    assert keys(cut(seed=3).train) != keys(cut(seed=4).train)
    assert set(keys(cut(seed=3).validation)) != set(keys(cut(seed=4).validation))
    assert keys(cut().train) != sorted(keys(cut().train))


def test_the_validation_set_does_not_depend_on_how_much_is_trained() -> None:
    few, many = cut(n_train=4), cut(n_train=30)
    assert few.validation == many.validation
    assert few.train == many.train[:4]


@pytest.mark.parametrize("side", ["train", "validation"])
def test_a_planted_leak_is_found_and_named(side: str) -> None:
    stolen = getattr(cut(), side)[0]
    # The same question worded with another case, punctuation and spacing.
    planted = question(500, key=f"  {stolen.key.upper()}!? ")
    report = {"gym": REPORT["gym"], "other": [question(600), planted]}
    with pytest.raises(BadData) as caught:
        cut(report=report)
    message = str(caught.value)
    assert f"1 question(s) of report:other (50.00%) occur in {side}" in message
    assert stolen.key.upper() in message


def test_report_sets_may_overlap_each_other() -> None:
    splits = cut(report={"a": REPORT["gym"], "b": REPORT["gym"]})
    assert splits.notes == []


def test_leaking_training_examples_are_dropped_on_demand_and_counted() -> None:
    stolen = POOL[3:7]
    report = {"gym": REPORT["gym"], "other": [question(600), *stolen]}
    splits = cut(report=report, leaks="drop")
    assert len(splits.train) + len(splits.validation) == 36
    assert not set(keys(stolen)) & set(keys(splits.train + splits.validation))
    (note,) = splits.notes
    assert note.startswith("4 of 40 training rows dropped: they hold 4 question(s) of report:other")
    assert splits.report == report


def test_dropping_leaks_leaves_the_order_of_the_others_alone() -> None:
    whole = cut(n_validation=1)
    stolen = whole.train[5:7]
    report = {"gym": stolen}
    kept = cut(report=report, n_validation=1, leaks="drop")
    assert kept.validation == whole.validation
    assert kept.train == whole.train[:5] + whole.train[7:]


def test_leaks_are_kept_with_a_warning_on_demand() -> None:
    splits = cut(report={"gym": POOL[:2]}, leaks="warn")
    assert len(splits.train) + len(splits.validation) == 40
    assert splits.notes
    assert all("of report:gym" in note and "means nothing" in note for note in splits.notes)


def test_a_pool_that_leaks_too_much_says_what_is_left() -> None:
    with pytest.raises(BadData, match="10 training examples cannot give 8"):
        cut(report={"gym": POOL[:30]}, n_train=5, leaks="drop")


def test_only_the_three_policies_are_allowed() -> None:
    with pytest.raises(BadRecipe, match=r"'drpo' \(did you mean 'drop'\?\)"):
        cut(leaks="drpo")


@pytest.mark.parametrize("seed", range(8))
def test_questions_asked_twice_in_training_never_stand_on_both_sides(seed: int) -> None:
    twice = POOL + [question(i + 1000, key=f"Q{i}.") for i in range(20)]
    splits = cut(twice, seed=seed)
    left = {key.lower().strip(".") for key in keys(splits.train)}
    assert not left & {key.lower().strip(".") for key in keys(splits.validation)}


def test_the_number_of_training_examples_asked_for_is_given_in_spite_of_repeats() -> None:
    twice = POOL + [question(i + 1000, key=f"Q{i}.") for i in range(40)]
    for seed in range(5):
        assert len(cut(twice, seed=seed, n_train=20).train) == 20


def test_too_few_examples_say_what_to_lower() -> None:
    with pytest.raises(BadData, match=r"40 training examples cannot give 8 .* and 33 for training"):
        cut(n_train=33)
    with pytest.raises(BadData, match="at least 1 for training"):
        cut(n_validation=40)
    assert len(cut(n_validation=39).train) == 1


def test_a_pool_of_one_question_leaves_nothing_to_train_on() -> None:
    with pytest.raises(BadData, match="0 training examples ask what validation does not"):
        cut([question(i, key="the same") for i in range(40)])


def test_an_example_is_prompt_completion_and_end() -> None:
    item = encode(POOL[3], TOKENIZER, 100)
    assert item.input_ids[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.decode(item.input_ids[: item.n_prompt]) == "What is 3 + 1?"
    assert TOKENIZER.decode(item.input_ids[item.n_prompt : -1]) == " 4"


def test_the_prompt_has_the_ids_that_generation_starts_from() -> None:
    # A tokenizer may join what stands on both sides of the seam; training must not.
    example = Example("The ans", "wer is 7.", "7", "seam")
    item = encode(example, TOKENIZER, 100)
    assert item.input_ids[: item.n_prompt] == TOKENIZER("The ans")["input_ids"]


def test_long_examples_are_cut_and_those_without_room_for_an_answer_left_out() -> None:
    whole = encode(POOL[0], TOKENIZER, 1000)
    exact, first_token = len(whole.input_ids), whole.n_prompt + 1
    assert encode(POOL[0], TOKENIZER, exact) == whole
    assert encode(POOL[0], TOKENIZER, first_token).input_ids == whole.input_ids[:first_token]
    long = Example("word " * 50, " 1", "1", "long")
    kept = encode_all([long, POOL[0], long, POOL[1]], TOKENIZER, exact)
    assert kept == [encode(POOL[0], TOKENIZER, exact), encode(POOL[1], TOKENIZER, exact)]
    assert encode_all([POOL[0]], TOKENIZER, first_token)
    with pytest.raises(
        BadData, match=rf"none of the 1 .* within {whole.n_prompt} tokens"
    ) as caught:
        encode_all([POOL[0]], TOKENIZER, whole.n_prompt)
    assert "raise train.max_length" in str(caught.value)


def test_no_examples_at_all_are_bad_data() -> None:
    with pytest.raises(BadData, match="no examples to train on"):
        encode_all([], TOKENIZER, 10)
    with pytest.raises(BadData, match="0 training examples"):
        make_splits([], REPORT, n_train=None, n_validation=1, n_calibration=1, seed=0)


@pytest.mark.parametrize("n_prompt", [0, 1, 2, 4])
def test_packing_is_the_naive_construction(n_prompt: int) -> None:
    sequences = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 16], [17, 18, 19, 20, 21]]
    ids, labels, positions, starts = [], [], [], [0]
    for tokens in sequences:
        for position in range(len(tokens) - 1):
            ids.append(tokens[position])
            positions.append(position)
            target = position + 1
            labels.append(tokens[target] if target >= n_prompt else IGNORED_LABEL)
        starts.append(len(ids))
    batch = pack([Encoded(tokens, n_prompt) for tokens in sequences])
    assert batch.input_ids.tolist() == [ids]
    assert batch.labels.tolist() == [labels]
    assert batch.positions.tolist() == [positions]
    assert batch.starts.tolist() == starts
    assert batch.starts.dtype == torch.int32
    assert batch.n_tokens == len(ids) == 14


def test_calibration_rows_are_all_of_full_length_and_repeat_by_seed() -> None:
    texts = [f"{line} {i}" for i, line in enumerate(LINES * 10)]
    rows = calibration_rows(texts, TOKENIZER, n_sequences=6, length=17, seed=1)
    assert rows.shape == (6, 17)
    assert rows.dtype == torch.int64
    again = calibration_rows(iter(texts), TOKENIZER, n_sequences=6, length=17, seed=1)
    assert torch.equal(rows, again)
    other = calibration_rows(texts, TOKENIZER, n_sequences=6, length=17, seed=2)
    assert not torch.equal(rows, other)


def test_calibration_rows_hold_the_texts_end_to_end() -> None:
    rows = calibration_rows([LINES[0]] * 9, TOKENIZER, n_sequences=100, length=13, seed=0)
    ids = TOKENIZER(LINES[0])["input_ids"] * 9
    n_rows = len(ids) // 13  # the text runs out: what is left is no row
    assert rows.tolist() == [ids[i * 13 : (i + 1) * 13] for i in range(n_rows)]


def test_too_little_calibration_text_says_so() -> None:
    with pytest.raises(BadData, match="less than one row of 500"):
        calibration_rows(LINES, TOKENIZER, n_sequences=2, length=500, seed=0)
    with pytest.raises(BadData, match="0 tokens"):
        calibration_rows([], TOKENIZER, n_sequences=2, length=5, seed=0)


def test_rows_are_batched_by_tokens_without_loss() -> None:
    rows = torch.arange(70).view(10, 7)
    batches = list(row_batches(rows, 21))
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    assert torch.equal(torch.cat(batches), rows)
    assert [len(batch) for batch in row_batches(rows, 3)] == [1] * 10
