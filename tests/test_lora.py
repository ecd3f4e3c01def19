"""The elastic low-rank adapter against a linear layer and a plain adapter of copied slices."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastune.elastic import ElasticLoRALinear
from elastune.elastic.lora import SCALINGS, Scaling, _FrozenLinearPlusLoRA
from elastune.errors import InvalidSpace, InvalidSubnet

IN, OUT, RANK, ALPHA = 12, 9, 6, 16.0


class OtherLinear(nn.Linear):
    """Any linear-like base that is not exactly nn.Linear takes the generic path."""


class PlainLoRA(nn.Module):
    """The textbook: W x + b + scale * B A x, at one rank, with autograd's own gradients."""

    def __init__(self, elastic: ElasticLoRALinear, rank: int, scale: float) -> None:
        super().__init__()
        base: Any = elastic.base
        self.weight = base.weight.detach().clone()
        self.bias = None if base.bias is None else base.bias.detach().clone()
        self.a = nn.Parameter(elastic.lora_A.detach()[:rank].clone())
        self.b = nn.Parameter(elastic.lora_B.detach()[:, :rank].clone())
        self.scale = scale

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        out = torch.einsum("...i,oi->...o", x, self.weight)
        if self.bias is not None:
            out = out + self.bias
        low = torch.einsum("...i,ri->...r", x if kept is None else x * kept, self.a)
        return out + self.scale * torch.einsum("...r,or->...o", low, self.b)


def make(
    base_class: type[nn.Linear] = nn.Linear,
    *,
    bias: bool = True,
    scaling: Scaling = "alpha/r_max",
    dropout: float = 0.0,
) -> ElasticLoRALinear:
    torch.manual_seed(0)
    base = base_class(IN, OUT, bias=bias).requires_grad_(False)
    elastic = ElasticLoRALinear.from_base(base, RANK, ALPHA, dropout, scaling)
    nn.init.normal_(elastic.lora_B)
    return elastic


def scale_by_hand(scaling: str, rank: int) -> float:
    return {"alpha/r_max": 16 / 6, "alpha/r": 16 / rank, "rslora": 16 / math.sqrt(rank)}[scaling]


def assert_same_function(elastic: ElasticLoRALinear, rank: int, scale: float, x: Tensor) -> None:
    """Compare values, and gradients of the input and of the whole of A and B."""
    plain = PlainLoRA(elastic, rank, scale)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    elastic.set_active(rank)
    left, right = elastic(mine), plain(theirs)
    torch.testing.assert_close(left, right)
    upstream = torch.randn_like(right)
    left.backward(upstream)
    right.backward(upstream)
    assert mine.grad is not None
    assert elastic.lora_A.grad is not None
    assert elastic.lora_B.grad is not None
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(elastic.lora_A.grad[:rank], plain.a.grad)
    torch.testing.assert_close(elastic.lora_B.grad[:, :rank], plain.b.grad)
    assert not elastic.lora_A.grad[rank:].any()
    assert not elastic.lora_B.grad[:, rank:].any()


@pytest.mark.parametrize("base_class", [nn.Linear, OtherLinear], ids=["fast", "generic"])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("rank", [1, 4, RANK])
def test_rank_r_is_a_plain_adapter_of_the_first_r_rows_and_columns(
    base_class: type[nn.Linear], scaling: Scaling, rank: int
) -> None:
    elastic = make(base_class, scaling=scaling)
    assert_same_function(elastic, rank, scale_by_hand(scaling, rank), torch.randn(5, IN))


@pytest.mark.parametrize("base_class", [nn.Linear, OtherLinear], ids=["fast", "generic"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (2, 3, 2)])
def test_leading_dimensions_and_a_missing_bias_change_nothing(
    base_class: type[nn.Linear], bias: bool, shape: tuple[int, ...]
) -> None:
    assert_same_function(make(base_class, bias=bias), 4, 16 / 6, torch.randn(*shape, IN))


def test_inputs_that_are_not_contiguous_give_the_same_gradients() -> None:
    assert_same_function(make(), 4, 16 / 6, torch.randn(3, IN, 5).transpose(1, 2))


def test_a_single_vector_passes_through() -> None:
    elastic = make()
    x = torch.randn(IN)
    torch.testing.assert_close(elastic(x), PlainLoRA(elastic, RANK, 16 / 6)(x))


@pytest.mark.parametrize("base_class", [nn.Linear, OtherLinear], ids=["fast", "generic"])
def test_rank_0_is_the_base_alone(base_class: type[nn.Linear]) -> None:
    elastic = make(base_class)
    elastic.set_active(0)
    x = torch.randn(4, IN, requires_grad=True)
    out = elastic(x)
    assert torch.equal(out, elastic.base(x))
    out.sum().backward()
    assert elastic.lora_A.grad is None
    assert elastic.lora_B.grad is None


@pytest.mark.parametrize("rank", [2, RANK])
def test_the_hand_written_gradient_passes_gradcheck(rank: int) -> None:
    torch.manual_seed(0)
    shapes = [(2, 3, 4), (5, 4), (5,), (rank, 4), (5, rank)]
    x, weight, bias, a, b = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    inputs: Any = (x.requires_grad_(), weight, bias, a.requires_grad_(), b.requires_grad_(), 1.7)
    assert torch.autograd.gradcheck(_FrozenLinearPlusLoRA.apply, inputs)
    without_bias: Any = (x, weight, None, a, b, 0.3)
    assert torch.autograd.gradcheck(_FrozenLinearPlusLoRA.apply, without_bias)


def test_an_input_without_gradient_still_trains_the_adapter() -> None:
    elastic = make()
    elastic(torch.randn(3, IN)).sum().backward()
    assert elastic.lora_A.grad is not None
    assert elastic.lora_A.grad.any()


def test_dropout_drops_inputs_of_the_adapter_alone() -> None:
    elastic = make(dropout=0.5).train()
    x = torch.randn(50, IN)
    torch.manual_seed(1)
    out = elastic(x)
    torch.manual_seed(1)
    kept = nn.functional.dropout(torch.ones_like(x), 0.5)
    assert 0.3 < float((kept == 0).float().mean()) < 0.7
    torch.testing.assert_close(out, PlainLoRA(elastic, RANK, 16 / 6)(x, kept))
    elastic.eval()
    torch.testing.assert_close(elastic(x), PlainLoRA(elastic, RANK, 16 / 6)(x))


def test_a_new_adapter_leaves_the_output_unchanged() -> None:
    base = nn.Linear(IN, OUT)
    x = torch.randn(3, IN)
    assert torch.equal(ElasticLoRALinear.from_base(base, RANK, ALPHA)(x), base(x))


def test_half_precision_bases_keep_their_output_type_and_a_float32_adapter() -> None:
    base = nn.Linear(IN, OUT).bfloat16().requires_grad_(False)
    elastic = ElasticLoRALinear(base, RANK, ALPHA)
    nn.init.normal_(elastic.lora_B)
    x = torch.randn(3, IN, dtype=torch.bfloat16)
    out = elastic(x)
    assert out.dtype == torch.bfloat16
    assert elastic.lora_A.dtype == torch.float32
    wide: Any = copy.deepcopy(elastic).float()
    torch.testing.assert_close(out.float(), wide(x.float()), atol=0.1, rtol=0.02)


def test_autocast_computes_the_same_function() -> None:
    elastic = make()
    x = torch.randn(3, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = elastic(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), elastic(x), atol=0.1, rtol=0.05)


def test_the_frozen_base_gets_no_gradient() -> None:
    for base_class in (nn.Linear, OtherLinear):
        elastic = make(base_class)
        elastic(torch.randn(3, IN, requires_grad=True)).sum().backward()
        assert all(p.grad is None for p in elastic.base.parameters())


def test_a_base_that_trains_gets_its_gradient() -> None:
    elastic = make()
    elastic.base.requires_grad_(True)
    elastic(torch.randn(3, IN)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in elastic.base.parameters())


@pytest.mark.parametrize("rank", [-1, RANK + 1, 100])
def test_ranks_out_of_range_are_refused_and_leave_the_active_one(rank: int) -> None:
    elastic = make()
    elastic.set_active(4)
    with pytest.raises(InvalidSubnet, match=rf"rank {rank} is outside 0\.\.{RANK}"):
        elastic.set_active(rank)
    assert elastic.active_rank == 4


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InvalidSpace, match="at least 1, got 0"):
        ElasticLoRALinear(nn.Linear(2, 2), 0, ALPHA)
    with pytest.raises(InvalidSpace, match=r"alpha/r_max, alpha/r, rslora, got 'alpha'"):
        ElasticLoRALinear(nn.Linear(2, 2), 1, ALPHA, scaling="alpha")  # type: ignore[arg-type]


def test_only_set_active_changes_what_is_active() -> None:
    elastic = make(dropout=0.1)
    elastic.set_active(2)
    before = {name: tensor.clone() for name, tensor in elastic.state_dict().items()}
    for name in dir(elastic):
        getattr(elastic, name)
    repr(elastic)
    elastic.train()(torch.randn(2, IN))
    elastic.eval()(torch.randn(2, IN))
    elastic.extract()
    assert elastic.active_rank == 2
    after = elastic.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("scaling", SCALINGS)
def test_extracted_copies_compute_the_active_function(scaling: Scaling) -> None:
    elastic = make(scaling=scaling)
    elastic.set_active(4)
    a, b, scale = elastic.extract()
    assert a.shape == (4, IN)
    assert b.shape == (OUT, 4)
    assert b.is_contiguous()
    x = torch.randn(3, IN)
    expected = elastic.base(x) + scale * x @ a.T @ b.T
    torch.testing.assert_close(elastic(x), expected)
    a.zero_()
    torch.testing.assert_close(elastic(x), expected)


def test_reset_draws_as_plain_lora_does_and_repeats_by_seed() -> None:
    elastic = make()
    elastic.reset(torch.Generator().manual_seed(3))
    first = elastic.lora_A.detach().clone()
    elastic.reset(torch.Generator().manual_seed(3))
    assert torch.equal(elastic.lora_A, first)
    assert not elastic.lora_B.any()
    # Kaiming with a = sqrt 5 is uniform within 1 / sqrt(I).
    assert float(first.abs().max()) <= 1 / math.sqrt(IN)
    assert float(first.abs().max()) > 0.8 / math.sqrt(IN)


def test_hooks_of_the_base_module_are_called_and_a_training_bias_gets_its_gradient() -> None:
    base = nn.Linear(6, 4)
    base.requires_grad_(False)
    layer = ElasticLoRALinear.from_base(base, 2, alpha=4)
    x = torch.randn(3, 6)
    seen: list[torch.Tensor] = []
    handle = base.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hooked = layer(x)
    handle.remove()
    assert len(seen) == 1
    torch.testing.assert_close(hooked, layer(x))
    assert base.bias is not None
    base.bias.requires_grad_(True)
    layer(x).sum().backward()
    torch.testing.assert_close(base.bias.grad, torch.full((4,), 3.0))
