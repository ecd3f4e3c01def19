"""Sparsifiers against their formulas written out naively, and the account of zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import tiny_llama, tiny_tokenizer
from tiny_models import tiny_model, token_ids
from torch import Tensor, nn

from elastune.errors import BadRecipe
from elastune.importance import InputHessian, sparsegpt, sparsegpt_prune
from elastune.models import load_model, save_model
from elastune.sparsify import METHODS, Method, Sparsity, keep_mask, sparsify_, sparsity_report

FAMILIES = ["llama", "gemma3_text", "bert", "distilbert", "qwen3"]
#: More rows than one batch of calibration holds, so that statistics are added up.
ROWS = torch.tensor(token_ids(*[48] * 90))

LAYERS = {
    "bert": ("encoder.layer", nn.Linear),
    "distilbert": ("transformer.layer", nn.Linear),
}


def build(family: str, **changes: Any) -> Any:
    changes |= {"sliding_window": 8} if family == "gemma3_text" else {}
    return tiny_model(family, **changes)


def blocks_of(model: Any, family: str) -> list[dict[str, nn.Linear]]:
    """Every linear layer of each block by its full name: found by type, not by any record."""
    path = LAYERS.get(family, ("model.layers",))[0]
    return [
        {
            f"{path}.{index}.{name}": module
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        }
        for index, block in enumerate(model.get_submodule(path))
    ]


@torch.no_grad()
def inputs_of(model: Any, linears: dict[str, nn.Linear]) -> dict[str, Tensor]:
    """Run the whole model over all rows and return what each layer reads, ``(tokens, I)``."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, out, name=name: seen.__setitem__(
                name, args[0].reshape(-1, args[0].shape[-1]).double()
            )
        )
        for name, module in linears.items()
    ]
    model(input_ids=ROWS)
    for handle in handles:
        handle.remove()
    return seen


def naive(model: Any, family: str, prune: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Prune block after block; each sees the outputs of the pruned blocks before it."""
    for linears in blocks_of(model, family):
        inputs = inputs_of(model, linears)
        for name, linear in linears.items():
            linear.weight.data = prune(linear.weight.data.double(), inputs[name]).float()


def naive_wanda(weight: Tensor, x: Tensor, n_zeros: int) -> Tensor:
    """|W_ij| * ||x_j||, and the smallest of each row are zeroed: one weight at a time."""
    norms = [float((x[:, j] ** 2).sum()) ** 0.5 for j in range(x.shape[1])]
    pruned = weight.clone()
    for i in range(weight.shape[0]):
        scores = [abs(float(w)) * norm for w, norm in zip(weight[i], norms, strict=True)]
        for j in sorted(range(len(scores)), key=scores.__getitem__)[:n_zeros]:
            pruned[i, j] = 0
    return pruned


def naive_sparsegpt(
    weight: Tensor, x: Tensor, ratio: float, block: int, n_of_m: tuple[int, int] | None = None
) -> Tensor:
    """The optimal brain surgeon, column by column, with the inverse of what is left of H."""
    hessian = x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(len(hessian))]
    w = weight.double().clone()
    pruned = torch.zeros_like(w, dtype=torch.bool)
    width = n_of_m[1] if n_of_m else block
    for j in range(w.shape[1]):
        if j % width == 0:
            columns = range(j, min(j + width, w.shape[1]))
            n_zeros = n_of_m[0] if n_of_m else round(len(columns) * ratio)
            for row in range(w.shape[0]):
                cost = {k: float(w[row, k] ** 2 / inverses[k][0, 0]) for k in columns}
                pruned[row, sorted(cost, key=cost.__getitem__)[:n_zeros]] = True
        error = torch.where(pruned[:, j], w[:, j], 0.0) / inverses[j][0, 0]
        w[:, j:] -= error[:, None] * inverses[j][0]
        w[:, j] = w[:, j].masked_fill(pruned[:, j], 0.0)
    return w


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_is_its_formula_block_by_block_through_the_pruned_blocks(family: str) -> None:
    model = build(family)
    expected = copy.deepcopy(model)
    naive(expected, family, lambda w, x: naive_wanda(w, x, w.shape[1] // 2))
    masks = sparsify_(model, "wanda", Sparsity.parse(0.5), ROWS)
    found, wanted = model.state_dict(), expected.state_dict()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    linears = {n: m for block in blocks_of(model, family) for n, m in block.items()}
    assert masks.keys() == {f"{name}.weight" for name in linears}
    for name, linear in linears.items():
        assert torch.equal(masks[f"{name}.weight"], linear.weight != 0)


def test_wanda_sees_the_pruned_blocks_before_it() -> None:
    model = build("llama")
    dense_inputs = inputs_of(model, blocks_of(model, "llama")[1])
    weights = {n: m.weight.detach().double() for n, m in blocks_of(model, "llama")[1].items()}
    sparsify_(model, "wanda", Sparsity.parse(0.5), ROWS)
    different = 0
    for name, weight in weights.items():
        one_shot = naive_wanda(weight, dense_inputs[name], weight.shape[1] // 2)
        pruned = model.get_submodule(name).weight
        different += int(((one_shot != 0) != (pruned != 0)).sum())
    assert different > 20


@pytest.mark.parametrize("n_of_m", [None, (2, 4), (4, 8), (1, 4)])
@pytest.mark.parametrize("block", [8, 128])
def test_sparsegpt_is_the_column_by_column_surgeon(
    n_of_m: tuple[int, int] | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsegpt, "_BLOCK_COLUMNS", block)
    torch.manual_seed(0)
    x = torch.randn(200, 24) @ torch.randn(24, 24)  # features that depend on each other
    weight = torch.randn(5, 24)
    inputs = InputHessian()
    inputs.add(x[:150])
    inputs.add(x[150:])
    found, kept = sparsegpt_prune(weight, inputs, ratio=0.5, n_of_m=n_of_m)
    expected = naive_sparsegpt(weight, x.double(), 0.5, block, n_of_m)
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(found == 0, expected == 0)
    assert torch.equal(kept, expected != 0)


def test_sparsegpt_through_a_model_is_the_surgeon_block_by_block() -> None:
    model = build("llama")
    expected = copy.deepcopy(model)
    naive(expected, "llama", lambda w, x: naive_sparsegpt(w, x, 0.5, 128))
    sparsify_(model, "sparsegpt", Sparsity.parse(0.5), ROWS)
    found, wanted = model.state_dict(), expected.state_dict()
    for name in wanted:
        same = (found[name] == 0) == (wanted[name] == 0)
        assert float(same.float().mean()) > 0.99, name  # float32 against float64 at near ties
        change = (found[name] - wanted[name]).norm() / wanted[name].norm()
        assert float(change) < 0.05, name


def test_sparsegpt_leaves_less_error_than_wanda_on_the_same_inputs() -> None:
    dense = build("llama")
    first = blocks_of(dense, "llama")[0]
    inputs = inputs_of(dense, first)
    errors: dict[str, dict[str, float]] = {}
    for method in ("wanda", "sparsegpt"):
        model = copy.deepcopy(dense)
        sparsify_(model, method, Sparsity.parse(0.5), ROWS)  # type: ignore[arg-type]
        pruned = blocks_of(model, "llama")[0]
        errors[method] = {
            name: float(
                (
                    inputs[name] @ (first[name].weight - pruned[name].weight).detach().double().T
                ).norm()
            )
            for name in first
        }
    for name in first:
        assert errors["sparsegpt"][name] < errors["wanda"][name], name


def test_features_that_are_never_used_are_zeroed_by_sparsegpt() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 8)
    x[:, 3] = 0
    inputs = InputHessian()
    inputs.add(x)
    weight, _ = sparsegpt_prune(torch.randn(4, 8), inputs, ratio=0.25, n_of_m=None)
    assert not weight[:, 3].any()
    assert weight.isfinite().all()


def test_magnitude_zeroes_the_smallest_of_each_row() -> None:
    model = build("llama")
    before = {n: m.weight.detach().clone() for b in blocks_of(model, "llama") for n, m in b.items()}
    sparsify_(model, "magnitude", Sparsity.parse(0.25))
    for name, weight in before.items():
        expected = naive_wanda(weight, torch.ones(1, weight.shape[1]), weight.shape[1] // 4)
        assert torch.equal(model.get_submodule(name).weight, expected), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_has_its_share_of_zeros_and_nothing_else_is_touched(
    method: Method, family: str
) -> None:
    model = build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparsify_(model, method, Sparsity.parse(0.6), ROWS[:4])
    linears = {n: m for block in blocks_of(model, family) for n, m in block.items()}
    for name, linear in linears.items():
        zeros = (linear.weight == 0).sum(dim=1)
        assert set(zeros.tolist()) == {{32: 19, 48: 28}[linear.in_features]}, name
    pruned = {f"{name}.weight" for name in linears}
    after = model.state_dict()
    untouched = [name for name in before if name not in pruned]
    assert any("embed" in name for name in untouched)
    assert all(torch.equal(after[name], before[name]) for name in untouched)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_every_group_of_a_pattern_has_exactly_n_zeros(method: Method, pattern: str) -> None:
    n, m = (int(part) for part in pattern.split(":"))
    model = build("llama")
    sparsify_(model, method, Sparsity.parse(pattern=pattern), ROWS[:4])
    for block in blocks_of(model, "llama"):
        for linear in block.values():
            zeros = (linear.weight == 0).reshape(linear.out_features, -1, m).sum(dim=2)
            assert (zeros == n).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:5", "2:3"])
def test_a_pattern_that_does_not_fit_the_rows_is_refused(method: Method, pattern: str) -> None:
    model = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BadRecipe, match="rows of 32 weights cannot be cut into groups of"):
        sparsify_(model, method, Sparsity.parse(pattern=pattern), ROWS[:4])
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_groups_may_straddle_the_blocks_of_sparsegpt() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(300, 144), torch.randn(3, 144)
    inputs = InputHessian()
    inputs.add(x)
    found, _ = sparsegpt_prune(weight, inputs, ratio=2 / 6, n_of_m=(2, 6))
    assert ((found == 0).reshape(3, -1, 6).sum(dim=2) == 2).all()
    expected = naive_sparsegpt(weight, x.double(), 2 / 6, 144, (2, 6))
    assert torch.equal(found == 0, expected == 0)


@pytest.mark.parametrize("scores", [torch.ones(3, 10), torch.zeros(3, 10)])
def test_ties_never_change_the_number_of_zeros(scores: Tensor) -> None:
    scores[1, :4] = 2
    scores[2, 5:] = torch.arange(5.0)
    for ratio in (0.0, 0.1, 0.5, 0.8, 0.99):
        mask = keep_mask(scores, Sparsity(ratio))
        assert mask.sum(dim=1).tolist() == [10 - int(10 * ratio)] * 3
        for row, kept in zip(scores, mask, strict=True):
            if kept.any() and not kept.all():
                assert row[kept].min() >= row[~kept].max()
    assert (keep_mask(scores[:, :8], Sparsity(0.5, (2, 4))).sum(dim=1) == 4).all()


@pytest.mark.parametrize(("ratio", "n_columns"), [(0.29, 100), (0.57, 100), (0.7, 10), (0.3, 10)])
def test_a_ratio_of_whole_weights_is_not_rounded_down(ratio: float, n_columns: int) -> None:
    # In floating point 100 * 0.29 is 28.999999999999996.
    scores = torch.rand(2, n_columns)
    dropped = n_columns - int(keep_mask(scores, Sparsity(ratio)).sum(dim=1)[0])
    assert dropped == round(ratio * n_columns)


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_zero_the_same_number_of_weights(method: Method) -> None:
    model = build("llama")
    sparsify_(model, method, Sparsity.parse(0.45), ROWS[:4])
    report = sparsity_report(model, method=method, sparsity=Sparsity.parse(0.45))
    assert {t["shape"][1]: t["zeros"] // t["shape"][0] for t in report["tensors"].values()} == {
        32: 14,
        48: 21,
    }


@pytest.mark.parametrize(
    ("ratio", "pattern", "message"),
    [
        (1.0, None, "at least 0 and below 1, got 1.0"),
        (-0.1, None, "at least 0 and below 1, got -0.1"),
        (None, None, "got None"),
        (None, "2-4", "'2-4' is not like '2:4'"),
        (None, "a:b", "'a:b' is not like '2:4'"),
        (None, "4:4", "must have 0 < n < m"),
        (None, "0:4", "must have 0 < n < m"),
        (0.4, "2:4", r"ratio 0.4 and pattern '2:4' \(= 0.5\) disagree"),
    ],
)
def test_bad_ratios_and_patterns_are_refused(
    ratio: float | None, pattern: str | None, message: str
) -> None:
    with pytest.raises(BadRecipe, match=message):
        Sparsity.parse(ratio, pattern)


def test_unknown_methods_and_missing_text_are_refused() -> None:
    model = build("llama")
    with pytest.raises(BadRecipe, match=r"unknown sparsifier 'wand'; known are magnitude, wanda"):
        sparsify_(model, "wand", Sparsity(0.5))  # type: ignore[arg-type]
    with pytest.raises(BadRecipe, match="wanda needs calibration text"):
        sparsify_(model, "wanda", Sparsity(0.5))


def test_the_model_is_left_without_hooks_or_replaced_functions() -> None:
    model = build("gemma3_text")
    blocks = [id(block) for block in model.model.layers]
    steps: list[tuple[int, int]] = []
    sparsify_(model, "wanda", Sparsity(0.5), ROWS[:4], progress=lambda *step: steps.append(step))
    assert steps == [(1, 2), (2, 2)]
    assert [id(block) for block in model.model.layers] == blocks
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
    model(input_ids=ROWS[:1]).logits.sum().backward()  # the weights are no inference tensors


def test_the_report_counts_exact_zeros() -> None:
    model = build("llama")
    sparsity = Sparsity.parse(pattern="2:4")
    sparsify_(model, "magnitude", sparsity)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = 0  # a whole row of 32, 16 of them new
        model.model.norm.weight[:] = 0  # not a linear layer of a block
    report = sparsity_report(model, method="magnitude", sparsity=sparsity)
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    zeros = weights // 2 + 16
    assert report["total"] == {"zeros": zeros, "weights": weights, "sparsity": zeros / weights}
    assert (report["method"], report["ratio"], report["pattern"]) == ("magnitude", 0.5, "2:4")
    row = report["tensors"]["model.layers.0.mlp.up_proj.weight"]
    assert row == {"shape": [48, 32], "zeros": 784, "sparsity": 784 / 1536}
    assert len(report["tensors"]) == 14


def test_zeros_survive_saving_and_loading(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model: Any = tiny_llama(tokenizer)
    masks = sparsify_(model, "wanda", Sparsity(0.5), ROWS[:4])
    save_model(model, tokenizer, tmp_path / "base")
    loaded, _ = load_model(tmp_path / "base")
    for name, mask in masks.items():
        weight: Any = loaded.get_parameter(name)
        assert torch.equal(weight != 0, mask)
    sparsity = Sparsity(0.5)
    assert sparsity_report(loaded, method="wanda", sparsity=sparsity) == sparsity_report(
        model, method="wanda", sparsity=sparsity
    )
