"""Greedy decoding against transformers' own `generate`."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_llama import tiny_llama, tiny_tokenizer
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from elastune.errors import BadRecipe
from elastune.generate import end_of_sequence_ids, generate

PROMPTS = [
    "How many",
    "Natalia sold clips to 48 of her friends. How many apples are there now?",
    "3 + 4 =",
    "A bucket contains",
    "The answer is",
    "If Derek adds 6.8 gallons more. " * 3,
    "x",
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny_llama(tokenizer)


def reference(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    new = ids[0, inputs.input_ids.shape[1] :].tolist()
    if new[-1] in end_of_sequence_ids(model, tokenizer):
        new.pop()
    return tokenizer.decode(new, skip_special_tokens=True)


def test_single_rows_equal_transformers_generate(model, tokenizer):
    texts = generate(model, tokenizer, PROMPTS, max_new_tokens=24, max_batch=1)
    assert texts == [reference(model, tokenizer, p, 24) for p in PROMPTS]


def test_batches_with_rows_leaving_early_equal_single_rows(model, tokenizer):
    # Many end-of-sequence ids, so that rows leave their batch at different steps.
    model.generation_config.eos_token_id = list(range(2, len(tokenizer), 9))
    alone = generate(model, tokenizer, PROMPTS, max_new_tokens=40, max_batch=1)
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=40)
    assert together == alone == [reference(model, tokenizer, p, 40) for p in PROMPTS]
    assert len({len(tokenizer(t).input_ids) for t in alone}) > 2


def test_small_token_budget_changes_no_text(model, tokenizer):
    whole = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_tokens=60) == whole


@pytest.mark.parametrize("family", ["bloom", "sliding window"])
def test_other_families_decode_in_batches_as_transformers_does(tokenizer, family):
    torch.manual_seed(0)
    shared = {"vocab_size": len(tokenizer), "hidden_size": 32, "initializer_range": 0.4}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "bloom":
        model = BloomForCausalLM(BloomConfig(n_layer=2, n_head=4, **shared, **special)).eval()
    else:
        config = MistralConfig(
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            sliding_window=8,
            **shared,
            **special,
        )
        model = MistralForCausalLM(config).eval()
    expected = [reference(model, tokenizer, p, 16) for p in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=16) == expected


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_wrapped_model_generates_like_its_merged_self(model, tokenizer):
    torch.manual_seed(1)
    wrapped = get_peft_model(
        model, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    texts = generate(wrapped, tokenizer, PROMPTS, max_new_tokens=10)
    merged = wrapped.merge_and_unload()
    assert texts == [reference(merged, tokenizer, p, 10) for p in PROMPTS]


def test_is_finished_ends_rows_and_saves_steps(model, tokenizer):
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    full = generate(model, tokenizer, PROMPTS, max_new_tokens=40)
    n_full = len(steps)
    steps.clear()
    cut = generate(
        model, tokenizer, PROMPTS, max_new_tokens=40, is_finished=lambda text: len(text) > 2
    )
    assert len(steps) < n_full / 2
    assert all(long.startswith(short) for long, short in zip(full, cut, strict=True))


def test_is_finished_is_asked_right_after_a_newline(model, tokenizer):
    newline = tokenizer("\n").input_ids
    assert len(newline) == 1
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every logit 0: argmax is the first id
    order = iter([newline[0]] * 3)
    model.register_forward_hook(lambda _m, _a, out: _force(out, next(order)))
    texts = generate(model, tokenizer, ["x"], max_new_tokens=9, is_finished=lambda t: "\n" in t)
    assert texts == ["\n"]


def _force(output, token: int):
    output.logits[..., token] = 1.0
    return output


def test_progress_counts_every_prompt_and_mode_is_restored(model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    seen = []
    generate(
        model,
        tokenizer,
        PROMPTS,
        max_new_tokens=3,
        max_batch=2,
        progress=lambda d, t: seen.append((d, t)),
    )
    assert seen == [(i, len(PROMPTS)) for i in range(1, len(PROMPTS) + 1)]
    assert model.training
    assert not model.model.layers[0].mlp.training


def test_end_ids_join_generation_config_and_tokenizer(model, tokenizer):
    model.generation_config.eos_token_id = [7, 8]
    assert end_of_sequence_ids(model, tokenizer) == {7, 8, tokenizer.eos_token_id}
    model.generation_config.eos_token_id = None
    assert end_of_sequence_ids(model, tokenizer) == {tokenizer.eos_token_id}


def test_empty_input_and_empty_prompt_are_allowed(model, tokenizer):
    assert generate(model, tokenizer, [], max_new_tokens=3) == []
    assert len(generate(model, tokenizer, [""], max_new_tokens=3)) == 1


def test_prompt_beyond_the_context_is_refused_with_the_way_out(model, tokenizer):
    with pytest.raises(BadRecipe, match="context of 256 tokens"):
        generate(model, tokenizer, ["answer " * 60], max_new_tokens=200)
