"""What a record of a model family says, and the record that belongs to a model.

The records themselves are in `elastune.models.families` (docs/add-a-family.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from elastune.errors import UnsupportedModel, nearest

#: The roles a linear layer of a block can have, in the order they are listed everywhere. ``qkv``
#: and ``gate_up`` are projections that a family keeps in one matrix.
ROLES = ("qkv", "q", "k", "v", "o", "gate_up", "gate", "up", "down")

Layout = Literal["stacked", "by_group"]
"""How the rows of a fused ``qkv`` are ordered: all of q, all of k, all of v; or key/value group by
group, each with its query heads, its key and its value."""


@dataclass(frozen=True)
class Attention:
    """Where a block keeps its attention, and what else changes with the number of its heads.

    Attributes:
        path: the module of a block that makes the heads' outputs from the hidden states; it may
            hold the output projection or not.
        head_dim: the attribute of that module that holds the size of one head.
        sizes: further attributes of that module -> ``"heads"``, ``"kv_heads"``, ``"groups"`` (query
            heads per key/value head) or ``"width"`` (heads times head size). ``"config.x"`` means
            the field x of the config that the module reads at every call.
        layout: of a fused ``qkv``: a `Layout`, or a function of the model's config that returns it.
        followers: further modules of a block -> the role (q, k or v) whose rows they follow;
            modules that a model does not have are passed over.
        alibi: the positions are told by slopes that belong to head numbers, so that heads cannot
            be cut; a function of the config where only some models of the family do.
        adds_residual: the module adds the residual itself; its second argument, ``residual``.
    """

    path: str
    head_dim: str = "head_dim"
    sizes: Mapping[str, str] = field(default_factory=dict)
    layout: Layout | Callable[[Any], Layout] = "stacked"
    followers: Mapping[str, str] = field(default_factory=dict)
    alibi: bool | Callable[[Any], bool] = False
    adds_residual: bool = False


@dataclass(frozen=True)
class Architecture:
    """Describe where a family of models keeps the parts that can be compressed.

    Attributes:
        model_types: values of ``config.model_type`` that this record serves.
        kind: ``"decoder"`` (causal language model) or ``"encoder"``.
        blocks: path of the block list below ``model.base_model``.
        roles: role -> path of its linear layer inside one block, in the order of ``ROLES``.
        norms: paths inside one block of the norms over the hidden size; those that a model of the
            family does not have are passed over.
        head_norms: paths inside one block of the norms over the size of one attention head.
        plain_head: decoders only: ``logits == get_output_embeddings()(last hidden state)``, with
            no scaling and no soft-capping.
        shared_inputs: groups of roles that read the same tensor.
        attention: what changes with the number of heads.
        returns_tuple: a block returns (hidden states, ...) and not the hidden states alone.
        fixed_depth: (config, block number) -> why that block cannot be left out, or None.
        config_names: ``"heads"``, ``"kv_heads"``, ``"head_dim"``, ``"ffn"`` -> the field of the
            config that sets it. A size without a field is computed by the family from others, so
            that a checkpoint of stock classes cannot have another.
    """

    model_types: tuple[str, ...]
    kind: Literal["decoder", "encoder"]
    blocks: str
    roles: Mapping[str, str]
    norms: tuple[str, ...]
    head_norms: tuple[str, ...] = ()
    plain_head: bool = False
    shared_inputs: tuple[tuple[str, ...], ...] = (("q", "k", "v"), ("gate", "up"))
    attention: Attention = Attention("self_attn")
    returns_tuple: bool = False
    fixed_depth: Callable[[Any, int], str | None] | None = None
    config_names: Mapping[str, str] = field(
        default_factory=lambda: {
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
            "ffn": "intermediate_size",
        }
    )

    def blocks_of(self, model: nn.Module) -> nn.ModuleList:
        """Return the list of blocks of ``model``, first block first.

        Raises:
            UnsupportedModel: the record's path is not there, or is not a list of modules.
        """
        blocks = self._find(base_model_of(model), self.blocks, "block list")
        if not isinstance(blocks, nn.ModuleList):
            raise UnsupportedModel(
                f"the block list {self.blocks!r} of {type_of(model)!r} is a "
                f"{type(blocks).__name__}, not a ModuleList",
                try_=_FIX_RECORD,
            )
        return blocks

    def block_names(self, model: nn.Module) -> list[str]:
        """Return the full dotted name of every block, as in ``model.named_modules()``.

        Raises:
            UnsupportedModel: the record's path is not there.
        """
        count = len(self.blocks_of(model))
        prefix = _prefix(model)
        return [f"{prefix}{self.blocks}.{index}" for index in range(count)]

    def linear_names(self, model: nn.Module, roles: Iterable[str] | None = None) -> dict[str, str]:
        """Return full module name -> role, in block order and then role order.

        Layers that a sub-network does without are passed over.

        Args:
            model: a built model of this family, with any head or none.
            roles: the roles wanted; all by default.

        Raises:
            UnsupportedModel: a role this family does not have, or a module that is not there.
        """
        wanted = self._wanted(model, roles)
        blocks = self.blocks_of(model)
        found: dict[str, str] = {}
        for name, block in zip(self.block_names(model), blocks, strict=True):
            for role in wanted:
                if self._holds(block, role, f"role {role!r} of block {name!r}"):
                    found[f"{name}.{self.roles[role]}"] = role
        return found

    def head_names(self, model: nn.Module) -> list[str]:
        """Return the full names of the modules of a task's head: all that is above the base model.

        A pooler counts too: checkpoints of masked language models come without one.
        """
        base = base_model_of(model)
        names = [
            name
            for name, module in model.named_children()
            if module is not base and any(True for _ in module.parameters())
        ]
        pooler = f"{_prefix(model)}pooler"
        return [pooler, *names] if getattr(base, "pooler", None) is not None else names

    def once_names(self, model: nn.Module) -> list[str]:
        """Return the modules of the head that see one position of a sequence, not all of them.

        An encoder's pooler and classifier read the first token alone; a decoder's classifier is
        computed everywhere and one of its outputs taken.
        """
        if self.kind == "decoder":
            return []
        names = self.head_names(model)
        if type(model).__name__.endswith("ForSequenceClassification"):
            return names
        return [name for name in names if name.endswith("pooler")]

    def check(self, model: nn.Module) -> None:
        """Raise UnsupportedModel unless the paths of this record lead to modules."""
        blocks = self.blocks_of(model)
        if len(blocks) == 0:
            return
        for role in self.roles:
            self._holds(blocks[0], role, f"role {role!r}")
        if not set(self.norms) & {name for name, _ in blocks[0].named_modules()}:
            self._find(blocks[0], self.norms[0], "norm")

    def _holds(self, block: nn.Module, role: str, what: str) -> bool:
        """Tell whether a block has the layer of a role; without heads it may have no attention."""
        path = self.roles[role]
        attention = self._find(block, self.attention.path, "attention")
        is_inside = f"{path}.".startswith(f"{self.attention.path}.")
        if is_inside and not _has_weights(attention):
            return False
        return _has_weights(self._find(block, path, what))

    def _wanted(self, model: nn.Module, roles: Iterable[str] | None) -> list[str]:
        if roles is None:
            return list(self.roles)
        chosen = set(roles)
        unknown = sorted(chosen - set(self.roles))
        if unknown:
            raise UnsupportedModel(
                f"{type_of(model)!r} has no linear layer with role {', '.join(unknown)}"
                f"{nearest(unknown[0], self.roles)}; it has {', '.join(self.roles)}",
                try_="leave those roles out",
            )
        return [role for role in self.roles if role in chosen]

    def _find(self, root: nn.Module, path: str, what: str) -> nn.Module:
        try:
            return root.get_submodule(path)
        except AttributeError:
            raise UnsupportedModel(
                f"the record for {', '.join(self.model_types)} places the {what} at {path!r}, "
                f"but {type(root).__name__} has no such module",
                try_=_FIX_RECORD,
            ) from None


_FIX_RECORD = "correct the record in elastune/models/families.py (docs/add-a-family.md)"


def type_of(model: nn.Module) -> str:
    """Return ``config.model_type``, or the class of what is no transformers model."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return str(model_type or type(model).__name__)


def base_model_of(model: nn.Module) -> nn.Module:
    """Return the model below its head; a model without a head is its own base."""
    if isinstance(model, PreTrainedModel):
        return model.base_model
    raise UnsupportedModel(
        f"a {type(model).__name__} is not a transformers model",
        try_="pass the PreTrainedModel itself, not a wrapper of it",
    )


def _has_weights(module: nn.Module) -> bool:
    # Weights that are quantised may be buffers.
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _prefix(model: nn.Module) -> str:
    base = base_model_of(model)
    name = next(name for name, module in model.named_modules() if module is base)
    return f"{name}." if name else ""
