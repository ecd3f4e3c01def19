"""Adapters that keep zeros or an INT4 grid: against plain autograd and compressed-tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_structure_law import law_model
from tiny_llama import tiny_llama, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from elastune.build_space import lora_space
from elastune.elastic.lora import ElasticLoRALinear
from elastune.elastic.merge_rules import Int4Grid, Keep, KeepGrid, KeepZeros
from elastune.elastic.merged_product import sample_rows
from elastune.errors import BadRecipe, ElastuneError, InvalidSpace, InvalidSubnet
from elastune.export import save_compressed, save_subnetwork
from elastune.extract import extract
from elastune.importance.sparsegpt import InputHessian
from elastune.merge_report import merge_report
from elastune.merged import MergedAdapters
from elastune.quantise import gptq_round, grid_of, load_grids, quantise_, save_grids
from elastune.subnetwork import extract_model
from elastune.supernet import SuperNetwork

compressed_tensors = pytest.importorskip("compressed_tensors")

IDS = torch.arange(3, 40)[None]
GROUP = 8


def sparse_linear(out: int = 24, inside: int = 16) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(inside, out)
    with torch.no_grad():
        linear.weight[torch.rand(out, inside) < 0.5] = 0
    return linear.requires_grad_(False)


def adapter(linear: nn.Linear, rule: Any, rank: int = 3) -> ElasticLoRALinear:
    made = ElasticLoRALinear(linear, 4, 8.0)
    nn.init.normal_(made.lora_B, generator=torch.Generator().manual_seed(1))
    made.rule = rule
    made.set_active(rank)
    return made


def naive_zeros(x: Tensor, linear: nn.Linear, a: Tensor, b: Tensor, scale: float) -> Tensor:
    mask = torch.zeros_like(linear.weight)
    for i in range(mask.shape[0]):
        for j in range(mask.shape[1]):
            mask[i, j] = 0.0 if linear.weight[i, j] == 0 else 1.0
    return x @ (linear.weight + scale * (b @ a) * mask).T + linear.bias


def naive_int4(
    x: Tensor, linear: nn.Linear, a: Tensor, b: Tensor, scale: float, grid: Int4Grid
) -> Tensor:
    """Round by compressed-tensors, with gradients passed straight through where nothing is cut."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    args = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=GROUP)
    whole = linear.weight + scale * (b @ a) * (linear.weight != 0)
    rounded = fake_quantize(whole.detach(), grid.scale, grid.zero_point, args)
    codes = torch.round(
        whole.detach() / grid.scale.repeat_interleave(GROUP, 1)
        + grid.zero_point.repeat_interleave(GROUP, 1)
    )
    inside = ((codes >= -8) & (codes <= 7)).float()
    return x @ (rounded + (whole - whole.detach()) * inside).T + linear.bias


@pytest.mark.parametrize("keep", ["zeros", "int4"])
def test_output_and_gradients_are_those_of_the_formula(keep: Keep) -> None:
    linear = sparse_linear()
    grid = grid_of(linear.weight, GROUP)
    rule: Any = KeepZeros()
    if keep == "int4":
        with torch.no_grad():
            linear.weight.copy_(grid.nearest(linear.weight))
        rule = KeepGrid(grid)
    mine = adapter(linear, rule)
    a = mine.lora_A[:3].detach().clone().requires_grad_()
    b = mine.lora_B[:, :3].detach().clone().requires_grad_()
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(2))
    xs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    found = mine(xs[0])
    args = (xs[1], linear, a, b, mine.scale_at(3))
    wanted = naive_zeros(*args) if keep == "zeros" else naive_int4(*args, grid)
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    assert mine.lora_A.grad is not None
    assert mine.lora_B.grad is not None
    torch.testing.assert_close(mine.lora_A.grad[:3], a.grad)
    torch.testing.assert_close(mine.lora_B.grad[:, :3], b.grad)
    assert float(mine.lora_A.grad[3:].abs().max()) == 0.0


def test_a_sampled_gradient_is_on_average_the_exact_one() -> None:
    mine = adapter(sparse_linear(), KeepZeros()).train()
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(2)) * torch.rand(40, 1) ** 3

    def gradient(share: float) -> Tensor:
        mine.zero_grad()
        mine.token_share = share
        mine(x).square().sum().backward()
        assert mine.lora_A.grad is not None
        return mine.lora_A.grad.clone()

    exact = gradient(1.0)
    torch.manual_seed(0)
    draws = torch.stack([gradient(0.25) for _ in range(400)])
    noise = draws.std(0) / 20
    assert float(noise.max()) > 0
    assert float(((draws.mean(0) - exact).abs() / (noise + 1e-6 * exact.abs().max())).max()) < 5
    # Evaluated, or with all tokens, nothing is drawn.
    torch.testing.assert_close(gradient(1.0), exact, rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 5, 19])
def test_rows_are_drawn_once_each_with_a_probability_that_follows_their_weight(count: int) -> None:
    weights = torch.tensor([0.0, 0.0, 50.0, *(0.1 * n for n in range(1, 18))])
    torch.manual_seed(0)
    times = torch.zeros(20)
    for _ in range(2000):
        index, factors = sample_rows(weights, count)
        alive = index[factors > 0]
        assert len(set(alive.tolist())) == len(alive) == min(count, 18)
        times[alive] += 1
        if count > 1:  # the heaviest is certain
            assert float(factors[index == 2]) == pytest.approx(1.0)
    assert times[:2].tolist() == [0, 0]
    # One over the factor is the share of draws.
    index, factors = sample_rows(weights, count)
    for row, factor in zip(index.tolist(), factors.tolist(), strict=True):
        if factor:
            assert times[row] / 2000 == pytest.approx(1 / factor, abs=0.05)


def sparse_model(name: str = "llama") -> Any:
    model = law_model(name, "causal-lm")
    torch.manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if module is model.get_output_embeddings():
                continue
            if isinstance(module, nn.Linear | Conv1D):
                module.weight[torch.rand_like(module.weight) < 0.5] = 0
    return model


def trained_net(model: Any, keep: Keep, grids: Any = None) -> SuperNetwork:
    net = SuperNetwork(model, lora_space(model, [8, 4, 0]), alpha=16, keep=keep, grids=grids)
    for number, each in enumerate(net.adapters.values()):
        nn.init.normal_(each.lora_B, std=0.05, generator=torch.Generator().manual_seed(number))
    return net.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(IDS).logits
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_law_holds_and_every_zero_is_kept(name: str, tmp_path: Any) -> None:
    model = sparse_model(name)
    net = trained_net(model, "zeros")
    config = net.space.heuristic()
    with net.active(config):
        active = logits(net.model)
    sub = extract_model(net, config)
    torch.testing.assert_close(logits(sub.model), active, rtol=1e-5, atol=1e-5)
    report = merge_report(net, sub)
    weights: list[Any] = [a.base.weight for a in net.adapters.values()]
    assert report.base_zeros == sum(int(torch.count_nonzero(w == 0)) for w in weights)
    assert report.base_zeros > 0.4 * report.n_weights
    assert report.zeros >= report.base_zeros
    save_subnetwork(sub, tiny_tokenizer(), tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain), active, rtol=1e-5, atol=1e-5)
    # The same sub-network evaluated with adapters merged beside their base.
    with net.active(config), MergedAdapters(net.adapters.values()).in_force():
        torch.testing.assert_close(logits(net.model), active, rtol=1e-5, atol=1e-5)


def test_int4_weights_come_back_bit_by_bit_and_a_fresh_model_computes_the_same(
    tmp_path: Any,
) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.dim() == 2:
                weight[torch.rand_like(weight) < 0.5] = 0
    zeros = {n: w == 0 for n, w in model.named_parameters() if "layers" in n and w.dim() == 2}
    grids = quantise_(model, group_size=GROUP)
    for name, was in zeros.items():
        assert bool((model.get_parameter(name)[was] == 0).all())
    save_grids(tmp_path / "grid.safetensors", grids)
    again = load_grids(tmp_path / "grid.safetensors")
    assert all(torch.equal(again[n].scale, g.scale) for n, g in grids.items())
    net = trained_net(model, "int4", again)
    config = net.space.largest()
    with net.active(config):
        active = logits(net.model)
    sub = extract_model(net, config)
    assert sub.grids.keys() == grids.keys()
    report = merge_report(net, sub)
    assert report.off_grid == 0
    torch.testing.assert_close(logits(sub.model), active, rtol=1e-5, atol=1e-5)
    for name, each in net.adapters.items():
        base: Any = each.base
        assert not torch.equal(sub.model.get_parameter(f"{name}.weight"), base.weight)
    saved = save_compressed(sub, tokenizer, tmp_path / "out")
    assert saved.largest_difference < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), active, rtol=1e-5, atol=1e-5)
    for name in grids:  # unpacked by compressed-tensors
        mine = sub.model.get_parameter(f"{name}.weight")
        assert torch.equal(plain.get_parameter(f"{name}.weight"), mine), name


def naive_gptq(weight: Tensor, hessian: Tensor, group_size: int) -> Tensor:
    """Optimal brain quantisation in the order of columns: eliminate one feature after the other."""
    w, kept = weight.double().clone(), weight != 0
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.linalg.inv(damped)
    for j in range(w.shape[1]):
        if j % group_size == 0:
            group = slice(j, j + group_size)
            grid = grid_of((w * kept)[:, group].float(), group_size)
        rounded = grid.nearest(w[:, j, None].float())[:, 0].double() * kept[:, j]
        error = (w[:, j] - rounded) / inverse[j, j]
        after = w - error[:, None] * inverse[j]
        w[:, j + 1 :] = after[:, j + 1 :]
        w[:, j] = rounded
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return w.float()


def test_gptq_is_brain_surgery_column_by_column_and_nearer_than_to_nearest() -> None:
    linear = sparse_linear()
    torch.manual_seed(4)
    x = torch.randn(200, 16) @ torch.randn(16, 16)  # features that go together
    inputs = InputHessian()
    inputs.add(x)
    rounded, grid = gptq_round(linear.weight, inputs, GROUP)
    torch.testing.assert_close(rounded, naive_gptq(linear.weight, x.T @ x, GROUP))
    assert torch.equal(grid.nearest(rounded), rounded)
    assert bool((rounded[linear.weight == 0] == 0).all())
    nearest = grid_of(linear.weight, GROUP).nearest(linear.weight)
    errors = [float((x @ (w - linear.weight).T).norm()) for w in (rounded, nearest)]
    assert errors[0] < 0.9 * errors[1]


def test_what_cannot_be_kept_is_refused_and_leaves_the_model_as_it_was() -> None:
    model = sparse_model()
    before = {n: type(m) for n, m in model.named_modules()}
    space = lora_space(model, [8, 4])
    with pytest.raises(InvalidSpace, match="no input of the adapter to drop"):
        SuperNetwork(model, space, keep="zeros", dropout=0.1)
    with pytest.raises(InvalidSpace, match="there is no grid of"):
        SuperNetwork(model, space, keep="int4")
    with pytest.raises(InvalidSpace, match="keep must be one of"):
        SuperNetwork(model, space, keep="some")  # type: ignore[arg-type]
    with pytest.raises(InvalidSpace, match="token_share"):
        SuperNetwork(model, space, keep="zeros", token_share=0)
    assert {n: type(m) for n, m in model.named_modules()} == before
    with pytest.raises(BadRecipe, match="gptq needs calibration text"):
        quantise_(model, "gptq")
    with pytest.raises(BadRecipe, match="unknown quantiser 'awq'"):
        quantise_(model, "awq")
    with pytest.raises(BadRecipe, match="cannot be cut into groups of 7"):
        quantise_(model, group_size=7)
    net = trained_net(model, "zeros")
    for cut in (lambda c: extract(net, c), lambda c: extract_model(net, c, merge=False)):
        with pytest.raises(InvalidSubnet, match="cannot stand beside their base"):
            cut(net.space.largest())
    plain = trained_net(sparse_model(), "nothing")
    with pytest.raises(ElastuneError, match="the merge lost"):
        merge_report(plain, extract_model(plain, plain.space.largest()))
