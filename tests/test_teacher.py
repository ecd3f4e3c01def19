"""Outside teachers, running or cached: steps against naive passes, caches that survive kills."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import tiny_tokenizer
from tiny_models import encoded, tiny_model, tiny_net
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from elastune.build_structure import structure_space
from elastune.config import TrainConfig
from elastune.errors import BadArtifact, BadRecipe
from elastune.heads import HEADS, Head
from elastune.sampling import FixedSampler, RandomSampler, SandwichSampler
from elastune.supernet import SuperNetwork
from elastune.tasks.base import ClassificationExample, QuestionAnsweringExample
from elastune.teacher import CachedTeacher, Teacher, cache_teacher
from elastune.train import train
from elastune.whole_model import WholeModel

TEXTS = ["3 + 4", "Natalia sold clips to 48 of her friends", "A", "How many apples are there now?"]
TEXTS += ["12", "A bucket contains 3 gallons of water", "If Derek adds 6.8 gallons more", "7 - 3"]
LABELLED = [ClassificationExample(text, None, i % 3, text) for i, text in enumerate(TEXTS)]
RATED = [ClassificationExample(text, None, i / 3, text) for i, text in enumerate(TEXTS)]
ASKED = [
    QuestionAnsweringExample(str(i), "How many?", text, (text[:1],), (0,), text)
    for i, text in enumerate(TEXTS)
]
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
KINDS = ("classes", "number", "spans")


def of_kind(kind: str, seed: int = 0, **changes: Any) -> tuple[Any, Head, list[Any]]:
    """Return a model that is trained for a kind of task, its head and its items."""
    if kind == "tokens":
        items = encoded(9, 12, 5, 14, 7, 11, 6, 8, n_prompt=3)
        return tiny_model("llama", seed=seed, **changes), HEADS["causal-lm"], items
    tokenizer = tiny_tokenizer()
    name: Any = "question-answering" if kind == "spans" else "sequence-classification"
    is_reader = kind == "spans"
    auto = AutoModelForQuestionAnswering if is_reader else AutoModelForSequenceClassification
    labels = {} if is_reader else {"num_labels": 1 if kind == "number" else 3}
    sizes = {"vocab_size": len(tokenizer), **OFF, **labels}
    model = tiny_model("bert", auto=auto, seed=seed, **(sizes | changes))
    head = HEADS[name]
    examples = {"classes": LABELLED, "number": RATED, "spans": ASKED}[kind]
    return model, head, head.encode(examples, tokenizer, 64)


def elastic(model: Any) -> SuperNetwork:
    space = structure_space(model, ffn=[48, 24], heads=[4, 2], round_to=8)
    return SuperNetwork(model, space, train_base=True)


def settings(**changes: Any) -> TrainConfig:
    plain = {"max_steps": 1, "batch_size": 3, "accumulation": 3, "distill": "x", "update": "full"}
    return TrainConfig(**(plain | {"full_learning_rate": 1e-2, "seed": 0} | changes))


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = (teacher.detach() / temperature).softmax(-1)
    q = (student / temperature).softmax(-1)
    return temperature**2 * (p * (p.log() - q.log())).sum()


def item_by_hand(model: Any, teacher: Any, item: Any, kind: str, temperature: float) -> Any:
    """Stock forward passes of one item: what the teacher's loss is, the labels', and targets."""
    if kind == "tokens":
        ids = torch.tensor([item.input_ids])
        own, target = (
            m(input_ids=ids, use_cache=False).logits[0, item.n_prompt - 1 : -1]
            for m in (model, teacher)
        )
        labels = ids[0, item.n_prompt :]
        hard = nn.functional.cross_entropy(own, labels, reduction="sum")
        return divergence(own, target, temperature), hard, len(labels)
    inputs = {key: torch.tensor([list(value)]) for key, value in item.inputs.items()}
    own, target = model(**inputs), teacher(**inputs)
    if kind == "spans":
        soft = divergence(own.start_logits, target.start_logits, temperature)
        soft = (soft + divergence(own.end_logits, target.end_logits, temperature)) / 2
        hard = nn.functional.cross_entropy(own.start_logits, torch.tensor([item.start]))
        hard = hard + nn.functional.cross_entropy(own.end_logits, torch.tensor([item.end]))
        return soft, hard / 2, 1
    if kind == "number":
        soft = (own.logits - target.logits.detach())[0, 0] ** 2
        return soft, (own.logits[0, 0] - item.label) ** 2, 1
    label = torch.tensor([int(item.label)])
    hard = nn.functional.cross_entropy(own.logits, label)
    return divergence(own.logits, target.logits, temperature), hard, 1


def by_hand(model: Any, teacher: Any, items: Any, kind: str, weight: float, t: float) -> Tensor:
    """Mean over targets of (1 - w) CE + w T^2 KL."""
    total, count = torch.zeros(()), 0
    for item in items:
        soft, hard, n = item_by_hand(model, teacher, item, kind, t)
        total, count = total + weight * soft + (1 - weight) * hard, count + n
    return total / count


def collect(model: Any) -> dict[str, Tensor]:
    """Add up, as they come, the gradients of what is trained."""
    found = {n: torch.zeros(()) for n, p in model.named_parameters() if p.requires_grad}

    def add(name: str, gradient: Tensor) -> None:
        found[name] = found[name] + gradient

    for name in found:
        model.get_parameter(name).register_hook(lambda grad, name=name: add(name, grad))
    return found


def teacher_of(kind: str, cached: bool, folder: Path) -> tuple[Any, Any]:
    """Return an outside teacher of other weights and sizes, and its model."""
    model, head, items = of_kind(kind, seed=5, hidden_size=16)
    if cached:
        return cache_teacher(model, items, head, folder, batch_tokens=64), model
    return Teacher(model, head), model


# --- a step -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "cached"),
    [*((kind, cached) for kind in KINDS for cached in (False, True)), ("tokens", False)],
)
def test_every_draw_learns_from_labels_and_teacher_as_by_hand(
    kind: str, cached: bool, tmp_path: Path
) -> None:
    model, head, items = of_kind(kind)
    teacher, outside = teacher_of(kind, cached, tmp_path / "cache")
    assert (teacher.model is None) == cached
    net = elastic(model) if kind != "tokens" else tiny_net(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = [model.get_parameter(name) for name in names]
    losses = []
    wanted = [torch.zeros_like(p) for p in parameters]
    for config in (net.space.largest(), net.space.smallest()):
        with net.active(config):
            loss = by_hand(model, outside, items, kind, 0.9, 2.0) / 2
            losses.append(float(loss.detach()))
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            wanted = [
                w if grad is None else w + grad for w, grad in zip(wanted, grads, strict=True)
            ]
    found = collect(model)
    update = "adapter" if kind == "tokens" else "full"
    sampler = SandwichSampler(net.space, 3, 0)
    cfg = settings(update=update)
    train(net, items, sampler, cfg, folder=tmp_path / "run", head=head, teacher=teacher)
    largest = max(float(g.abs().max()) for g in wanted)
    for name, gradient in zip(names, wanted, strict=True):
        torch.testing.assert_close(found[name], gradient, atol=1e-4 * largest, rtol=1e-3)
    (row,) = rows(tmp_path / "run")
    assert row["loss"] == pytest.approx(sum(losses), rel=1e-4)
    assert all(p.grad is None and not p.requires_grad for p in outside.parameters())
    assert not outside.training


@pytest.mark.parametrize("kind", ["classes", "tokens"])
def test_a_whole_model_and_random_draws_learn_from_outside_too(kind: str, tmp_path: Path) -> None:
    for whole in (True, False):
        model, head, items = of_kind(kind)
        teacher, outside = teacher_of(kind, False, tmp_path)
        net: Any = WholeModel(model) if whole else tiny_net(model)
        sampler: Any = FixedSampler() if whole else RandomSampler(net.space, 1)
        net.activate(sampler.draw(0, 0.0)[0].config)
        wanted = float(by_hand(model, outside, items, kind, 0.5, 3.0).detach())
        distill = {"teacher": "x", "weight": 0.5, "temperature": 3.0}
        folder = tmp_path / str(whole)
        train(
            net,
            items,
            sampler,
            settings(distill=distill),
            folder=folder,
            head=head,
            teacher=teacher,
        )
        assert rows(folder)[0]["loss"] == pytest.approx(wanted, rel=1e-4)


def test_half_precision_gives_the_loss_of_full_precision_nearly(tmp_path: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        model, head, items = of_kind("classes")
        teacher, _ = teacher_of("classes", False, tmp_path)
        cfg, folder = settings(precision=precision), tmp_path / precision
        train(
            WholeModel(model), items, FixedSampler(), cfg, folder=folder, head=head, teacher=teacher
        )
        losses.append(rows(folder)[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]


def test_a_teacher_that_reads_less_than_the_student_is_no_error() -> None:
    _, head, items = of_kind("classes")
    sizes = {"vocab_size": len(tiny_tokenizer()), "num_labels": 3}
    auto = AutoModelForSequenceClassification
    teacher = Teacher(tiny_model("distilbert", auto=auto, **sizes), head)
    batch = head.collate(items)
    alone = teacher.soft_targets(batch).outputs[0]
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    assert torch.equal(teacher.soft_targets(batch).outputs[0], alone)


class Killed(Exception):
    """Stands for whatever ends a run."""


@pytest.mark.parametrize(("kind", "cached"), [("spans", True), ("tokens", False)])
def test_a_killed_run_resumes_to_the_same_bits(
    kind: str, cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, _ = teacher_of(kind, cached, tmp_path / "cache")

    def run(name: str) -> dict[str, Tensor]:
        model, head, items = of_kind(kind)
        net = elastic(model) if kind == "spans" else tiny_net(model, dropout=0.2)
        cfg = settings(max_steps=5, checkpoint_every=2, update="full" if cached else "adapter")
        sampler = SandwichSampler(net.space, 3, 1)
        train(net, items, sampler, cfg, folder=tmp_path / name, head=head, teacher=teacher)
        return load_file(tmp_path / name / "trained.safetensors")

    whole = run("whole")
    kind_of_step = sys.modules["elastune.train_step"].TrainStep
    stock, calls = kind_of_step.forward, 0

    def breaking(self: Any, *given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 32:  # 9 a step: in the fourth one
            raise Killed
        return stock(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(kind_of_step, "forward", breaking)
        with pytest.raises(Killed):
            run("broken")
    assert (tmp_path / "broken" / "checkpoint-2").exists()
    resumed = run("broken")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


# --- the cache ----------------------------------------------------------------------------------


def counting(model: Any, *, kill_at: int = 0) -> list[int]:
    """Count the forward passes of a model; raise Killed in one of them."""
    calls: list[int] = []

    def count(*_: Any) -> None:
        calls.append(1)
        if len(calls) == kill_at:
            raise Killed

    model.register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_holds_what_the_teacher_says(kind: str, tmp_path: Path) -> None:
    model, head, items = of_kind(kind)
    shown: list[tuple[float, float]] = []
    cached = cache_teacher(
        model, items, head, tmp_path, batch_tokens=40,
        progress=lambda done, total, note="": shown.append((done, total)),
    )  # fmt: skip
    assert shown[-1] == (8, 8)
    assert [done for done, _ in shown] == sorted({done for done, _ in shown})
    assert len(cached) == 8
    # In batches of another make-up, and with an item twice.
    for numbers in ([5, 0, 2], [7, 7], [3]):
        batch = head.collate([items[i] for i in numbers])
        live = Teacher(model, head).soft_targets(batch).outputs
        kept = cached.soft_targets(batch, torch.tensor(numbers)).outputs
        for own, wanted in zip(kept, live, strict=True):
            assert own.dtype == torch.float32
            torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-5)


def test_the_teacher_runs_once_whatever_is_trained_on_it(tmp_path: Path) -> None:
    outside, head, items = of_kind("spans", seed=5)
    calls = counting(outside)
    cache = tmp_path / "cache"
    for name in ("first", "second"):
        cached = cache_teacher(outside, items, head, cache)
        assert len(calls) == 1
        model = of_kind("spans")[0]
        train(
            WholeModel(model), items, FixedSampler(), settings(max_steps=3),
            folder=tmp_path / name, head=head, teacher=cached,
        )  # fmt: skip
    assert len(calls) == 1
    assert rows(tmp_path / "first") == rows(tmp_path / "second")
    assert sorted(path.name for path in cache.iterdir()) == ["outputs.safetensors", "teacher.json"]


def test_a_named_teacher_need_not_be_loaded_again(tmp_path: Path) -> None:
    model, head, items = of_kind("classes")
    first = cache_teacher(lambda: model, items, head, tmp_path, identity="dense+full 3f")

    def never() -> Any:
        raise AssertionError("loaded again")

    second = cache_teacher(never, items, head, tmp_path, identity="dense+full 3f")
    assert torch.equal(first.values, second.values)
    with pytest.raises(BadArtifact, match="what another teacher said"):
        cache_teacher(never, items, head, tmp_path, identity="dense+full 40")


def test_a_killed_cache_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["elastune.teacher"], "_BATCHES_PER_PART", 2)
    model, head, items = of_kind("spans")
    whole = cache_teacher(model, items, head, tmp_path / "whole", batch_tokens=1)
    for kill_at in (6, 3):  # one window a batch, two in a part
        broken = of_kind("spans")[0]
        counting(broken, kill_at=kill_at)
        with pytest.raises(Killed):
            cache_teacher(broken, items, head, tmp_path / "broken", batch_tokens=1)
    (tmp_path / "broken" / ".part-000000006.safetensors.partial").write_bytes(b"half")
    calls = counting(model)
    resumed = cache_teacher(model, items, head, tmp_path / "broken", batch_tokens=1)
    assert len(calls) == 2
    assert torch.equal(resumed.values, whole.values)
    assert resumed.offsets == whole.offsets


def test_a_cache_killed_before_its_parts_were_joined_runs_no_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, head, items = of_kind("classes")
    module = sys.modules["elastune.teacher"]

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "_merge", killed)
        with pytest.raises(Killed):
            cache_teacher(model, items, head, tmp_path)
    calls = counting(model)
    assert len(cache_teacher(model, items, head, tmp_path)) == 8
    assert calls == []


def test_a_cache_of_another_teacher_or_other_items_is_refused(tmp_path: Path) -> None:
    model, head, items = of_kind("classes")
    cache_teacher(model, items, head, tmp_path)
    with pytest.raises(BadArtifact, match=r"another teacher said\ntry: delete"):
        cache_teacher(of_kind("classes", seed=1)[0], items, head, tmp_path)
    for others in (items[:7], items[::-1]):
        with pytest.raises(BadArtifact, match=f"said of 8 other items, and {len(others)} are"):
            cache_teacher(model, others, head, tmp_path)
    # Labels are nothing that a teacher reads.
    relabelled = head.encode(RATED, tiny_tokenizer(), 64)
    assert len(cache_teacher(model, relabelled, head, tmp_path)) == 8


@pytest.mark.parametrize("name", ["outputs.safetensors", "teacher.json"])
def test_a_damaged_cache_is_refused(name: str, tmp_path: Path) -> None:
    model, head, items = of_kind("classes")
    cache_teacher(model, items, head, tmp_path)
    (tmp_path / name).write_bytes(b"half")
    with pytest.raises(BadArtifact, match="delete"):
        cache_teacher(model, items, head, tmp_path)


def test_what_cannot_be_cached_is_refused(tmp_path: Path) -> None:
    model, head, items = of_kind("tokens")
    with pytest.raises(BadRecipe, match=r"too much to keep\ntry: .*Teacher"):
        cache_teacher(model, items, head, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    small, head, items = of_kind("classes", vocab_size=8)
    with pytest.raises(BadRecipe, match="knows 8 tokens, and the items hold token"):
        cache_teacher(small, items, head, tmp_path)


# --- teachers that do not fit -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distill", "given", "message"),
    [
        ("dense+full", None, r"is 'dense\+full', and no teacher was given"),
        (None, "live", "was given, and .* is None"),
        ("largest", "live", "was given, and .* is 'largest'"),
        ("x", "of other items", "are of 3 items, and 8 are trained on"),
    ],
)
def test_teachers_that_do_not_fit_are_refused_before_anything_is_written(
    distill: Any, given: str | None, message: str, tmp_path: Path
) -> None:
    model, head, items = of_kind("classes")
    teacher: Any = None
    if given is not None:
        teacher = Teacher(of_kind("classes", seed=1)[0], head)
    if given == "of other items":
        teacher = CachedTeacher(head, torch.zeros(9), torch.arange(4) * 3)
    cfg = settings(distill=distill)
    with pytest.raises(BadRecipe, match=message):
        train(
            WholeModel(model), items, FixedSampler(), cfg,
            folder=tmp_path / "new", head=head, teacher=teacher,
        )  # fmt: skip
    assert not (tmp_path / "new").exists()


def test_a_network_does_not_teach_itself_nor_one_of_a_larger_vocabulary(tmp_path: Path) -> None:
    model, head, items = of_kind("classes")
    small = of_kind("classes", vocab_size=8)[0]
    for teacher, message in ((model, "the very network"), (small, "knows 8 tokens, the student")):
        net = WholeModel(model)
        with pytest.raises(BadRecipe, match=message):
            train(
                net, items, FixedSampler(), settings(),
                folder=tmp_path, head=head, teacher=Teacher(teacher, head),
            )  # fmt: skip


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    model, head, items = of_kind("classes")
    other = Teacher(of_kind("classes", num_labels=5)[0], head)
    with pytest.raises(BadRecipe, match="the teacher tells 5 classes"):
        train(
            WholeModel(model),
            items,
            FixedSampler(),
            settings(),
            folder=tmp_path,
            head=head,
            teacher=other,
        )
