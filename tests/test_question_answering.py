"""Windows, labels and spans against naive versions of the published algorithm."""

from __future__ import annotations

import gzip
import json
import random
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_llama import tiny_tokenizer
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerFast

from elastune.errors import BadData, BadRecipe
from elastune.heads.question_answering import QuestionAnswering, windows
from elastune.models import load_model
from elastune.predict.question_answering import best_threshold, predict_spans
from elastune.tasks.base import QuestionAnsweringExample

HEAD = QuestionAnswering()
COLOURS = ("red", "blue", "green", "black", "white", "gold")
THINGS = ("door", "car", "house", "bird", "lamp", "shirt", "boat", "cup")


def qa(question: str, context: str, *answers: str, identity: str = "q") -> QuestionAnsweringExample:
    starts = tuple(context.index(answer) for answer in answers)
    return QuestionAnsweringExample(identity, question, context, answers, starts, question)


def story(rng: random.Random, n: int) -> tuple[str, dict[str, str]]:
    """A context of ``n`` sentences, and the colour of each thing in it."""
    colours = {thing: rng.choice(COLOURS) for thing in rng.sample(THINGS, min(n, len(THINGS)))}
    lines = [f"The {thing} is {colour}." for thing, colour in colours.items()]
    lines += ["Nothing else is said here."] * (n - len(lines))
    return " ".join(lines), colours


def questions(n: int, *, sentences: int = 6, seed: int = 0) -> list[QuestionAnsweringExample]:
    """Questions of varied length; every fourth has no answer."""
    rng = random.Random(seed)
    found = []
    for i in range(n):
        context, colours = story(rng, rng.randint(2, sentences))
        if i % 4 == 3:
            thing = next(thing for thing in (*THINGS, "sun") if thing not in colours)
            found.append(qa(f"What is the {thing} like?", context, identity=str(i)))
        else:
            thing = rng.choice(sorted(colours))
            answer = f"{thing} is {colours[thing]}" if i % 2 else colours[thing]
            found.append(qa(f"What is the {thing} like?", context, answer, identity=str(i)))
    return found


def words(text: str) -> list[str]:
    return [word for word in text.lower().replace(".", " ").split() if word != "the"]


def naive_f1(gold: str, given: str) -> float:
    """F1 of the words of two answers."""
    a, b = words(gold), words(given)
    shared = sum(min(a.count(word), b.count(word)) for word in set(a))
    return 2 * shared / (len(a) + len(b)) if a and b else float(a == b)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Word pieces in BERT's manner: "[CLS] question [SEP] context [SEP]"."""
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    texts = [f"{e.question} {e.context}" for e in questions(40, sentences=12)]
    raw.train_from_iterator(texts, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def model_of(kind: str, vocabulary: int, **changes) -> torch.nn.Module:
    return tiny_model(
        kind, auto=AutoModelForQuestionAnswering, **({"vocab_size": vocabulary} | changes)
    )


@pytest.fixture
def bert(tokenizer):
    return model_of("bert", len(tokenizer))


def a_task(**changes) -> SimpleNamespace:
    options = {
        "max_length": 40,
        "stride": 8,
        "n_best": 20,
        "max_answer_length": 5,
        "no_answer_threshold": 0.0,
        "has_unanswerable": True,
    }
    return SimpleNamespace(**(options | changes))


def predictions(model, tokenizer, examples, *, batch_tokens=200, done=frozenset(), **changes):
    plan = predict_spans(
        model, tokenizer, a_task(**changes), examples, batch_tokens=batch_tokens, done=done
    )
    records = list(plan.records)
    assert plan.total == len(examples)
    return {record["index"]: record for record in records}


def naive_windows(tokenizer, example, max_length, stride):
    """Ids, types and offsets of each window, laid out by hand."""
    plain = {"add_special_tokens": False, "return_offsets_mapping": True}
    question = tokenizer(example.question, **plain).input_ids
    context = tokenizer(example.context, **plain)
    room = max_length - len(question) - 3
    first = 0
    while True:
        ids = context.input_ids[first : first + room]
        before = [2, *question, 3]
        outside = [(-1, -1)]
        yield (
            [*before, *ids, 3],
            [0] * len(before) + [1] * (len(ids) + 1),
            outside * len(before) + context.offset_mapping[first : first + room] + outside,
        )
        if first + room >= len(context.input_ids):
            return
        first += room - stride


def test_windows_equal_windows_laid_out_by_hand(tokenizer):
    examples = questions(30, sentences=20)
    found = windows(examples, tokenizer, 40, 8)
    assert len(found) > 60
    expected = [
        (i, *parts) for i, e in enumerate(examples) for parts in naive_windows(tokenizer, e, 40, 8)
    ]
    assert len(found) == len(expected)
    for window, (i, ids, types, offsets) in zip(found, expected, strict=True):
        assert window.example == i
        assert window.inputs["input_ids"].tolist() == ids
        assert window.inputs["token_type_ids"].tolist() == types
        assert list(map(tuple, window.offsets.tolist())) == offsets
        assert window.n_tokens <= 40


def test_every_answer_is_labelled_in_just_the_windows_that_hold_all_of_it(tokenizer):
    context, _ = story(random.Random(3), 12)
    cut = [pair for _, pair in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(context)]
    spans = [(a, b) for i, (a, _) in enumerate(cut) for _, b in cut[i : i + 6]]
    examples = [
        QuestionAnsweringExample("q", "What is red?", context, (context[a:b],), (a,), "q")
        for a, b in spans
    ]
    found = windows(examples, tokenizer, 36, 10)
    held = 0
    for window in found:
        first, last = spans[window.example]
        offsets = window.offsets.tolist()
        covered = [i for i, (a, b) in enumerate(offsets) if a >= first and b <= last and a >= 0]
        whole = (
            bool(covered) and offsets[covered[0]][0] == first and offsets[covered[-1]][1] == last
        )
        expected = (covered[0], covered[-1]) if whole else (0, 0)
        assert (window.start, window.end) == expected
        held += whole
    # Shorter than what windows share, an answer is whole in one window or in two.
    assert {w.example for w in found if w.start} == set(range(len(spans)))
    assert len(spans) < held < len(found)


@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("The café in Zürich is red. Ok.", "café in Zürich"),
        ("x " * 20 + "naïve 東京 is blue", "東京"),
        ("It is 🙂🙃 red 🙂", "🙃 red"),
        ("e\u0301tude is green", "e\u0301tude"),
        ("The car\t\n is\u00a0red", "is\u00a0red"),
        ("The car is red", " red"),
    ],
)
@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_labels_of_unicode_answers_stand_for_the_same_characters(kind, context, answer, tokenizer):
    chosen = tokenizer if kind == "words" else tiny_tokenizer()
    found = windows([qa("What?", context, answer)], chosen, 64, 16)
    labelled = [w for w in found if w.end]
    assert labelled
    for window in labelled:
        text = context[window.offsets[window.start, 0] : window.offsets[window.end, 1]]
        # A word piece cannot end inside a word of unknown characters.
        assert answer.strip() in text if kind == "words" else answer.strip() == text.strip()


def test_real_answers_are_labelled(tokenizer, data_dir):
    with gzip.open(data_dir / "squad" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, 50)]
    examples = [qa(r["question"], r["context"], r["answers"]["text"][0]) for r in rows]
    found = windows(examples, tiny_tokenizer(), 384, 128)
    assert {w.example for w in found if w.end} == set(range(50))
    for window in found:
        if window.end:
            a, b = window.offsets[window.start, 0], window.offsets[window.end, 1]
            answer = examples[window.example].answers[0]
            assert examples[window.example].context[a:b].strip() == answer.strip()


def test_a_long_question_is_cut_and_leaves_room_for_the_context(tokenizer):
    context, _ = story(random.Random(0), 8)
    found = windows([qa("What is red? " * 40, context, "The")], tokenizer, 40, 30)
    assert max(w.n_tokens for w in found) == 40
    assert all((w.offsets[:, 0] >= 0).sum() >= 2 for w in found)
    covered = {tuple(pair) for w in found for pair in w.offsets.tolist() if pair[0] >= 0}
    plain = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    assert covered == set(plain.offset_mapping)


def test_bad_input_is_named(tokenizer):
    with pytest.raises(BadRecipe, match="max_length 16"):
        windows(questions(1), tokenizer, 16, 4)
    with pytest.raises(BadRecipe, match="fast tokenizer"):
        windows(questions(1), SimpleNamespace(is_fast=False), 64, 4)
    with pytest.raises(BadData, match="no examples"):
        HEAD.encode([], tokenizer, 64)


def test_loss_equals_transformers_loss_whatever_the_batch(bert, tokenizer):
    items = HEAD.encode(questions(8), tokenizer, 40)
    assert len({HEAD.length(item) for item in items}) > 1
    expected = 0.0
    for item in items:
        ids = torch.tensor(item.inputs["input_ids"][None].astype(np.int64))
        types = torch.tensor(item.inputs["token_type_ids"][None].astype(np.int64))
        start, end = torch.tensor([item.start]), torch.tensor([item.end])
        output = bert(input_ids=ids, token_type_ids=types, start_positions=start, end_positions=end)
        expected += float(output.loss.detach())
    batch = HEAD.collate(items)
    assert batch["input_ids"].shape[1] == max(map(HEAD.length, items))
    assert int(HEAD.n_targets(batch)) == len(items) == len(batch["labels"])
    assert float(HEAD.loss(bert, batch).detach()) == pytest.approx(expected, rel=1e-5)


def test_loss_of_a_decoder_does_not_depend_on_padding():
    tokenizer = tiny_tokenizer()
    llama = model_of("llama", len(tokenizer), max_position_embeddings=256)
    items = HEAD.encode(questions(5), tokenizer, 128)
    apart = sum(float(HEAD.loss(llama, HEAD.collate([item])).detach()) for item in items)
    together = float(HEAD.loss(llama, HEAD.collate(items)).detach())
    assert together == pytest.approx(apart, rel=1e-5)


def naive_prediction(model, tokenizer, example, *, n_best, longest):
    """The post-processing of transformers' own example, window by window, one at a time."""
    null, spans = float("inf"), []
    for ids, types, offsets in naive_windows(tokenizer, example, 40, 8):
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types]))
        start, end = output.start_logits[0].numpy(), output.end_logits[0].numpy()
        null = min(null, float(start[0] + end[0]))
        inside = [i for i, pair in enumerate(offsets) if pair[0] >= 0]
        for s in sorted(inside, key=lambda i: -start[i])[:n_best]:
            for e in sorted(inside, key=lambda i: -end[i])[:n_best]:
                if s <= e < s + longest:
                    text = example.context[offsets[s][0] : offsets[e][1]]
                    spans.append((float(start[s] + end[e]), text))
    score, text = max(spans, default=(-1e9, ""))
    return text, null - score


@pytest.mark.parametrize(("n_best", "longest"), [(1000, 5), (20, 30), (4, 5)])
def test_predictions_equal_the_published_post_processing(bert, tokenizer, n_best, longest):
    examples = questions(30, sentences=12)
    naive = [
        naive_prediction(bert, tokenizer, example, n_best=n_best, longest=longest)
        for example in examples
    ]
    lower, upper = sorted(score for _, score in naive)[14:16]
    found = predictions(
        bert,
        tokenizer,
        examples,
        n_best=n_best,
        max_answer_length=longest,
        no_answer_threshold=(lower + upper) / 2,
    )
    for i, (example, (text, score)) in enumerate(zip(examples, naive, strict=True)):
        record = found[i]
        assert record["best_span"] == text
        assert record["no_answer_score"] == pytest.approx(score, abs=2e-4)
        assert record["prediction"] == ("" if score >= upper else text)
        golds = list(example.answers) or [""]
        assert record["gold"] == list(example.answers)
        assert record["id"] == example.id
        assert record["exact"] == (words(record["prediction"]) in list(map(words, golds)))
        assert record["f1"] == pytest.approx(
            max(naive_f1(gold, record["prediction"]) for gold in golds)
        )


def test_answers_are_given_where_every_question_has_one(bert, tokenizer):
    examples = questions(12)
    found = predictions(bert, tokenizer, examples, has_unanswerable=False)
    assert all(record["prediction"] for record in found.values())
    assert all("no_answer_score" not in record for record in found.values())


def test_threshold_moves_predictions_to_no_answer(bert, tokenizer):
    examples = questions(12)
    scores = [r["no_answer_score"] for r in predictions(bert, tokenizer, examples).values()]
    cut = float(np.median(scores))
    found = predictions(bert, tokenizer, examples, no_answer_threshold=cut).values()
    assert [r["prediction"] == "" for r in found] == [r["no_answer_score"] > cut for r in found]


def test_batch_size_changes_no_prediction(bert, tokenizer):
    examples = questions(20, sentences=12)
    single = predictions(bert, tokenizer, examples, batch_tokens=1)
    many = predictions(bert, tokenizer, examples, batch_tokens=4000)
    assert sorted(single) == list(range(20))
    for index, record in single.items():
        assert many[index].pop("no_answer_score") == pytest.approx(
            record.pop("no_answer_score"), abs=2e-4
        )
        assert many[index] == record


def test_no_batch_exceeds_its_bound(bert, tokenizer):
    shapes = []
    bert.register_forward_pre_hook(
        lambda module, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)),
        with_kwargs=True,
    )
    predictions(bert, tokenizer, questions(20, sentences=12), batch_tokens=160)
    assert len(shapes) > 3
    assert all(rows * length <= 160 for rows, length in shapes)
    assert shapes[0][1] == max(length for _, length in shapes)


def test_done_examples_are_left_out(bert, tokenizer):
    examples = questions(9)
    whole = predictions(bert, tokenizer, examples)
    rest = predictions(bert, tokenizer, examples, done={0, 4, 5})
    assert sorted(rest) == [1, 2, 3, 6, 7, 8]
    assert all(rest[i]["best_span"] == whole[i]["best_span"] for i in rest)
    assert predictions(bert, tokenizer, examples, done=set(range(9))) == {}


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "llama"])
def test_contexts_longer_than_the_model_reads_are_windowed(kind, tokenizer):
    chosen = tiny_tokenizer() if kind == "llama" else tokenizer
    changes = {} if kind == "distilbert" else {"pad_token_id": 0}
    model = model_of(kind, len(chosen), **changes)
    if kind == "roberta":  # its tokenizer makes no types
        chosen = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            pad_token="[PAD]",
            model_input_names=["input_ids", "attention_mask"],
        )
    found = predictions(model, chosen, questions(4, sentences=30), max_length=384)
    assert sorted(found) == [0, 1, 2, 3]
    assert all(record["best_span"] in record["context"] for record in found.values())


def test_training_reaches_f1_of_one(tokenizer):
    examples = questions(8, sentences=8, seed=1)
    model = model_of("bert", len(tokenizer), initializer_range=0.02)
    items = HEAD.encode(examples, tokenizer, 40)
    assert len(items) > len(examples)
    batch = HEAD.collate(items)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(250):
        loss = HEAD.loss(model, batch) / HEAD.n_targets(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if float(loss.detach()) < 0.01:
            break
    # Windows as in training: their stride is bounded there by a third of their length.
    found = predictions(model, tokenizer, examples, stride=128)
    assert [record["f1"] for record in found.values()] == [1.0] * 8
    assert [record["exact"] for record in found.values()] == [1.0] * 8


def test_best_threshold_equals_trying_them_all():
    rng = random.Random(5)
    for _ in range(30):
        records = []
        for _ in range(rng.randint(1, 25)):
            gold = [] if rng.random() < 0.5 else ["red door"]
            span = rng.choice(["red door", "door", "car"])
            score = round(rng.gauss(1.0 if not gold else -1.0, 1.5), 1)
            records.append({"gold": gold, "best_span": span, "no_answer_score": score})

        def total(threshold: float, records: list = records) -> float:
            answers = ["" if r["no_answer_score"] > threshold else r["best_span"] for r in records]
            pairs = zip(records, answers, strict=True)
            return sum(naive_f1((r["gold"] or [""])[0], answer) for r, answer in pairs)

        tried = [-100.0, *(record["no_answer_score"] for record in records)]
        threshold, f1 = best_threshold(records)
        assert f1 * len(records) == pytest.approx(max(map(total, tried)))
        assert total(threshold) == pytest.approx(f1 * len(records))


def test_best_threshold_needs_unanswerable_questions():
    with pytest.raises(BadData, match="no_answer_score"):
        best_threshold([{"gold": ["x"], "prediction": "x"}])
    with pytest.raises(BadData, match="no_answer_score"):
        best_threshold([])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_language_model_gets_a_reading_head_over_its_own_weights(
    family: str, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(family, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reader, _ = load_model(tmp_path, head="question-answering")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model.base_model(input_ids=ids).last_hidden_state
        given = reader.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(given, expected)
    reader.save_pretrained(tmp_path / "reader")
    tokenizer.save_pretrained(tmp_path / "reader")
    again, _ = load_model(tmp_path / "reader", head="question-answering")
    with torch.no_grad():
        torch.testing.assert_close(
            again(input_ids=ids).start_logits, reader(input_ids=ids).start_logits
        )
