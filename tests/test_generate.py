"""Greedy decoding against transformers' own `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_llama import tiny_llama, tiny_tokenizer
from tiny_models import logits_of, tiny_model, token_ids
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from elastune.decoding import SlotRows, supports_slots
from elastune.errors import BadRecipe
from elastune.generate import end_of_sequence_ids, generate, generate_each

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
    model.register_forward_hook(lambda _m, _a, out: _force(out, newline[0]))
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


MIXED = ["sliding_attention", "full_attention"]
#: Family -> (changes of the tiny model, whether its rows live in slots).
FAMILIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", {}, True),
    "one kv head": ("llama", {"num_key_value_heads": 1}, True),
    "qwen3": ("qwen3", {}, True),
    "mistral window": ("mistral", {"sliding_window": 6}, True),
    "gemma3": ("gemma3_text", {"sliding_window": 6, "layer_types": MIXED}, True),
    "gemma2": (
        "gemma2",
        {"sliding_window": 6, "layer_types": MIXED, "attn_implementation": "eager"},
        False,
    ),
    "phi3": ("phi3", {}, True),
}


def family_model(family: str, tokenizer) -> Any:
    model_type, changes, _ = FAMILIES[family]
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    return tiny_model(model_type, **(sizes | {"initializer_range": 0.4} | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_every_family_equal_transformers_generate(tokenizer, family) -> None:
    model = family_model(family, tokenizer)
    assert supports_slots(model) == FAMILIES[family][2]
    model.generation_config.eos_token_id = list(range(2, len(tokenizer), 9))
    # A beginning in common, longer than the windows; rows that leave and rows that move up.
    prompts = ["Natalia sold clips to 48" + prompt for prompt in PROMPTS]
    expected = [reference(model, tokenizer, p, 16) for p in prompts]
    for max_batch in (1, 3, 64):
        texts = generate(model, tokenizer, prompts, max_new_tokens=16, max_batch=max_batch)
        assert texts == expected


def test_slots_step_by_step_have_the_logits_of_whole_rows(tokenizer) -> None:
    model = family_model("gemma3", tokenizer)
    prompts = [[5, 6, 7, *ids] for ids in token_ids(4, 9, 1, 14)]
    rows = SlotRows(model, 3, 40, preamble=[5, 6, 7])
    texts = prompts[:2]

    def check(logits: torch.Tensor, which: list[list[int]]) -> None:
        for line, ids in zip(logits, which, strict=True):
            whole = logits_of(model, torch.tensor([ids]))[0, -1]
            torch.testing.assert_close(line, whole, atol=1e-4, rtol=0)
            torch.testing.assert_close(rows.alone(ids), whole, atol=1e-4, rtol=0)

    with torch.inference_mode():
        check(rows.add(texts), texts)
        for token in (9, 10, 11):
            texts = [[*ids, token + i] for i, ids in enumerate(texts)]
            check(rows.step([token, token + 1]), texts)
        check(rows.add([prompts[2]]), [prompts[2]])
        texts = [texts[1], prompts[2]]
        rows.select([2, 1])
        texts.reverse()
        texts = [[*ids, 12] for ids in texts]
        check(rows.step([12, 12]), texts)
        check(rows.add([prompts[3]]), [prompts[3]])
        texts = [[*ids, 13] for ids in [*texts, prompts[3]]]
        check(rows.step([13, 13, 13]), texts)


def tied(model: Any) -> None:
    """Give every token a twin with the same output weights, up to float32 noise."""
    with torch.no_grad():
        weight = model.lm_head.weight
        half = len(weight) // 2
        weight[half : 2 * half] = weight[:half] * (1 + 1e-7)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_ties_are_settled_alike_in_every_batch(tokenizer, family) -> None:
    model = family_model(family, tokenizer)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    tied(model)
    model.generation_config.eos_token_id = None
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None

    def texts(**options: Any) -> list[list[str]]:
        return [
            generate(model, tokenizer, PROMPTS, max_new_tokens=12, max_batch=n, **options)
            for n in (1, 2, 5, 64)
        ]

    settled = texts()
    assert settled == [settled[0]] * 4
    # What the rule is there for:
    loose = texts(settle_ties=False)
    assert loose != [loose[0]] * 4


@pytest.mark.parametrize(("settle", "dtype"), [(None, torch.bfloat16), (False, torch.float32)])
def test_ties_are_left_alone_at_half_precision_or_on_demand(tokenizer, settle, dtype) -> None:
    model = family_model("llama", tokenizer)
    tied(model)
    model.to(dtype)
    alone = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotRows, "alone", lambda self, ids: alone.append(ids) or torch.zeros(9))
        generate(model, tokenizer, PROMPTS, max_new_tokens=4, settle_ties=settle)
        assert alone == []
        generate(model, tokenizer, PROMPTS, max_new_tokens=4, settle_ties=True)
        assert alone


def test_texts_come_as_they_are_finished(model, tokenizer) -> None:
    steps: list[int] = []
    model.register_forward_hook(lambda *_: steps.append(1))
    seen = {}
    for index, _text in generate_each(
        model, tokenizer, PROMPTS, max_new_tokens=30, is_finished=lambda text: "a" in text
    ):
        seen[index] = len(steps)
    assert seen.keys() == set(range(len(PROMPTS)))
    assert len(set(seen.values())) > 1


def test_waiting_prompts_take_the_place_of_finished_ones(model, tokenizer) -> None:
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _m, _a, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    generate(model, tokenizer, [f"{i} + 4 =" for i in range(12)], max_new_tokens=9, max_batch=4)
    steps = [n for n in rows if n > 1]
    assert max(steps) == 4
    assert sum(steps) / len(steps) > 3


def test_a_common_beginning_is_read_once(model, tokenizer) -> None:
    tokens: list[int] = []
    model.register_forward_pre_hook(
        lambda _m, _a, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    prompts = ["Natalia sold clips to 48 of her friends. " + p for p in ("x", "3 + 4 =", "Derek")]
    supports_slots(model)
    trial = sum(tokens)
    tokens.clear()
    generate(model, tokenizer, prompts, max_new_tokens=1)
    whole = sum(len(tokenizer(prompt).input_ids) for prompt in prompts)
    common = len(tokenizer("Natalia sold clips to 48 of her friends.").input_ids)
    assert sum(tokens) - trial <= whole - 2 * common
