"""Hidden states and attention relations: losses against naive loops, and what hooks see."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import tiny_tokenizer
from tiny_models import encoded, tiny_model, tiny_net, tiny_variant
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from elastune.build_structure import structure_space
from elastune.config import TrainConfig
from elastune.errors import BadRecipe
from elastune.features import (
    FeatureHooks,
    Features,
    Sequences,
    hidden_loss,
    relation_heads,
    relation_loss,
    split_qkv,
)
from elastune.heads import HEADS, Head
from elastune.models.blocks import blocks
from elastune.sampling import FixedSampler, SandwichSampler
from elastune.subnetwork import extract_model
from elastune.supernet import SuperNetwork
from elastune.tasks.base import ClassificationExample
from elastune.teacher import CachedTeacher, Teacher
from elastune.train import train
from elastune.whole_model import WholeModel

EXAMPLES = encoded(9, 12, 5, 7, n_prompt=3)
TEXTS = ["3 + 4", "Natalia sold clips to 48 of her friends", "A", "How many apples are there now?"]
LABELLED = [ClassificationExample(text, None, i % 3, text) for i, text in enumerate(TEXTS)]
FUSED = ["phi3", "phi3-one-kv-head", "gpt2", "gpt_neox", "bloom", "mpt", "falcon"]
FUSED += ["falcon-multi-query", "falcon-one-kv-head", "falcon-old"]


def student(family: str, seed: int = 0, **changes: Any) -> tuple[Any, Head, list[Any]]:
    """Return a model without dropout, its head and its items."""
    if family == "llama":
        return tiny_model("llama", seed=seed, **changes), HEADS["causal-lm"], EXAMPLES
    head, tokenizer = HEADS["sequence-classification"], tiny_tokenizer()
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    size = {"vocab_size": len(tokenizer)}
    auto = AutoModelForSequenceClassification
    model = tiny_model(family, auto=auto, seed=seed, **(off | size | changes))
    return model, head, head.encode(LABELLED, tokenizer, 64)


def seen(model: Any, head: Head, batch: dict[str, Any]) -> tuple[FeatureHooks, Features]:
    hooks = FeatureHooks(model, hidden=True, relations=True)
    with head.training(model), hooks.capture() as found:
        head.outputs(model, batch)
    return hooks, hooks.features(found)


def by_hand(model: Any, item: Any) -> tuple[Tensor, list[Tensor]]:
    """Hidden states (L, D) and q, k, v (L, W) of one item alone, by stock means without hooks."""
    if hasattr(item, "inputs"):
        ids = {key: torch.tensor([value]) for key, value in item.inputs.items()}
        states = model(**ids, output_hidden_states=True).hidden_states
        layer = model.bert.encoder.layer[-1].attention.self
        into = states[-2][0]
        return states[-1][0], [layer.query(into), layer.key(into), layer.value(into)]
    base = model.model
    ids = torch.tensor([item.input_ids[:-1]])
    last: list[Tensor] = []
    handle = base.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    states = base(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    layer = base.layers[-1]
    into = layer.input_layernorm(states[-2][0])
    attention = layer.self_attn
    qkv = [attention.q_proj(into), attention.k_proj(into), attention.v_proj(into)]
    return last[0][0], qkv


def relations_by_hand(own: Tensor, wanted: Tensor, heads: int, causal: bool) -> Tensor:
    """Mean over heads and positions of KL(teacher || student), by the definition."""
    total = torch.zeros(())
    length = len(own)
    for a, b in zip(own.chunk(heads, dim=1), wanted.chunk(heads, dim=1), strict=True):
        for t in range(length):
            stop = t + 1 if causal else length
            q = (a[:stop] @ a[t] / math.sqrt(a.shape[1])).softmax(0)
            p = (b[:stop] @ b[t] / math.sqrt(b.shape[1])).softmax(0)
            total = total + (p * (p.log() - q.log())).sum()
    return total / heads / length


def losses_by_hand(model: Any, teacher: Any, items: list[Any], heads: tuple[int, ...]) -> Any:
    """Both losses, summed over targets."""
    hidden = relations = torch.zeros(())
    for item in items:
        count = 1 if hasattr(item, "inputs") else len(item.input_ids) - item.n_prompt
        own, own_qkv = by_hand(model, item)
        with torch.no_grad():
            wanted, wanted_qkv = by_hand(teacher, item)
        hidden = hidden + count * ((own - wanted) ** 2).mean()
        causal = not hasattr(item, "inputs")
        for a, b, n in zip(own_qkv, wanted_qkv, heads, strict=True):
            relations = relations + count * relations_by_hand(a, b, n, causal)
    return hidden, relations


@pytest.mark.parametrize(
    ("family", "changes", "heads"),
    [
        ("bert", {}, (4, 4, 4)),
        ("bert", {"num_attention_heads": 2}, (2, 2, 2)),  # those of the teacher
        ("llama", {}, (4, 2, 2)),  # two key/value heads
        ("llama", {"num_key_value_heads": 4, "num_attention_heads": 8}, (8, 4, 4)),
    ],
)
def test_both_losses_equal_naive_loops_and_only_the_student_learns(
    family: str, changes: dict[str, Any], heads: tuple[int, ...]
) -> None:
    model, head, items = student(family)
    teacher = student(family, seed=1, **changes)[0]
    batch = head.collate(items)
    hooks, own = seen(model, head, batch)
    _, wanted = seen(teacher, head, batch)
    sequences = head.sequences(batch)
    assert len(sequences.mask) == len(items)
    hidden = hidden_loss(own, wanted, sequences)
    relations = relation_loss(own, wanted, sequences, causal=hooks.causal)
    assert relations is not None
    by_loops = losses_by_hand(model, teacher, items, heads)
    parameters = [p for n, p in model.named_parameters() if "layers.0" in n or "layer.0" in n]
    for loss, naive in zip((hidden, relations), by_loops, strict=True):
        torch.testing.assert_close(loss, naive, rtol=1e-4, atol=0)
        ours = torch.autograd.grad(loss, parameters, retain_graph=True)
        theirs = torch.autograd.grad(naive, parameters, retain_graph=True)
        for mine, their in zip(ours, theirs, strict=True):
            atol = 1e-4 * max(float(g.abs().max()) for g in theirs)
            torch.testing.assert_close(mine, their, atol=atol, rtol=1e-3)
    (hidden + relations).backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_copy_of_the_teacher_has_nothing_to_learn(family: str) -> None:
    model, head, items = student(family)
    batch = head.collate(items)
    hooks, own = seen(model, head, batch)
    assert hooks.causal == (family == "llama")
    sequences = head.sequences(batch)
    assert float(hidden_loss(own.detach(), own, sequences)) == 0
    loss = relation_loss(own, own.detach(), sequences, causal=hooks.causal)
    assert loss is not None
    assert float(loss.detach()) == 0
    gradients = torch.autograd.grad(loss, list(own.projections or ()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-6


def test_sequences_of_a_packed_batch_count_as_their_labelled_tokens() -> None:
    head = HEADS["causal-lm"]
    mask, targets = head.sequences(head.collate(EXAMPLES))
    assert mask.sum(1).tolist() == [8, 11, 4, 6]
    assert mask[2].tolist() == [True] * 4 + [False] * 7
    assert targets.tolist() == [6, 9, 2, 4]


@pytest.mark.parametrize(
    ("widths", "at_most", "heads"),
    [
        ((32, 32), 4, 4),
        ((448, 768), 12, 8),
        ((384, 768), 12, 12),
        ((7, 5), 5, 1),
        ((64, 768), 12, 8),
    ],
)
def test_relation_heads_divide_both_widths(
    widths: tuple[int, int], at_most: int, heads: int
) -> None:
    assert relation_heads(*widths, at_most=at_most) == heads


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_projection_is_taken_apart_as_its_units_say(name: str) -> None:
    model = tiny_variant(name, "causal-lm")
    block = blocks(model)[-1]
    qkv = block.module.get_submodule(block.record.roles["qkv"])
    x = torch.randn(2, 5, 32)
    hooks = FeatureHooks(model, hidden=False, relations=True)
    with torch.no_grad(), hooks.capture() as found:
        output = qkv(x)
    parts = hooks.features(found).projections
    assert parts is not None
    size, per, shape = block.head_dim, block.heads_per_unit, block.shape
    assert [part.shape[-1] // size for part in parts] == [
        shape.heads,
        shape.kv_heads,
        shape.kv_heads,
    ]
    # `Block.weights_of` tells the rows of each unit: its queries, its key, its value.
    for u in range(block.n_units("heads")):
        rows = next(iter(block.weights_of("heads", torch.tensor([u])))).index
        q, k, v = output[..., rows].split([per * size, size, size], -1)
        at = 0 if shape.kv_heads == 1 else u * size
        torch.testing.assert_close(parts[0][..., u * per * size : (u + 1) * per * size], q)
        torch.testing.assert_close(parts[1][..., at : at + size], k)
        torch.testing.assert_close(parts[2][..., at : at + size], v)
    if block.fixed_heads:
        return
    net = SuperNetwork(model, structure_space(model, heads=[4, 2]))
    net.activate(net.space.smallest())
    with torch.no_grad():
        small = split_qkv(qkv(x), block)
    assert small is not None
    kept = (2, block.kv_heads_at(2), block.kv_heads_at(2))
    for part, whole, n in zip(small, parts, kept, strict=True):
        torch.testing.assert_close(part, whole[..., : n * size])


@pytest.mark.parametrize("family", ["bert", "llama", "deberta-v2"])
def test_an_active_sub_network_shows_what_the_extracted_one_shows(family: str) -> None:
    model, head, items = student(family)
    batch = head.collate(items)
    space = structure_space(model, ffn=[48, 24], heads=[4, 2], round_to=8)
    net = SuperNetwork(model, space, train_base=True)
    small = extract_model(net, space.smallest()).model
    with torch.no_grad():
        _, wanted = seen(small, head, batch)
        with net.active(space.smallest()):
            _, own = seen(model, head, batch)
        _, full = seen(model, head, batch)
    assert own.projections is not None
    assert wanted.projections is not None
    assert full.projections is not None
    torch.testing.assert_close(own.hidden, wanted.hidden)
    for part, other, whole in zip(
        own.projections, wanted.projections, full.projections, strict=True
    ):
        torch.testing.assert_close(part, other)
        assert part.shape[-1] == whole.shape[-1] // 2
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("cut", ["heads", "depth"])
def test_a_last_block_without_attention_has_no_relations(cut: str) -> None:
    model, head, items = student("bert")
    batch = head.collate(items)
    how: Any = {"heads": [4, 0]} if cut == "heads" else {"depth": [1]}
    net = SuperNetwork(model, structure_space(model, **how), train_base=True)
    _, teacher = seen(model, head, batch)
    with net.active(net.space.smallest()):
        hooks, own = seen(model, head, batch)
    assert own.projections is None
    sequences = head.sequences(batch)
    assert relation_loss(own, teacher, sequences, causal=hooks.causal) is None
    assert float(hidden_loss(own, teacher, sequences).detach()) > 0


def test_a_model_without_any_attention_has_no_relations_to_learn() -> None:
    model = student("bert")[0]
    net = SuperNetwork(model, structure_space(model, heads=[4, 0]), train_base=True)
    small = extract_model(net, net.space.smallest()).model
    with pytest.raises(BadRecipe, match="no block has any left"):
        FeatureHooks(small, hidden=False, relations=True)


def _add(total: Tensor, gradient: Tensor) -> None:
    total += gradient


# --- in training --------------------------------------------------------------------------------


def step_of(
    folder: Path, net: Any, head: Head, items: Any, teacher: Any = None, **changes: Any
) -> float:
    """Train one step that moves nothing to speak of, and return its loss."""
    plain = {"max_steps": 1, "batch_size": 4, "learning_rate": 1e-12, "full_learning_rate": 1e-12}
    cfg = TrainConfig(**(plain | {"seed": 0} | changes))
    sampler: Any = FixedSampler() if net.space is None else SandwichSampler(net.space, 0, 0)
    train(net, items, sampler, cfg, folder=folder, head=head, teacher=teacher)
    (row,) = (json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines())
    return float(row["loss"])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_logged_loss_holds_both_whatever_the_batches(family: str, tmp_path: Path) -> None:
    model, head, items = student(family)
    teacher = Teacher(student(family, seed=1)[0], head)
    found = {}
    for hidden, relations in ((0, 0), (0.5, 0), (0, 3.0), (0.5, 3.0)):
        for batch_size, accumulation in ((4, 1), (3, 2))[: 2 if hidden and relations else 1]:
            name = f"{hidden}-{relations}-{batch_size}"
            distill = {"teacher": "x", "hidden": hidden, "relations": relations}
            loss = step_of(
                tmp_path / name,
                WholeModel(model),
                head,
                items,
                teacher,
                distill=distill,
                batch_size=batch_size,
                accumulation=accumulation,
            )
            first = found.setdefault((hidden, relations), loss)
            assert loss == pytest.approx(first, rel=1e-4)
    by_loops = losses_by_hand(
        model, teacher.model, items, (4, 4, 4) if family == "bert" else (4, 2, 2)
    )
    batch = head.collate(items)
    per = [float(loss.detach()) / int(head.n_targets(batch)) for loss in by_loops]
    assert found[0.5, 0] - found[0, 0] == pytest.approx(0.5 * per[0], rel=1e-3)
    assert found[0, 3.0] - found[0, 0] == pytest.approx(3 * per[1], rel=1e-3)
    assert found[0.5, 3.0] - found[0, 0] == pytest.approx(0.5 * per[0] + 3 * per[1], rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_place_the_smallest_learns_the_features_of_the_largest(
    checkpointing: bool, tmp_path: Path
) -> None:
    model, head, items = student("bert")
    space = structure_space(model, ffn=[48, 24], heads=[4, 2], round_to=8)
    net = SuperNetwork(model, space, train_base=True)
    batch = head.collate(items)
    parameters = list(model.parameters())
    sequences = head.sequences(batch)
    found = {}
    for on in (0.0, 1.0):
        gradients = [torch.zeros_like(p) for p in parameters]
        handles = [
            p.register_hook(partial(_add, total))
            for p, total in zip(parameters, gradients, strict=True)
        ]
        distill = {"teacher": "largest", "hidden": 0.5 * on, "relations": 2 * on}
        folder = tmp_path / str(on)
        step_of(
            folder,
            net,
            head,
            items,
            distill=distill,
            update="full",
            gradient_checkpointing=checkpointing,
        )
        for handle in handles:
            handle.remove()
        found[on] = gradients
    model.eval()
    with torch.no_grad():
        _, teacher = seen(model, head, batch)
    with net.active(space.smallest()):
        _, own = seen(model, head, batch)
        relations = relation_loss(own, teacher, sequences, causal=False)
        assert relations is not None
        loss = (0.5 * hidden_loss(own, teacher, sequences) + 2 * relations) / len(items) / 2
        wanted = torch.autograd.grad(loss, parameters, allow_unused=True)
    atol = 1e-4 * max(float(g.abs().max()) for g in wanted if g is not None)
    for with_features, without, gradient in zip(found[1.0], found[0.0], wanted, strict=True):
        gap = with_features - without
        torch.testing.assert_close(
            gap, torch.zeros_like(gap) if gradient is None else gradient, atol=atol, rtol=1e-3
        )


def test_adapters_of_packed_decoders_learn_features_from_outside(tmp_path: Path) -> None:
    model, head, items = student("llama")
    net = tiny_net(model)
    distill = {"teacher": "x", "hidden": 1.0, "relations": 1.0, "weight": 0.5}
    cfg = TrainConfig(max_steps=30, batch_size=4, learning_rate=1e-2, distill=distill, seed=0)
    teacher = Teacher(student("llama", seed=1, num_attention_heads=2)[0], head)
    sampler = SandwichSampler(net.space, 0, 1)
    train(net, items, sampler, cfg, folder=tmp_path, head=head, teacher=teacher)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]


def test_hidden_states_of_two_sizes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model, head, items = student("llama")
    teacher = Teacher(student("llama", hidden_size=16)[0], head)
    with pytest.raises(BadRecipe, match=r"have 16 features, the student's 32\ntry: .*relations"):
        step_of(
            tmp_path / "new",
            WholeModel(model),
            head,
            items,
            teacher,
            distill={"teacher": "x", "hidden": 1.0},
        )
    assert not (tmp_path / "new").exists()
    step_of(
        tmp_path / "new",
        WholeModel(model),
        head,
        items,
        teacher,
        distill={"teacher": "x", "relations": 1.0},
    )


def test_features_of_a_cached_teacher_are_refused(tmp_path: Path) -> None:
    model, head, items = student("bert")
    cached = CachedTeacher(head, torch.zeros(12), torch.arange(5) * 3)
    with pytest.raises(BadRecipe, match="come from a cache"):
        step_of(
            tmp_path,
            WholeModel(model),
            head,
            items,
            cached,
            distill={"teacher": "x", "relations": 1.0},
        )


def test_a_sequence_counts_as_its_targets() -> None:
    own = Features(torch.ones(2, 3, 4), None, 0)
    teacher = Features(torch.zeros(2, 3, 4), None, 0)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    sequences = Sequences(mask, torch.tensor([2, 5]))
    assert float(hidden_loss(own, teacher, sequences)) == 7
