"""Trimmed vocabularies: the same logits where the tokens stay, a spelling for all other text."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_models import word_tokenizer
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from elastune.build_structure import structure_space
from elastune.errors import BadData, UnsupportedModel
from elastune.models import load_model, save_model
from elastune.supernet import SuperNetwork
from elastune.vocabulary import keep_rows_, token_changes, trim_vocabulary_

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TRAIN = ["an apple tree", "apples are red", "the red tree"]
UNSEEN = ["a tree of bread", "three reds", "zebra!"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def special_tokens(data: dict[str, Any]) -> dict[str, Any]:
    """Let [CLS] and [SEP] stand around a text."""
    ids = {token: i for i, token in enumerate(SPECIAL)}
    raw = Tokenizer.from_str(json.dumps(data))
    raw.add_special_tokens(list(SPECIAL))
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    found: dict[str, Any] = json.loads(raw.to_str())
    return found


def fast(raw: Tokenizer) -> PreTrainedTokenizerFast:
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    data = special_tokens(json.loads(raw.to_str()))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        **dict(zip(names, SPECIAL, strict=True)),
    )


def wordpiece() -> PreTrainedTokenizerFast:
    words = ["an", "apple", "##s", "tree", "are", "red", "the", "bread", "##read", "of", "t", "##h"]
    words += ["##ree", "three", "##reds", "zebra", *LETTERS, *(f"##{c}" for c in LETTERS)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    raw = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece()
    return fast(raw)


def bpe() -> PreTrainedTokenizerFast:
    merges = [("r", "e"), ("re", "d"), ("re", "e"), ("t", "ree"), ("t", "h"), ("th", "e")]
    merges += [("a", "p"), ("ap", "p"), ("l", "e"), ("app", "le"), ("apple", "s"), ("b", "re")]
    merges += [("e", "a"), ("b", "read"), ("re", "ad"), ("a", "d"), ("a", "n"), ("th", "ree")]
    tokens = [*SPECIAL, *LETTERS, "!", *("".join(m) for m in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    raw = Tokenizer(models.BPE(vocab, merges, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast(raw)


def unigram() -> PreTrainedTokenizerFast:
    pieces = [(token, 0.0) for token in SPECIAL]
    pieces += [("▁the", -2.0), ("▁tree", -3.0), ("▁red", -3.1), ("▁apple", -4.0), ("s", -2.5)]
    pieces += [("▁an", -3.2), ("▁are", -3.3), ("tr", -5.0), ("ee", -5.1), ("▁bread", -5.2)]
    pieces += [("▁", -2.2), ("read", -5.5), ("zebra", -20.0)]
    pieces += [(letter, -6.0 - 0.01 * i) for i, letter in enumerate(LETTERS) if letter != "s"]
    raw = Tokenizer(models.Unigram(pieces, unk_id=1))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    return fast(raw)


KINDS = {"wordpiece": wordpiece, "bpe": bpe, "unigram": unigram}
AUTOS = {"masked": AutoModelForMaskedLM, "classifier": AutoModelForSequenceClassification}


def model_for(tokenizer: PreTrainedTokenizerBase, family: str, auto: Any, **changes: Any) -> Any:
    return tiny_model(family, auto=auto, vocab_size=len(tokenizer), **changes)


@torch.no_grad()
def logits(model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    found: Tensor = model.eval()(**batch)[0]
    return found


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])  # type: ignore[return-value]


# --- the law --------------------------------------------------------------------------------------


SCRIPT = """
import json, sys, torch, transformers
found = {}
for folder, auto in json.loads(sys.argv[1]).items():
    model = getattr(transformers, auto).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(json.loads(sys.argv[2]), padding=True, return_tensors="pt")
    with torch.no_grad():
        found[folder] = model(**batch)[0].tolist()
assert "elastune" not in sys.modules
print(json.dumps(found))
"""


def test_texts_of_kept_tokens_have_the_same_logits_in_a_fresh_process(tmp_path: Path) -> None:
    expected, cases = {}, {}
    for kind, make in KINDS.items():
        for name, auto in AUTOS.items():
            tokenizer = make()
            model = model_for(tokenizer, "bert", auto)
            before = logits(model, tokenizer, TRAIN)
            model, trimmed, report = trim_vocabulary_(model, tokenizer, TRAIN)
            assert report.rows_after == len(trimmed) < len(tokenizer) == report.rows_before
            folder = str(tmp_path / f"{kind}-{name}")
            save_model(model, trimmed, folder)
            cases[folder] = auto.__name__
            expected[folder] = before[..., list(report.kept)] if name == "masked" else before
    command = [sys.executable, "-c", SCRIPT, json.dumps(cases), json.dumps(TRAIN)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, found in json.loads(done.stdout.splitlines()[-1]).items():
        torch.testing.assert_close(torch.tensor(found), expected[folder], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_whose_tokens_stay_is_tokenised_as_before(kind: str) -> None:
    old = KINDS[kind]()
    _, new, report = trim_vocabulary_(model_for(old, "bert", AutoModel), old, TRAIN)
    kept = set(report.kept)
    words = [*" ".join([*TRAIN, *UNSEEN]).split(), "appletree", "redread", "thered", "anarea", "q"]
    texts = [f"{a} {b}" for a in words for b in words] + [a + b for a in words for b in words]
    compared = 0
    for text in texts:
        if kept.issuperset(old(text)["input_ids"]):  # type: ignore[arg-type]
            compared += 1
            assert tokens(new, text) == tokens(old, text)
    assert compared > 100


@pytest.mark.parametrize("kind", KINDS)
def test_other_words_fall_back_to_pieces_and_none_become_unknown(kind: str) -> None:
    old = KINDS[kind]()
    _, new, _ = trim_vocabulary_(model_for(old, "bert", AutoModel), old, TRAIN)
    changes = token_changes(old, new, UNSEEN)
    assert changes.texts == 3
    assert 0 < changes.texts_changed <= 3
    assert changes.unknown_after == changes.unknown
    assert changes.tokens_after > changes.tokens > changes.tokens_lost > 0
    assert token_changes(old, new, TRAIN).texts_changed == 0


def test_an_unknown_character_costs_what_it_did_although_the_least_likely_piece_is_unused() -> None:
    # zebra (-20) is in no text; without it "tr?" could be cheaper with an unknown.
    old = unigram()
    _, new, _ = trim_vocabulary_(model_for(old, "bert", AutoModel), old, TRAIN)
    scores = dict(json.loads(new.backend_tokenizer.to_str())["model"]["vocab"])  # type: ignore[attr-defined]
    assert min(scores.values()) == -20.0
    assert "read" not in scores


def test_merges_stay_that_kept_tokens_are_made_by_and_no_other() -> None:
    old = bpe()
    _, new, _ = trim_vocabulary_(model_for(old, "bert", AutoModel), old, ["apple"])
    model = json.loads(new.backend_tokenizer.to_str())["model"]  # type: ignore[attr-defined]
    assert ["".join(merge) for merge in model["merges"]] == ["ap", "app", "le", "apple"]
    assert list(model["vocab"].values()) == list(range(len(model["vocab"])))


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "deberta-v2", "distilbert"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_the_head_of_a_masked_model_keeps_its_tie_rows_and_bias(family: str, is_tied: bool) -> None:
    tokenizer = wordpiece()
    model = model_for(tokenizer, family, AutoModelForMaskedLM, tie_word_embeddings=is_tied)
    head: Any = model.get_output_embeddings()
    with torch.no_grad():
        head.bias.copy_(torch.randn(len(tokenizer)))
    before = logits(model, tokenizer, TRAIN)
    n_biases = sum(p.shape == (len(tokenizer),) for p in model.parameters())
    _, trimmed, report = trim_vocabulary_(model, tokenizer, TRAIN)
    after = logits(model, trimmed, TRAIN)
    torch.testing.assert_close(after, before[..., list(report.kept)], rtol=0, atol=1e-6)
    assert (head.weight is model.get_input_embeddings().weight) == is_tied
    gone = report.rows_before - report.rows_after
    width = head.weight.shape[1]
    assert report.params_removed == gone * (n_biases + width * (1 if is_tied else 2))
    assert report.bytes_removed == 4 * report.params_removed


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_trimmed_language_model_generates_the_same_text(is_tied: bool) -> None:
    tokenizer = bpe()
    model = model_for(tokenizer, "llama", AutoModelForCausalLM, tie_word_embeddings=is_tied)
    allowed = [i for token, i in tokenizer.get_vocab().items() if token not in ("bread", "ea")]
    prompt = tokenizer("the apple", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    said = model.generate(prompt, suppress_tokens=[tokenizer.get_vocab()["bread"]], **options)
    texts = [said[0].tolist(), allowed]
    _, trimmed, report = trim_vocabulary_(model, tokenizer, texts)
    ids = trimmed("the apple", return_tensors="pt")["input_ids"]
    after = model.generate(ids, **options)
    assert trimmed.convert_ids_to_tokens(after[0]) == tokenizer.convert_ids_to_tokens(said[0])
    assert report.rows_after == report.rows_before - 2
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied


def test_special_ids_in_both_configs_are_those_of_the_new_tokenizer() -> None:
    tokenizer = word_tokenizer()
    size = len(tokenizer)
    model = tiny_model("llama", vocab_size=size, pad_token_id=tokenizer.unk_token_id)
    end = tokenizer.eos_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    model.generation_config.suppress_tokens = list(range(size))
    word = max(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    _, trimmed, report = trim_vocabulary_(model, tokenizer, [word])
    config, generation = model.config, model.generation_config
    assert config.vocab_size == len(trimmed) == model.vocab_size
    assert config.eos_token_id == generation.eos_token_id == trimmed.eos_token_id
    assert config.pad_token_id == trimmed.unk_token_id == model.get_input_embeddings().padding_idx
    assert generation.suppress_tokens == list(range(report.rows_after))


def test_positions_that_count_from_the_pad_id_do_not_move() -> None:
    # RoBERTa's positions begin after the pad token's number: the ids below it must stay.
    words = ["unused", "unused2", *SPECIAL[1:], "[PAD]", "red", *LETTERS]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )
    model = model_for(tokenizer, "roberta", AutoModel, pad_token_id=6)
    texts = ["red", "red red red"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    before = model(**batch)[0]
    _, trimmed, report = trim_vocabulary_(model, tokenizer, texts)
    after = model(**trimmed(texts, padding=True, return_tensors="pt"))[0]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert trimmed.pad_token_id == 6
    assert report.kept[:2] == (0, 1)


def test_a_second_model_of_the_same_vocabulary_follows() -> None:
    tokenizer = wordpiece()
    teacher = model_for(tokenizer, "bert", AutoModelForSequenceClassification, seed=3)
    before = logits(teacher, tokenizer, TRAIN)
    student = model_for(tokenizer, "bert", AutoModel)
    _, trimmed, report = trim_vocabulary_(student, tokenizer, TRAIN)
    keep_rows_(teacher, report.kept)
    torch.testing.assert_close(logits(teacher, trimmed, TRAIN), before, rtol=0, atol=0)


def test_rows_that_no_token_stands_for_are_dropped_and_gradients_still_flow() -> None:
    tokenizer = wordpiece()
    model = tiny_model("bert", auto=AutoModel, vocab_size=len(tokenizer) + 40)
    _, trimmed, report = trim_vocabulary_(model, tokenizer, TRAIN)
    table = model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    assert report.rows_after == len(trimmed) == table.num_embeddings == len(table.weight)
    model(**trimmed(TRAIN[0], return_tensors="pt"))[0].sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.shape == table.weight.shape


# --- what is kept and refused ---------------------------------------------------------------------


def test_texts_may_be_token_ids_and_further_tokens_may_be_kept() -> None:
    old = wordpiece()
    ids = [old(text)["input_ids"] for text in TRAIN]
    by_text = trim_vocabulary_(model_for(old, "bert", AutoModel), old, TRAIN)[2]
    by_ids = trim_vocabulary_(model_for(old, "bert", AutoModel), old, ids)[2]
    more = trim_vocabulary_(model_for(old, "bert", AutoModel), old, TRAIN, keep=["zebra"])[2]
    assert by_text.kept == by_ids.kept
    assert set(more.kept) - set(by_text.kept) == {old.get_vocab()["zebra"]}


def test_padding_and_truncation_of_the_tokenizer_hide_no_token_and_stay_as_they_are() -> None:
    old = wordpiece()
    old.backend_tokenizer.enable_truncation(4)
    old.backend_tokenizer.enable_padding(length=4, pad_id=0, pad_token="[PAD]")
    _, new, _ = trim_vocabulary_(model_for(old, "bert", AutoModel), old, TRAIN)
    assert {"tree", "red"} <= set(new.get_vocab())
    assert new.backend_tokenizer.truncation == old.backend_tokenizer.truncation  # type: ignore[attr-defined]
    assert new.backend_tokenizer.padding == old.backend_tokenizer.padding  # type: ignore[attr-defined]
    assert old.get_vocab()["zebra"], "the old tokenizer is as it was"


@pytest.mark.parametrize(
    ("texts", "keep", "message"),
    [
        ([], (), "no texts"),
        ("one text", (), "list of texts"),
        ([[2, 9999]], (), "token id 9999"),
        (TRAIN, ("zebr",), "did you mean 'zebra'"),
    ],
)
def test_bad_texts_and_tokens_are_refused_and_the_model_is_as_it_was(
    texts: Any, keep: Any, message: str
) -> None:
    old = wordpiece()
    model = model_for(old, "bert", AutoModel)
    before = model.get_input_embeddings().weight
    with pytest.raises(BadData, match=message):
        trim_vocabulary_(model, old, texts, keep=keep)
    assert model.get_input_embeddings().weight is before
    assert model.config.vocab_size == len(before)


def test_added_tokens_without_a_row_and_models_without_words_are_refused() -> None:
    old = wordpiece()
    model = model_for(old, "bert", AutoModel)
    old.add_tokens(["<new>"])
    with pytest.raises(UnsupportedModel, match="<new>"):
        trim_vocabulary_(model, old, TRAIN)
    with pytest.raises(UnsupportedModel, match="no embedding of tokens"):
        trim_vocabulary_(tiny_model("vit", auto=AutoModel), wordpiece(), TRAIN)


def test_an_elastic_embedding_is_not_trimmed() -> None:
    old = wordpiece()
    model = model_for(old, "bert", AutoModel)
    SuperNetwork(model, structure_space(model, embedding=[1.0, 0.5]))
    with pytest.raises(UnsupportedModel, match="trim the vocabulary first"):
        trim_vocabulary_(model, old, TRAIN)


@pytest.mark.parametrize("kept", [[], [0, 0], [0, 10**6], [-1]])
def test_rows_to_keep_must_be_rows(kept: list[int]) -> None:
    with pytest.raises(BadData, match="distinct and from 0"):
        keep_rows_(tiny_model("bert", auto=AutoModel), kept)


# --- real tokenizers ------------------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["minilm-l6", "smollm2-135m"])
def test_real_models_compute_the_same_with_a_third_of_the_vocabulary(name: str) -> None:
    texts = ["A gorgeous, witty, seductive movie.", "no apparent joy; 3 stars at best", "naïve ☃"]
    model, tokenizer = load_model(name)
    before = logits(model, tokenizer, texts)
    unknown = token_changes(tokenizer, tokenizer, texts).unknown
    _, trimmed, report = trim_vocabulary_(model, tokenizer, texts)
    after = logits(model, trimmed, texts)
    expected = before[..., list(report.kept)] if name.startswith("smollm") else before
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)
    assert report.rows_after < report.rows_before / 3
    assert token_changes(tokenizer, trimmed, texts).unknown_after == unknown
    strange = "Ünïcödé zyzzyva 日本"
    assert set(tokens(tokenizer, strange)) - set(tokens(trimmed, strange))
    if name.startswith("smollm"):
        assert trimmed.decode(trimmed(strange)["input_ids"]) == strange
