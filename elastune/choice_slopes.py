"""By how much each choice of each dim changes the loss, from one forward and backward pass.

Measuring single choices takes a forward pass for each (`elastune.allocate`). Here all of them
follow from slopes of the loss: with d_t = <dL/dy_t, dy_t>, where dy_t is by how much a choice
changes the output y_t of the module it concerns at token t, the loss changes by about

    sum_t d_t + 1/2 sum_t d_t^2,

a Taylor series to the second order with the empirical Fisher information for the Hessian (LeCun et
al. 1990, optimal brain damage; Kwon et al. 2022, for the gates of transformers). What one choice
changes is added up before it is squared, so that units that make up for each other count as such;
each token stands for itself. Both terms are needed: on few examples, and for models that are not
at a minimum, the first is the larger (docs/results.md).

The largest sub-network runs, and gates take out what another one lacks: what is outside has a slope
as well as what is inside, so that choices are compared both ways from any sub-network.

Shapes: `B` rows of a batch, `T` tokens, `I` in features, `O` out features, `U` units of a half,
`R` largest rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from elastune.block_choices import EffectiveChoices, blocks_of
from elastune.elastic.linear import take
from elastune.elastic.lora import ElasticLoRALinear
from elastune.elastic.sparse import mask_of
from elastune.errors import BadData
from elastune.importance.passes import Passes
from elastune.importance.structure import block_ends
from elastune.linears import is_transposed
from elastune.models.blocks import Block
from elastune.space import ElasticDim, SubnetConfig
from elastune.supernet import SuperNetwork

ESTIMATED_KINDS = ("rank", "heads", "ffn", "depth", "density")
"""Kinds of dims whose choices have estimates."""


def choice_changes(
    net: SuperNetwork, passes: Passes, batch: dict[str, Any], at: SubnetConfig
) -> tuple[dict[str, Tensor], int]:
    """Estimate by how much each choice changes a batch's loss, all others as in a sub-network.

    Args:
        net: its largest sub-network is active, no weight asks for a gradient, gradients are on.
        passes: makes the loss of a batch.
        batch: one of ``passes``.
        at: the sub-network that single choices are changed in.

    Returns:
        Dim -> change of the batch's summed loss, float64 ``(choices,)``, with 0 for the choice of
        ``at``, without the dims inside blocks that ``at`` leaves out; and the number of targets.

    Raises:
        BadData: the loss does not depend on any module of a dim.
    """
    idle = EffectiveChoices(net).idle(at)
    dims = [dim for dim in net.space.dims if dim.kind in ESTIMATED_KINDS]
    watch = _Watch(batch)
    with watch.embeddings_followed(net.model), ExitStack() as stack:
        for dim in dims:
            for hook in _hooks(net, dim, at[dim.name], watch):
                stack.callback(hook.remove)
        loss, n_targets = passes.loss(batch)
        loss.backward()
    working = [dim.name for dim in dims if dim.name not in idle]
    return {name: watch.change_of(name) for name in working}, n_targets


class _Watch:
    """The slopes of one batch: what the loss changes by at each token, for each choice of a dim."""

    def __init__(self, batch: Mapping[str, Any]) -> None:
        self._n_rows = len(next(value for value in batch.values() if isinstance(value, Tensor)))
        self._found: dict[str, Tensor] = {}

    def add(self, dim: ElasticDim, choice: int, slopes: Tensor) -> None:
        """Add slopes ``(B, T, choices)`` of one of a dim's modules, from some choice on."""
        own = dim.choices.index(choice)
        slopes = slopes.float() - slopes[..., own : own + 1].float()
        before = self._found.get(dim.name)
        self._found[dim.name] = slopes if before is None else before + slopes

    def change_of(self, dim: str) -> Tensor:
        """Return the estimated change of the batch's loss, float64 ``(choices,)``."""
        if dim not in self._found:
            raise BadData(
                f"the loss does not depend on {dim}",
                try_="a head whose loss uses it, or leave it out of the space",
            )
        slopes = self._found[dim].double()
        return (slopes + slopes.square() / 2).sum(dim=(0, 1)).cpu()

    def tokens(self, x: Tensor) -> Tensor:
        """Return ``(B, T, features)``; some families flatten rows and tokens."""
        x = x.detach()
        return x.view(self._n_rows, -1, x.shape[-1]) if x.dim() == 2 else x

    @contextmanager
    def embeddings_followed(self, model: Any) -> Iterator[None]:
        """Let gradients reach the first block, though no weight asks for one."""
        handle = model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output.requires_grad_()
        )
        try:
            yield
        finally:
            handle.remove()


class _Outputs(NamedTuple):
    """What choices of a dim do to the output of one of its modules."""

    cut: Callable[[Tensor, Tensor], Tensor]
    """Input and output, of the largest choice -> the output at the choice that is active."""
    slopes: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Input and output, of the largest choice, and the gradient of the output -> slopes of a token
    towards each choice, ``(B, T, choices)``, from any common origin."""


def _hooks(net: SuperNetwork, dim: ElasticDim, choice: int, watch: _Watch) -> Iterator[Any]:
    """Yield the hooks that cut a dim to a choice, and watch what each choice would change."""
    if dim.kind in ("rank", "density"):
        of_kind = _of_rank if dim.kind == "rank" else _of_density
        for name in dim.modules:
            module = net.model.get_submodule(name)
            yield _at_output(module, dim, choice, watch, of_kind(module, dim.choices, choice))
        return
    for block in blocks_of(dim, net.blocks):
        if dim.kind == "depth":
            of_block = _of_depth(dim.choices, choice)
            yield _at_output(block.module, dim, choice, watch, of_block)
        else:
            yield _at_units(block, dim, choice, watch)


def _at_output(
    module: nn.Module, dim: ElasticDim, choice: int, watch: _Watch, does: _Outputs
) -> Any:
    """Cut and watch a module whose output a choice changes; its input is its first argument."""

    def hook(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        cut = y if choice == dim.choices[0] else does.cut(x, y)
        seen = watch.tokens(x), watch.tokens(y)  # x and y would keep the graph alive

        def add(gradient: Tensor) -> None:
            watch.add(dim, choice, does.slopes(*seen, watch.tokens(gradient)))

        cut.register_hook(add)
        return (cut, *output[1:]) if isinstance(output, tuple) else cut

    return module.register_forward_hook(hook, with_kwargs=True)


def _at_units(block: Block, dim: ElasticDim, choice: int, watch: _Watch) -> Any:
    """Cut and watch the units of a half at the input of the projection that ends it."""
    name = f"layers.{block.index}.{dim.kind}"
    module, table = next((m, t) for n, m, t in block_ends(block) if n == name)
    per_unit = block.heads_per_unit if dim.kind == "heads" else 1
    kept = torch.tensor([number // per_unit for number in dim.choices])
    table = table[: kept[0]]  # the largest sub-network may be less than the model

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        places = table.to(x.device)
        there = x.new_ones(x.shape[-1])
        there[places[choice // per_unit :].flatten()] = 0
        cut, seen = x * there, watch.tokens(x)

        def add(gradient: Tensor) -> None:
            by_unit = (seen * watch.tokens(gradient))[..., places].sum(dim=-1)
            watch.add(dim, choice, -_sums_from(by_unit, kept))

        cut.register_hook(add)
        return (cut, *args[1:])

    return module.register_forward_pre_hook(hook)


def _sums_from(values: Tensor, firsts: Tensor) -> Tensor:
    """Return the sums of ``(..., U)`` from each of ``firsts`` on, ``(..., len(firsts))``."""
    ends = nn.functional.pad(values.flip(-1).cumsum(-1).flip(-1), (0, 1))
    return ends[..., firsts.to(values.device)]


def _of_depth(choices: tuple[int, ...], choice: int) -> _Outputs:
    """A block that is left out hands its input on."""

    def cut(x: Tensor, y: Tensor) -> Tensor:
        return x.clone()  # hooks on x itself would see all of its uses

    def slopes(x: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
        gone = ((x - y) * gradient).sum(dim=-1, keepdim=True)
        return gone * gone.new_tensor([float(number == 0) for number in choices])

    return _Outputs(cut, slopes)


def _of_rank(adapter: Any, ranks: tuple[int, ...], choice: int) -> _Outputs:
    """An adapter of rank r adds ``scale(r) B[:, :r] A[:r] x``."""
    assert isinstance(adapter, ElasticLoRALinear)
    a = take(adapter.lora_A[: ranks[0]].detach(), 1, adapter.columns)
    b = take(adapter.lora_B[:, : ranks[0]].detach(), 0, adapter.rows)

    def added(x: Tensor, rank: int) -> Tensor:
        return (x.to(a.dtype) @ a[:rank].T @ b[:, :rank].T) * _scale(adapter, rank)

    def cut(x: Tensor, y: Tensor) -> Tensor:
        return y + (added(x, choice) - added(x, ranks[0])).to(y.dtype)

    def slopes(x: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
        by_rank = (x.to(a.dtype) @ a.T) * (gradient.to(b.dtype) @ b)
        adds = nn.functional.pad(by_rank.cumsum(dim=-1), (1, 0))[..., list(ranks)]
        return adds * adds.new_tensor([_scale(adapter, rank) for rank in ranks])

    return _Outputs(cut, slopes)


def _scale(adapter: ElasticLoRALinear, rank: int) -> float:
    return adapter.scale_at(rank) if rank else 0.0


def _of_density(module: Any, densities: tuple[int, ...], choice: int) -> _Outputs:
    """A weight at a lower density lacks some of its numbers."""
    linear: Any = module.base if isinstance(module, ElasticLoRALinear) else module
    mask = mask_of(linear)
    assert mask is not None

    def lacking(x: Tensor, density: int) -> Tensor:
        """Return what the output lacks, next to that of the largest density."""
        levels = mask.levels.to(linear.weight.device)
        gone = (levels >= mask.least_at(densities[0])) & (levels < mask.least_at(density))
        lacks = linear.weight.detach() * gone
        lacks = lacks.T if is_transposed(linear) else lacks
        return x @ take(take(lacks, 0, linear.rows), 1, linear.columns).T

    def cut(x: Tensor, y: Tensor) -> Tensor:
        return y - lacking(x, choice)

    def slopes(x: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
        lost = [(lacking(x, density) * gradient).sum(dim=-1) for density in densities]
        return -torch.stack(lost, dim=-1)

    return _Outputs(cut, slopes)
