"""Fisher scores against gradients taken one example at a time, and rounds against a naive loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from elastune.errors import BadRecipe
from elastune.importance.fisher import fisher_scores, scores_in_rounds
from elastune.linears import weight_of
from elastune.models.blocks import blocks


def _model(family: str) -> Any:
    auto = AutoModelForSequenceClassification if family == "bert" else None
    return tiny_model(family, auto=auto).eval()


def _labels(family: str, ids: Tensor) -> Tensor:
    return torch.ones(len(ids), dtype=torch.long) if family == "bert" else ids


def _naive(model: Any, rows: list[dict[str, Tensor]], block: int, part: str, kept: Any) -> Tensor:
    """Square the slope along each unit's own columns, example by example."""
    found = blocks(model)[block]
    role = "o" if part == "heads" else "down"
    module = found.module.get_submodule(found.record.roles[role])
    size = found.heads_per_unit * found.head_dim if part == "heads" else 1
    total = torch.zeros(found.n_units(part))
    for row in rows:
        model.zero_grad()
        before = module.weight.detach().clone()
        dropped = (~kept).repeat_interleave(size)
        with torch.no_grad():
            weight_of(module)[:, dropped] = 0  # a view, also of layers that are transposed
        seen: list[Tensor] = []
        handle = module.register_forward_pre_hook(
            lambda _, args, seen=seen: (seen.append(args[0]), args[0].retain_grad())[:0] or None
        )
        model(**row).loss.backward()
        handle.remove()
        with torch.no_grad():
            module.weight.copy_(before)
        slopes = (seen[0] * seen[0].grad).flatten(0, -2).sum(0)
        total += slopes.view(-1, size).sum(1).square() * kept
    return total.detach()


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("part", ["heads", "ffn"])
def test_scores_are_squared_slopes_of_single_examples(family: str, part: str) -> None:
    model = _model(family)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, 60, (1, 9), generator=generator) for _ in range(3)]
    batches = [{"input_ids": ids, "labels": _labels(family, ids)} for ids in rows]
    n = blocks(model)[0].n_units(part)  # type: ignore[arg-type]
    kept = {
        f"layers.{b.index}.{p}": torch.ones(b.n_units(p), dtype=torch.bool)
        for b in blocks(model)
        for p in ("heads", "ffn")
    }
    if part == "ffn":  # heads of llama are two groups: dropping one leaves little to compare
        kept[f"layers.0.{part}"][: n // 2] = False
    expected = _naive(model, batches, 0, part, kept[f"layers.0.{part}"])
    found = fisher_scores(model, batches, kept=kept)[f"layers.0.{part}"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)
    assert float(found.max()) > 0


def test_examples_of_one_batch_are_squared_apart() -> None:
    model = _model("bert")
    ids = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(2))
    one = [{"input_ids": row[None], "labels": torch.ones(1, dtype=torch.long)} for row in ids]
    together = [{"input_ids": ids, "labels": torch.ones(4, dtype=torch.long)}]
    alone = fisher_scores(model, one)
    batch = fisher_scores(model, together)
    for name, score in alone.items():
        # The model's own loss is a mean over the rows: slopes of each are a quarter.
        torch.testing.assert_close(batch[name] * 16, score, rtol=1e-4, atol=1e-10)


def test_rounds_remove_the_least_per_cost_and_ask_again() -> None:
    torch.manual_seed(0)
    values = {"a": torch.rand(5), "b": torch.rand(20)}
    costs = {"a": 4.0, "b": 1.0}
    asked: list[dict[str, Tensor]] = []

    def score(kept: Any) -> dict[str, Tensor]:
        asked.append({name: mask.clone() for name, mask in kept.items()})
        # What is left of "a" matters more the less there is of it.
        return {"a": values["a"] * 5 / kept["a"].sum(), "b": values["b"]}

    ranks = scores_in_rounds(score, costs, {"a": 5, "b": 20}, low=0.25, rounds=3)
    everything = [("a", i) for i in range(5)] + [("b", i) for i in range(20)]
    left = list(everything)
    order: list[tuple[str, int]] = []
    for number in (1, 2, 3):
        n_a = sum(name == "a" for name, _ in left)
        worth = {
            (name, i): float(values[name][i]) * (5 / n_a if name == "a" else 1) / costs[name]
            for name, i in left
        }
        left.sort(key=lambda unit: worth[unit])
        excess = sum(costs[name] for name, _ in left) - 40 * 0.25 ** (number / 3)
        spent = 0.0
        while left and (number == 3 or spent + costs[left[0][0]] <= excess):
            spent += costs[left[0][0]]
            order.append(left.pop(0))
    assert len(asked) == 3
    found = sorted(everything, key=lambda unit: float(ranks[unit[0]][unit[1]]))
    assert found == order
    assert int(asked[1]["a"].sum() * 4 + asked[1]["b"].sum()) == pytest.approx(
        40 * 0.25 ** (1 / 3), abs=4
    )


def test_ranks_are_the_part_of_the_cost_that_goes_before() -> None:
    scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0])}
    ranks = scores_in_rounds(
        lambda kept: scores, {"a": 1.0, "b": 2.0}, {"a": 2, "b": 1}, low=0.5, rounds=1
    )
    # per cost: a1 1, b 1, a0 3; equal ones in the order of the halves
    assert ranks["a"].tolist() == pytest.approx([1.0, 0.25])
    assert ranks["b"].tolist() == pytest.approx([0.75])


@pytest.mark.parametrize(("low", "rounds"), [(0.0, 3), (1.0, 3), (0.5, 0)])
def test_impossible_rounds_are_refused(low: float, rounds: int) -> None:
    with pytest.raises(BadRecipe, match="rounds"):
        scores_in_rounds(lambda kept: {}, {}, {}, low=low, rounds=rounds)
