"""What each choice of each dim loses by itself, estimated from one forward and backward pass.

Measuring single choices takes a forward pass for each (`elastune.allocate`). Here all of them
follow from slopes of the loss: with d_t = <dL/dy_t, dy_t>, where dy_t is by how much a choice
changes the output y_t of the module it concerns at token t, the loss changes by about

    sum_t d_t + 1/2 sum_t d_t^2,

a Taylor series to the second order with the empirical Fisher information for the Hessian (LeCun et
al. 1990, optimal brain damage; Kwon et al. 2022, for the gates of transformers). What one choice
removes is added up before it is squared, so that units that make up for each other count as such;
each token stands for itself. Both terms are needed: on few examples, and for models that are not
at a minimum, the first is the larger (docs/results.md).

Shapes: `B` rows of a batch, `T` tokens, `I` in features, `O` out features, `U` units of a half,
`R` largest rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from elastune.block_choices import blocks_of
from elastune.elastic.linear import take
from elastune.elastic.lora import ElasticLoRALinear
from elastune.elastic.sparse import mask_of
from elastune.errors import BadData
from elastune.heads import Head
from elastune.importance.passes import Passes, gradients_of
from elastune.importance.structure import block_ends
from elastune.linears import is_transposed
from elastune.models.blocks import Block
from elastune.space import ElasticDim, SubnetConfig
from elastune.supernet import SuperNetwork

ESTIMATED_KINDS = ("rank", "heads", "ffn", "depth", "density")
"""Kinds of dims whose choices have estimates."""

Slopes = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Input, output and the output's gradient of a module -> slopes of a token for each choice,
``(B, T, choices)``."""


def estimate_choice_losses(
    net: SuperNetwork,
    batches: Iterable[Mapping[str, Any]],
    head: Head,
    *,
    at: SubnetConfig | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[int, float]]:
    """Estimate the loss of every choice alone, all other dims as in one sub-network.

    The super-network is not changed. Activations of a training step are alive, batch by batch; a
    batch costs a forward and a backward pass, about three evaluations of it.

    Args:
        net: with trained or untrained weights.
        batches: as ``head.collate`` makes them of items of validation examples.
        head: makes their loss.
        at: the sub-network that choices are changed in, downwards alone; the largest by default.
        progress: called with the number of batches done.

    Returns:
        Dim -> choice -> estimated increase of the mean loss per target over that sub-network, for
        its choice, which has 0, and those below. Dims of kinds that are not in `ESTIMATED_KINDS`
        are left out, and so are those inside parts that ``at`` leaves out.

    Raises:
        BadData: there are no batches, or the loss does not depend on a dim's modules.
    """
    is_largest = at is None or at == net.space.largest()
    at = net.space.largest() if at is None else at
    dims = [_from(at[dim.name], dim) for dim in net.space.dims if dim.kind in ESTIMATED_KINDS]
    sums = {dim.name: torch.zeros(len(dim.choices), dtype=torch.float64) for dim in dims}
    n_targets = 0
    passes = Passes(net.model, batches, head, 0, progress)
    with net.active(at), gradients_of(net.model, ()), torch.enable_grad():
        for batch in passes:
            watch = _Watch(batch)
            with watch.embeddings_followed(net.model), ExitStack() as stack:
                for dim in dims:
                    for hook in _hooks(net, dim, watch):
                        stack.callback(hook.remove)
                loss, targets = passes.loss(batch)
                loss.backward()
            n_targets += targets
            dims = [dim for dim in dims if is_largest or watch.saw(dim.name)]
            for dim in dims:
                sums[dim.name] += watch.change_of(dim.name)
    return {
        dim.name: {
            choice: float(total) / max(n_targets, 1)
            for choice, total in zip(dim.choices, sums[dim.name], strict=True)
        }
        for dim in dims
    }


def _from(choice: int, dim: ElasticDim) -> ElasticDim:
    """Return the dim with the choices from ``choice`` down."""
    return replace(dim, choices=dim.choices[dim.choices.index(choice) :])


class _Watch:
    """The slopes of one batch: what the loss changes by at each token, for each choice of a dim."""

    def __init__(self, batch: Mapping[str, Any]) -> None:
        self._n_rows = len(next(value for value in batch.values() if isinstance(value, Tensor)))
        self._found: dict[str, Tensor] = {}

    def add(self, dim: str, slopes: Tensor) -> None:
        """Add slopes ``(B, T, choices)`` of one of a dim's modules."""
        slopes = slopes.float()
        self._found[dim] = self._found[dim] + slopes if dim in self._found else slopes

    def saw(self, dim: str) -> bool:
        """Tell whether any of a dim's modules ran."""
        return dim in self._found

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


def _hooks(net: SuperNetwork, dim: ElasticDim, watch: _Watch) -> Iterator[Any]:
    """Yield the hooks that watch what a dim's choices would change."""
    if dim.kind in ("rank", "density"):
        of_kind = _rank_slopes if dim.kind == "rank" else _density_slopes
        for name in dim.modules:
            module = net.model.get_submodule(name)
            yield _watch_output(module, dim, watch, of_kind(module, dim.choices))
        return
    for block in blocks_of(dim, net.blocks):
        if dim.kind == "depth":
            yield _watch_output(block.module, dim, watch, _depth_slopes(dim.choices))
        else:
            yield _watch_units(block, dim, watch)


def _watch_output(module: nn.Module, dim: ElasticDim, watch: _Watch, slopes: Slopes) -> Any:
    """Watch a module whose output a choice changes; its input is its first argument."""

    def watched(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        x = watch.tokens(args[0] if args else kwargs["hidden_states"])
        y = output[0] if isinstance(output, tuple) else output

        def add(gradient: Tensor) -> None:
            watch.add(dim.name, slopes(x, watch.tokens(y), watch.tokens(gradient)))

        y.register_hook(add)

    return module.register_forward_hook(watched, with_kwargs=True)


def _watch_units(block: Block, dim: ElasticDim, watch: _Watch) -> Any:
    """Watch the units of a half at the input of the projection that ends it."""
    name = f"layers.{block.index}.{dim.kind}"
    module, table = next((m, t) for n, m, t in block_ends(block) if n == name)
    per_unit = block.heads_per_unit if dim.kind == "heads" else 1
    kept = torch.tensor([choice // per_unit for choice in dim.choices])
    table = table[: kept[0]]  # of a sub-network that may be less than the model

    def watched(_: nn.Module, args: tuple[Any, ...]) -> None:
        x = watch.tokens(args[0])

        def add(gradient: Tensor) -> None:
            by_unit = (x * watch.tokens(gradient))[..., table.to(x.device)].sum(dim=-1)
            watch.add(dim.name, -_sums_from(by_unit, kept))

        args[0].register_hook(add)

    return module.register_forward_pre_hook(watched)


def _sums_from(values: Tensor, firsts: Tensor) -> Tensor:
    """Return the sums of ``(..., U)`` from each of ``firsts`` on, ``(..., len(firsts))``."""
    ends = nn.functional.pad(values.flip(-1).cumsum(-1).flip(-1), (0, 1))
    return ends[..., firsts.to(values.device)]


def _depth_slopes(choices: tuple[int, ...]) -> Slopes:
    """A block that is left out hands its input on."""

    def slopes(x: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
        gone = ((x - y) * gradient).sum(dim=-1, keepdim=True)
        return gone * gone.new_tensor([float(choice == 0) for choice in choices])

    return slopes


def _rank_slopes(adapter: Any, ranks: tuple[int, ...]) -> Slopes:
    """An adapter of rank r adds ``scale(r) B[:, :r] A[:r] x``."""
    assert isinstance(adapter, ElasticLoRALinear)

    def slopes(x: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
        a = take(adapter.lora_A[: ranks[0]].detach(), 1, adapter.columns)
        b = take(adapter.lora_B[:, : ranks[0]].detach(), 0, adapter.rows)
        by_rank = (x.to(a.dtype) @ a.T) * (gradient.to(b.dtype) @ b)
        adds = nn.functional.pad(by_rank.cumsum(dim=-1), (1, 0))[..., list(ranks)]
        adds = adds * adds.new_tensor([adapter.scale_at(rank) if rank else 0.0 for rank in ranks])
        return adds - adds[..., :1]

    return slopes


def _density_slopes(module: Any, densities: tuple[int, ...]) -> Slopes:
    """A weight at a lower density lacks some of its numbers."""
    linear: Any = module.base if isinstance(module, ElasticLoRALinear) else module
    mask = mask_of(linear)
    assert mask is not None

    def slopes(x: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
        found = []
        for density in densities:
            levels = mask.levels.to(linear.weight.device)
            gone = (levels >= mask.least_at(densities[0])) & (levels < mask.least_at(density))
            lacks = linear.weight.detach() * gone
            lacks = lacks.T if is_transposed(linear) else lacks
            lost = x @ take(take(lacks, 0, linear.rows), 1, linear.columns).T
            found.append(-(lost * gradient).sum(dim=-1))
        return torch.stack(found, dim=-1)

    return slopes
