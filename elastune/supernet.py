"""A model whose parts are elastic, and the one call that says which sub-network is active."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastune.elastic.embedding import (
    ElasticEmbedding,
    check_ranks,
    input_embedding,
    make_factorisable,
    unmake_factorisable,
)
from elastune.elastic.linear import ElasticConv1D, ElasticLinear, can_slice
from elastune.elastic.lora import ElasticLoRALinear, Scaling
from elastune.elastic.mask import WeightLevels
from elastune.elastic.merge_rules import KEEPS, Int4Grid, Keep, KeepGrid, KeepZeros
from elastune.elastic.sparse import ElasticSparsity, check_density
from elastune.errors import InvalidSpace, InvalidSubnet, nearest
from elastune.linears import is_linear
from elastune.models.blocks import Block, BlockShape, blocks
from elastune.models.families import architecture
from elastune.space import ElasticDim, SearchSpace, SubnetConfig
from elastune.state import copy_state
from elastune.structure import STRUCTURE_KINDS, ElasticStructure


class SuperNetwork(nn.Module):
    """A model and its search space; ``activate`` chooses what runs.

    The model's own modules named by the space become elastic in place, and its own weights are
    frozen but for those of ``trained``. The largest sub-network is active first. Nothing here is
    random after construction.

    Args:
        model: a transformers model; changed in place.
        space: dims over module names of ``model``.
        alpha: LoRA's alpha (for the largest rank).
        dropout: on the adapters' inputs.
        scaling: see `elastune.elastic.lora.Scaling`.
        seed: of the adapters' initial weights.
        trained: names of modules trained whole, such as a new classification head.
        train_base: train the model's own weights, too; those of a part that is cut off get no
            gradient.
        levels: which weights stay at which density, where the space has dims of that kind
            (`elastune.build_sparsity.sparsity_levels`).
        keep: what merging is to keep of the base, which is then kept in training, too: see
            `elastune.elastic.merge_rules.Keep`.
        token_share: part of the tokens that the gradient of adapters that keep something is
            estimated from (`elastune.elastic.merged_product`).
        grids: module name -> the INT4 grid that its weight lies on (`elastune.quantise`).

    Raises:
        InvalidSpace: a dim names a module that the model lacks or that cannot be made elastic, or
            the model is elastic already. The model is then left as it was.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        space: SearchSpace,
        *,
        alpha: float = 64,
        dropout: float = 0.0,
        scaling: Scaling = "alpha/r_max",
        seed: int = 0,
        trained: Sequence[str] = (),
        train_base: bool = False,
        levels: WeightLevels | None = None,
        keep: Keep = "nothing",
        token_share: float = 1.0,
        grids: Mapping[str, Int4Grid] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.trained = tuple(trained)
        self.train_base = train_base
        self.space = space
        # Checked whole before anything is changed: a refused model is as it was.
        largest = _largest_ranks(model, space)
        self.keep = keep
        """What merging keeps of the base."""
        self.grids = dict(grids or {})
        """Module name -> the INT4 grid that its weight lies on."""
        _check_keep(model, space, largest, keep, dropout, token_share, self.grids)
        table = _embedding_dim(model, space)
        sparse = [dim for dim in space.dims if dim.kind == "density"]
        if sparse:
            check_density(model, sparse, levels, architecture(model).linear_names(model))
        cuts = [dim for dim in space.dims if dim.kind in STRUCTURE_KINDS]
        self.structure = ElasticStructure(model, cuts) if cuts else None
        self.embedding = make_factorisable(table[0], table[1].choices) if table else None
        """The word embedding, where its rank is a dim."""
        self._table_dim = table[1].name if table else None
        self.sparsity = ElasticSparsity(model, sparse, levels) if sparse and levels else None
        """The weights whose sparsity is elastic, if there are any."""
        model.requires_grad_(train_base)
        if self.embedding is not None and not self.embedding.is_full:
            self.embedding.weight.requires_grad_(False)  # no sub-network uses the table itself
        for name in self.trained:
            model.get_submodule(name).requires_grad_(True)
        self.adapters = _add_adapters(model, largest, alpha, dropout, scaling, seed)
        for name, adapter in self.adapters.items():
            adapter.token_share = token_share
            if keep != "nothing":
                adapter.rule = KeepZeros() if keep == "zeros" else KeepGrid(self.grids[name])
        self._members: list[tuple[str, list[ElasticLoRALinear]]] = [
            (dim.name, [self.adapters[name] for name in dim.modules])
            for dim in space.dims
            if dim.kind == "rank"
        ]
        self._cuts = [dim.name for dim in cuts]
        self._densities = [dim.name for dim in sparse]
        self._active = SubnetConfig({})
        self.activate(space.largest())

    @property
    def config(self) -> SubnetConfig:
        """The active configuration."""
        return self._active

    def activate(self, config: SubnetConfig) -> None:
        """Make ``config`` the sub-network that runs.

        Raises:
            InvalidSubnet: not in the space; what was active stays active.
        """
        if config not in self.space:
            try:
                self.space.check(config)
            except InvalidSubnet as error:
                raise InvalidSubnet(f"cannot activate {config.short()}: {error.message}") from None
        for name, members in self._members:
            size = config[name]
            for member in members:
                member.set_active(size)
        if self.structure is not None:
            for name in self._cuts:
                if config[name] != self._active.get(name):
                    self.structure.set_active(name, config[name])
        if self.sparsity is not None:
            for name in self._densities:
                if config[name] != self._active.get(name):
                    self.sparsity.set_active(name, config[name])
        if self.embedding is not None and self._table_dim is not None:
            self.embedding.set_active(config[self._table_dim])
        self._active = config

    @property
    def has_elastic_base(self) -> bool:
        """Whether sub-networks differ in more than their adapters."""
        return any(part is not None for part in (self.structure, self.embedding, self.sparsity))

    def shapes(self, config: SubnetConfig) -> list[BlockShape | None]:
        """Return the sizes of every block of a sub-network; None for a block that is left out."""
        if self.structure is not None:
            return self.structure.shapes(config)
        return [block.shape for block in self.blocks]

    @property
    def blocks(self) -> list[Block]:
        """The model's blocks at their full sizes, whatever is active."""
        return blocks(self.model) if self.structure is None else self.structure.blocks

    @contextmanager
    def active(self, config: SubnetConfig) -> Iterator[None]:
        """Activate ``config``, and afterwards what was active before."""
        before = self._active
        self.activate(config)
        try:
            yield
        finally:
            self.activate(before)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active sub-network: the wrapped model's own forward."""
        return self.model(*args, **kwargs)

    def trained_state(self) -> dict[str, Tensor]:
        """Return what training changes, by name: A and B of adapters, weights of head and base.

        The factors of an elastic embedding are there in any case: its ranks mean nothing else.
        """
        state = {}
        if self.train_base:
            state = {name: p.detach() for name, p in _base_parameters(self.model)}
        for name in self.trained:
            for part, parameter in self.model.get_submodule(name).named_parameters():
                state[f"{name}.{part}"] = parameter.detach()
        if self.embedding is not None:
            name = next(n for n, m in self.model.named_modules() if m is self.embedding)
            state[f"{name}.factor_a"] = self.embedding.factor_a.detach()
            state[f"{name}.factor_b"] = self.embedding.factor_b.detach()
        for name, adapter in self.adapters.items():
            state[f"{name}.lora_A"] = adapter.lora_A.detach()
            state[f"{name}.lora_B"] = adapter.lora_B.detach()
        return state

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Copy in what `trained_state` returned.

        Raises:
            BadArtifact: names or shapes differ; names the first few, nothing is copied.
        """
        copy_state(state, self.trained_state(), "this super-network")

    def unwrap(self) -> PreTrainedModel:
        """Put the model's own modules back and return it; this super-network is then of no use."""
        if self.sparsity is not None:
            self.sparsity.release()
        if self.structure is not None:
            self.structure.release()
        if self.embedding is not None:
            unmake_factorisable(self.embedding)
        for name, adapter in self.adapters.items():
            self.model.set_submodule(name, adapter.base)
        return self.model

    def extra_repr(self) -> str:
        return f"{self.space!r}, active: {self._active.short()}"


def _base_parameters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the model's own parameters by the names they have without adapters, tied ones once."""
    for name, parameter in model.named_parameters():
        if not name.endswith((".lora_A", ".lora_B")):
            yield name.replace(".base.", "."), parameter


def _largest_ranks(model: PreTrainedModel, space: SearchSpace) -> dict[str, int]:
    """Return the largest rank of every module of the space, checked to fit the model."""
    modules = dict(model.named_modules())
    elastic = (ElasticLoRALinear, ElasticLinear, ElasticConv1D, ElasticEmbedding)
    if any(isinstance(module, elastic) for module in modules.values()):
        raise InvalidSpace("the model is elastic already", try_="unwrap() its super-network first")
    largest: dict[str, int] = {}
    for dim in space.dims:
        if dim.kind != "rank":
            continue
        if dim.choices[0] < 1:
            raise InvalidSpace(
                f"{dim.name}: its only rank is 0, so it has no adapter", try_="leave the dim out"
            )
        for name in dim.modules:
            module = modules.get(name)
            if module is None:
                raise InvalidSpace(
                    f"{dim.name}: the model has no module {name!r}{nearest(name, modules)}"
                )
            if not is_linear(module):
                raise InvalidSpace(
                    f"{dim.name}: {name} is a {type(module).__name__}, not linear",
                    try_="the names of linear layers: architecture(model).linear_names(model)",
                )
            if name in largest:
                raise InvalidSpace(
                    f"{name} stands in two dims; one rank cannot follow both",
                    try_="each module in one dim",
                )
            largest[name] = dim.choices[0]
    return largest


def _check_keep(
    model: PreTrainedModel,
    space: SearchSpace,
    largest: Mapping[str, int],
    keep: Keep,
    dropout: float,
    token_share: float,
    grids: Mapping[str, Int4Grid],
) -> None:
    """Raise InvalidSpace unless merging can keep what is asked for."""
    if keep not in KEEPS:
        raise InvalidSpace(f"keep must be one of {', '.join(KEEPS)}, got {keep!r}")
    if not 0 < token_share <= 1:
        raise InvalidSpace(f"token_share is a part of the tokens, above 0 to 1, got {token_share}")
    if keep == "nothing":
        return
    if dropout > 0:
        raise InvalidSpace(
            f"keep={keep} trains merged weights, which have no input of the adapter to drop",
            try_="dropout 0",
        )
    for name in largest:
        if not can_slice(model.get_submodule(name)):
            raise InvalidSpace(
                f"keep={keep}: the weight of {name} is packed, and cannot be merged",
                try_="a base in float32, bfloat16 or float16",
            )
        if keep == "int4" and name not in grids:
            raise InvalidSpace(
                f"keep=int4: there is no grid of {name}", try_="grids=quantise_(model)"
            )
    if keep == "int4" and any(dim.kind in STRUCTURE_KINDS for dim in space.dims):
        raise InvalidSpace(
            "keep=int4 is of bases whose ranks and density alone are elastic",
            try_="keep='zeros' or 'nothing', or a space of ranks alone",
        )


def _embedding_dim(
    model: PreTrainedModel, space: SearchSpace
) -> tuple[nn.Embedding, ElasticDim] | None:
    """Return the word embedding and its dim, checked to fit each other."""
    dims = [dim for dim in space.dims if dim.kind == "embedding"]
    if not dims:
        return None
    name, table = input_embedding(model)
    for dim in dims:
        if dim.modules != (name,):
            raise InvalidSpace(
                f"{dim.name}: its modules are {', '.join(dim.modules)}, the embedding is {name}"
            )
        check_ranks(dim.name, dim.choices, table)
    if len(dims) > 1:
        raise InvalidSpace(
            f"{name} stands in two embedding dims: {dims[0].name}, {dims[1].name}",
            try_="one embedding dim",
        )
    return table, dims[0]


def _add_adapters(
    model: PreTrainedModel,
    largest: dict[str, int],
    alpha: float,
    dropout: float,
    scaling: Scaling,
    seed: int,
) -> dict[str, ElasticLoRALinear]:
    """Wrap the modules that get an adapter; returns the wrappers by module name."""
    full = max(largest.values(), default=0)
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for name, rank in largest.items():
        # One scale for all adapters, alpha / (largest rank of the space), also where a dim's own
        # largest rank is lower: as in the papers, where the scale does not follow the rank.
        own_alpha = alpha * rank / full if scaling == "alpha/r_max" else alpha
        base = model.get_submodule(name)
        adapter = ElasticLoRALinear.from_base(base, rank, own_alpha, dropout, scaling)
        adapter.reset(generator)
        model.set_submodule(name, adapter)
        adapters[name] = adapter
    return adapters
