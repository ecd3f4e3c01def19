"""Elastic low-rank adapter: any linear-like module plus ``scale * B[:, :r] A[:r]``.

Source: Hu et al. 2021 (LoRA); Munoz et al. 2024 (Shears, section 3.2: Neural Low-rank adapter
Search): the sub-adapter of rank r uses the first r rows of A and the first r columns of B.

Deviation from the reference code: the rank is set by the caller, never drawn inside forward.

Shapes: `T` tokens, `I` in features, `O` out features, `R` largest rank, `r` active rank.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from elastune.elastic.linear import ElasticConv1D, ElasticLinear, Ranges, length_of, take
from elastune.elastic.merge_rules import MergeRule
from elastune.elastic.merged_product import MergedProduct, product
from elastune.errors import InvalidSpace, InvalidSubnet
from elastune.linears import in_features, is_transposed, out_features

Scaling = Literal["alpha/r_max", "alpha/r", "rslora"]
"""What multiplies B A: alpha over the largest rank (as in the papers, whatever rank is active),
over the active rank, or over the square root of the active rank (Kalajdzievski 2023)."""

SCALINGS: tuple[Scaling, ...] = ("alpha/r_max", "alpha/r", "rslora")


class ElasticLoRALinear(nn.Module):
    """A frozen base module with a low-rank adapter of switchable rank.

    Args:
        base: called as it is (dense, sparse, quantised); of an elastic base the adapter uses the
            same rows and columns as the base.
        rank: the largest rank R.
        alpha: numerator of the scale.
        dropout: probability of zeroing an input of the adapter in training.
        scaling: see `Scaling`.

    Raises:
        InvalidSpace: a rank below 1, or an unknown scaling.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        scaling: Scaling = "alpha/r_max",
    ) -> None:
        super().__init__()
        if rank < 1:
            raise InvalidSpace(f"the largest rank must be at least 1, got {rank}")
        if scaling not in SCALINGS:
            raise InvalidSpace(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")
        self.base = base
        self.in_features = in_features(base)
        self.out_features = out_features(base)
        self.max_rank = rank
        self.alpha = float(alpha)
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        weight = next(base.parameters())
        # Adapters of half-precision or quantised bases are kept in float32, as PEFT does.
        device = weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        self.active_rank = rank
        self.rule: MergeRule | None = None
        """How its product joins the base's weight, where that is more than a sum: what runs is then
        the merged weight, in training, too."""
        self.token_share = 1.0
        """Part of the tokens that its gradient is estimated from, where it has a rule."""
        self.reset()

    @classmethod
    def from_base(
        cls,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        scaling: Scaling = "alpha/r_max",
    ) -> ElasticLoRALinear:
        """Wrap ``base``; the output is unchanged until B is trained away from zero."""
        return cls(base, rank, alpha, dropout, scaling)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw A as LoRA does (uniform, Kaiming with a = sqrt 5) and zero B."""
        # Drawn on the CPU, so that a seed means the same weights on every device.
        start = nn.init.kaiming_uniform_(
            torch.empty(self.lora_A.shape), a=math.sqrt(5), generator=generator
        )
        with torch.no_grad():
            self.lora_A.copy_(start)
            self.lora_B.zero_()

    def set_active(self, size: int) -> None:
        """Use rank ``size``; 0 switches the adapter off.

        Raises:
            InvalidSubnet: outside 0..R.
        """
        if not 0 <= size <= self.max_rank:
            raise InvalidSubnet(f"rank {size} is outside 0..{self.max_rank}")
        self.active_rank = size

    def scale_at(self, rank: int) -> float:
        """Return what multiplies B A at ``rank``."""
        if self.scaling == "alpha/r_max":
            return self.alpha / self.max_rank
        return self.alpha / (rank if self.scaling == "alpha/r" else math.sqrt(rank))

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(..., I)``.  Returns: ``(..., O)``."""
        rank = self.active_rank
        if self.is_off:
            return self.base(x)
        scale = self.scale_at(rank)
        a, b = self._factors()
        if self.rule is not None:
            return self._merged_product(x, a, b, scale, self.rule)
        autocast = torch.is_autocast_enabled(x.device.type)
        same_kind = self.dropout is None and x.dtype == a.dtype and not autocast
        if same_kind and is_plain(self.base) and _is_frozen(self.base):
            weight, bias = _active(self.base)
            return _FrozenLinearPlusLoRA.apply(x, weight, bias, a, b, scale)
        out = self.base(x)
        inputs = x if self.dropout is None else self.dropout(x)
        # Autocast would turn a float32 copy back into what the input is already.
        low = ((inputs if autocast else inputs.to(a.dtype)) @ a.T) @ b.T
        return out + (low * scale).to(out.dtype)

    def _merged_product(
        self, x: Tensor, a: Tensor, b: Tensor, scale: float, rule: MergeRule
    ) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight, bias = _active(self.base)
        share = self.token_share if self.training else 1.0
        out: Tensor = MergedProduct.apply(x, weight, bias, a, b, scale, rule, share)
        return out

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return the active A ``(r, I)`` and B ``(O, r)``."""
        a = take(self.lora_A[: self.active_rank], 1, self.columns)
        return a, take(self.lora_B[:, : self.active_rank], 0, self.rows)

    @torch.no_grad()
    def merge(self, weight: Tensor) -> Tensor:
        """Return an active weight of the base, ``(O, I)``, with the active adapter in it."""
        if self.is_off:
            return weight
        delta = product(*self._factors(), self.scale_at(self.active_rank))
        if self.rule is not None:
            return self.rule.merge(weight, delta)
        return delta.add_(weight).to(weight.dtype)

    @property
    def is_off(self) -> bool:
        """Whether the adapter adds nothing: rank 0, or a base of which nothing is active."""
        return self.active_rank == 0 or self.columns == () or self.rows == ()

    @property
    def rows(self) -> Ranges | None:
        """The active out features, which are those of the base."""
        return getattr(self.base, "rows", None)

    @property
    def columns(self) -> Ranges | None:
        """The active in features, which are those of the base."""
        return getattr(self.base, "columns", None)

    @property
    def active_features(self) -> tuple[int, int]:
        """How many in and out features are active."""
        return length_of(self.columns, self.in_features), length_of(self.rows, self.out_features)

    def extract(self) -> tuple[Tensor, Tensor, float]:
        """Return copies of the active A ``(r, I)`` and B ``(O, r)``, and their scale."""
        rank = self.active_rank
        a, b = (factor.detach().clone().contiguous() for factor in self._factors())
        return a, b, self.scale_at(rank) if rank else 0.0

    def extra_repr(self) -> str:
        return f"rank={self.active_rank} of {self.max_rank}, alpha={self.alpha}, {self.scaling}"


def is_plain(base: nn.Module) -> bool:
    """Tell whether calling ``base`` is a matrix product and nothing more: no hooks."""
    return (
        type(base) in (nn.Linear, ElasticLinear, ElasticConv1D)
        and not (base._forward_pre_hooks or base._forward_hooks or base._backward_hooks)
        and "forward" not in vars(base)  # replaced by accelerate's offloading, for one
    )


def _is_frozen(base: Any) -> bool:
    return not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)


def _active(base: Any) -> tuple[Tensor, Tensor | None]:
    """Return the weight ``(O, I)`` and bias that a base multiplies with."""
    if isinstance(base, ElasticLinear | ElasticConv1D):
        return base.active_weight(), base.active_bias()
    return base.weight.T if is_transposed(base) else base.weight, base.bias


class _FrozenLinearPlusLoRA(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T with the adapter's products accumulated in place.

    autograd would write the full-size product of the adapter and its input gradient to memory of
    their own and add them afterwards; here both are accumulated by the matrix product itself. In
    the backward pass what is as thin as the rank is held as rows, ``(r, T)``: matrix products that
    write few columns run at two thirds of the speed of those that write few rows, or less.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ a.T  # (T, r), as PEFT computes it: the outputs are equal bit by bit
        out = nn.functional.linear(flat, weight, bias)
        out.addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(flat, weight, a, b, low)
        ctx.scale = scale
        ctx.shape = x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, low = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_low = (b.T @ grad.T).mul_(ctx.scale)  # (r, T)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low.T, a).view(ctx.shape)
        grad_a = grad_low @ flat
        grad_b = (low.T @ grad).mul_(ctx.scale).T
        return grad_x, None, None, grad_a, grad_b, None
