"""The law of packing: a packed row computes what each of its sequences computes alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import VARIANTS, encoded, heads_of, tiny_model, tiny_variant
from torch import Tensor

from elastune.data import IGNORED_LABEL, PackedBatch, pack
from elastune.losses import completion_loss
from elastune.models.families import known_model_types
from elastune.packing import (
    Segment,
    packed_attention,
    padded_rows,
    reads_packed_rows,
    row_attention,
    segment_attention,
    supports_packed_attention,
    supports_segments,
)

LENGTHS = (7, 20, 2, 13)  # longer and shorter than the sliding windows below
WINDOW = 5
MIXED = ["sliding_attention", "full_attention"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-no-gqa": ("llama", {"num_key_value_heads": 4}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "mistral-window": ("mistral", {"sliding_window": WINDOW}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2-mixed": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED},
    ),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3_text", {"sliding_window": WINDOW, "layer_types": MIXED}),
    "gemma3-no-gqa": (
        "gemma3_text",
        {"sliding_window": WINDOW, "layer_types": MIXED, "num_key_value_heads": 4},
    ),
    # A scale of the scores that is not 1 / sqrt(head size).
    "gemma3-scaled": (
        "gemma3_text",
        {"sliding_window": WINDOW, "layer_types": MIXED, "query_pre_attn_scalar": 50},
    ),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": WINDOW,
            "layer_types": MIXED,
            "attn_logit_softcapping": 2.0,
            "attn_implementation": "eager",
        },
    ),
}


def build(family: str) -> Any:
    model_type, changes = FAMILIES[family]
    return tiny_model(model_type, **changes)


def packed_logits(model: Any, batch: PackedBatch) -> Tensor:
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.positions}
    if supports_packed_attention(model):
        inputs["sequence_starts"] = tuple(batch.starts.tolist())
    with packed_attention(model):
        return model(**inputs, use_cache=False).logits[0]


def logits_alone(model: Any, batch: PackedBatch) -> Tensor:
    """The stock model, one call per sequence: no positions, no masks, nothing packed."""
    starts = batch.starts.tolist()
    rows = [batch.input_ids[:, a:b] for a, b in pairwise(starts)]
    return torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_and_gradients_are_those_of_each_sequence_alone(family: str) -> None:
    batch = pack(encoded(*LENGTHS))
    model = build(family)
    expected = logits_alone(model, batch)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, list(model.parameters()), upstream, allow_unused=True)
    found = packed_logits(model, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    gradients = torch.autograd.grad(found, list(model.parameters()), upstream, allow_unused=True)
    for (name, _), mine, theirs in zip(model.named_parameters(), gradients, wanted, strict=True):
        assert mine is not None, name
        torch.testing.assert_close(mine, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("family", ["mistral-window", "qwen2-mixed", "gemma3", "gemma2"])
def test_the_windows_of_these_models_really_cut(family: str) -> None:
    model_type, changes = FAMILIES[family]
    wide = tiny_model(model_type, **(changes | {"sliding_window": 64}))
    batch = pack(encoded(*LENGTHS))
    with torch.no_grad():
        assert (logits_alone(wide, batch) - logits_alone(build(family), batch)).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2"])
def test_a_sequence_does_not_see_its_neighbours(family: str) -> None:
    model = build(family)
    batch = pack(encoded(*LENGTHS))
    start, stop = batch.starts.tolist()[1:3]
    other = batch.input_ids.clone()
    other[:, :start] = 3
    other[:, stop:] = 4
    changed = PackedBatch(other, batch.labels, batch.positions, batch.starts)
    with torch.no_grad():
        before, after = packed_logits(model, batch), packed_logits(model, changed)
    torch.testing.assert_close(after[start:stop], before[start:stop], atol=1e-6, rtol=0)
    assert not torch.allclose(after[:start], before[:start])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_attention_of_the_model_is_put_back(implementation: str) -> None:
    model = tiny_model("llama", attn_implementation=implementation)
    with packed_attention(model):
        assert model.config._attn_implementation == "elastune_packed"
        with packed_attention(model):
            pass
        assert model.config._attn_implementation == "elastune_packed"
    assert model.config._attn_implementation == implementation

    with pytest.raises(KeyError), packed_attention(model):
        raise KeyError("in the middle")
    assert model.config._attn_implementation == implementation


def test_models_that_cap_their_scores_keep_their_own_attention() -> None:
    model = build("gemma2")
    assert not supports_packed_attention(model)
    with packed_attention(model):
        assert model.config._attn_implementation == "eager"


DECODERS = [
    name
    for name in (*known_model_types(), *VARIANTS)
    if "causal-lm" in heads_of(VARIANTS.get(name, (name,))[0])
]
#: Their attention is code of their own, blind to restarting positions and to the registry.
OWN_ATTENTION = ("bloom", "mpt", "falcon")


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_packed_loss_of_every_decoder_is_that_of_each_sequence_alone(
    name: str, trained_head: bool
) -> None:
    model = tiny_variant(name, "causal-lm").requires_grad_(trained_head)
    examples = encoded(*LENGTHS)
    expected = torch.tensor(0.0)
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor([example.input_ids])
            logits = model(input_ids=ids[:, :-1]).logits[0]
            first = example.n_prompt - 1  # the position that predicts the completion's first token
            expected += torch.nn.functional.cross_entropy(
                logits[first:], ids[0, first + 1 :], reduction="sum"
            )
        with packed_attention(model):
            loss, count = completion_loss(model, pack(examples))
    assert count == sum(LENGTHS) - 2 * len(LENGTHS)
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
    assert reads_packed_rows(model) == (name.partition("-")[0] not in OWN_ATTENTION)


def test_padded_rows_hold_the_sequences_one_below_the_other() -> None:
    rows = padded_rows(torch.tensor([[5, 6, 7, 8, 9, 3]]), torch.tensor([0, 2, 5, 6]))
    assert rows.input_ids.tolist() == [[5, 6, 0], [7, 8, 9], [3, 0, 0]]
    assert rows.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert rows.input_ids.flatten()[rows.places].tolist() == [5, 6, 7, 8, 9, 3]


def test_packed_attention_without_starts_is_refused() -> None:
    model = build("llama")
    with packed_attention(model), pytest.raises(RuntimeError, match="needs sequence_starts"):
        model(input_ids=torch.tensor([[3, 4, 5]]))


def test_labels_are_what_each_position_must_predict() -> None:
    examples = encoded(5, 3, n_prompt=2)
    batch = pack(examples)
    a, b = (example.input_ids for example in examples)
    assert batch.input_ids[0].tolist() == a[:-1] + b[:-1]
    assert batch.labels[0].tolist() == [IGNORED_LABEL, *a[2:], IGNORED_LABEL, *b[2:]]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma2"])
def test_segments_with_a_prefix_compute_what_the_whole_sequences_compute(family: str) -> None:
    model = build(family)
    assert supports_segments(model)
    (shared, *rests) = [item.input_ids for item in encoded(9, 1, 12, 4)]
    ids, positions, segments = list(shared), list(range(9)), [Segment(0, 9)]
    for rest in rests:
        segments.append(Segment(len(ids), len(ids) + len(rest), (0, 9)))
        positions += range(9, 9 + len(rest))
        ids += rest
    with torch.no_grad(), segment_attention(model):
        inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
        found = model(**inputs, segments=tuple(segments), use_cache=False).logits[0]
    for rest, segment in zip(rests, segments[1:], strict=True):
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([shared + rest]), use_cache=False).logits[0, 9:]
        torch.testing.assert_close(found[segment.start : segment.stop], whole, atol=1e-5, rtol=0)


def test_models_with_attention_of_their_own_have_no_segments() -> None:
    assert not supports_segments(build("gemma2"))
    model = build("llama")
    assert supports_segments(model)
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert not supports_segments(model)


@pytest.mark.parametrize(
    ("attention", "missing"), [(segment_attention, "needs them"), (row_attention, "row_ends")]
)
def test_attention_without_its_layout_is_refused(attention: Any, missing: str) -> None:
    model = build("llama")
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match=missing), attention(model):
        model(input_ids=torch.tensor([[3, 4, 5]]))
    assert model.config._attn_implementation == before
