"""Where each model family keeps its blocks, projections and norms: the one place that knows.

Adding a family is one record in ``ARCHITECTURES`` and one line in ``tests/test_architecture.py``
(docs/add-a-family.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from elastune.errors import UnsupportedModel, nearest

#: The roles a linear layer of a block can have, in the order they are listed everywhere.
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Architecture:
    """Describe where a family of models keeps the parts that can be compressed.

    Attributes:
        model_types: values of ``config.model_type`` that this record serves.
        kind: ``"decoder"`` (causal language model) or ``"encoder"``.
        blocks: path of the block list below ``model.base_model``.
        roles: role -> path of its linear layer inside one block, in the order of ``ROLES``.
        norms: paths inside one block of the norms over the hidden size.
        head_norms: paths inside one block of the norms over the size of one attention head.
        plain_head: decoders only: ``logits == get_output_embeddings()(last hidden state)``, with
            no scaling and no soft-capping.
        shared_inputs: groups of roles that read the same tensor.
    """

    model_types: tuple[str, ...]
    kind: Literal["decoder", "encoder"]
    blocks: str
    roles: Mapping[str, str]
    norms: tuple[str, ...]
    head_norms: tuple[str, ...] = ()
    plain_head: bool = False
    shared_inputs: tuple[tuple[str, ...], ...] = (("q", "k", "v"), ("gate", "up"))

    def blocks_of(self, model: nn.Module) -> nn.ModuleList:
        """Return the list of blocks of ``model``, first block first.

        Raises:
            UnsupportedModel: the record's path is not there, or is not a list of modules.
        """
        blocks = self._find(_base_model(model), self.blocks, "block list")
        if not isinstance(blocks, nn.ModuleList):
            raise UnsupportedModel(
                f"the block list {self.blocks!r} of {_type_of(model)!r} is a "
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
                self._find(block, self.roles[role], f"role {role!r} of block {name!r}")
                found[f"{name}.{self.roles[role]}"] = role
        return found

    def head_names(self, model: nn.Module) -> list[str]:
        """Return the full names of the modules of a task's head: all that is above the base model.

        A pooler counts too: checkpoints of masked language models come without one.
        """
        base = _base_model(model)
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
        """Raise UnsupportedModel unless every path of this record leads to a module."""
        blocks = self.blocks_of(model)
        if len(blocks) == 0:
            return
        for role, path in self.roles.items():
            self._find(blocks[0], path, f"role {role!r}")
        for path in (*self.norms, *self.head_norms):
            self._find(blocks[0], path, "norm")

    def _wanted(self, model: nn.Module, roles: Iterable[str] | None) -> list[str]:
        if roles is None:
            return list(self.roles)
        chosen = set(roles)
        unknown = sorted(chosen - set(self.roles))
        if unknown:
            raise UnsupportedModel(
                f"{_type_of(model)!r} has no linear layer with role {', '.join(unknown)}"
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


_FIX_RECORD = "correct the record in elastune/models/architecture.py (docs/add-a-family.md)"

_LLAMA = Architecture(
    model_types=("llama", "mistral", "qwen2"),
    kind="decoder",
    blocks="layers",
    roles={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    norms=("input_layernorm", "post_attention_layernorm"),
    plain_head=True,
)

_QWEN3 = dataclasses.replace(
    _LLAMA, model_types=("qwen3",), head_norms=("self_attn.q_norm", "self_attn.k_norm")
)

# Gemma 2 caps its logits, 30 * tanh(logits / 30), so its head is not plain.
_GEMMA2 = dataclasses.replace(
    _LLAMA,
    model_types=("gemma2",),
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    plain_head=False,
)

_GEMMA3 = dataclasses.replace(
    _GEMMA2,
    model_types=("gemma3_text",),
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    plain_head=True,
)

_BERT = Architecture(
    model_types=("bert", "roberta"),
    kind="encoder",
    blocks="encoder.layer",
    roles={
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
    },
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    shared_inputs=(("q", "k", "v"),),
)

_DISTILBERT = Architecture(
    model_types=("distilbert",),
    kind="encoder",
    blocks="transformer.layer",
    roles={
        "q": "attention.q_lin",
        "k": "attention.k_lin",
        "v": "attention.v_lin",
        "o": "attention.out_lin",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
    },
    norms=("sa_layer_norm", "output_layer_norm"),
    shared_inputs=(("q", "k", "v"),),
)

#: Every family the library knows. Add a family by adding its record here.
ARCHITECTURES: tuple[Architecture, ...] = (_LLAMA, _QWEN3, _GEMMA2, _GEMMA3, _BERT, _DISTILBERT)


def known_model_types() -> list[str]:
    """Return every ``config.model_type`` that has a record, in the order of ``ARCHITECTURES``."""
    return [name for record in ARCHITECTURES for name in record.model_types]


def record_for(model_type: str) -> Architecture:
    """Return the record of one ``config.model_type``.

    Raises:
        UnsupportedModel: no record serves this type.
    """
    for record in ARCHITECTURES:
        if model_type in record.model_types:
            return record
    known = known_model_types()
    raise UnsupportedModel(
        f"models of type {model_type!r} are not known{nearest(model_type, known)}; "
        f"known types: {', '.join(known)}",
        try_="add one record to elastune/models/architecture.py, as docs/add-a-family.md shows",
    )


def architecture(model: nn.Module) -> Architecture:
    """Return the checked record of a built model, with any head or none.

    ``plain_head`` is settled by the model's own configuration: a family that may cap its logits
    has a plain head only where the cap is switched off.

    Raises:
        UnsupportedModel: no record for this model type, or the record does not fit the model.
    """
    record = record_for(_type_of(model))
    if getattr(getattr(model, "config", None), "final_logit_softcapping", None) is not None:
        record = dataclasses.replace(record, plain_head=False)
    record.check(model)
    return record


def _type_of(model: nn.Module) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return str(model_type or type(model).__name__)


def _base_model(model: nn.Module) -> nn.Module:
    """Return the model below its head; a model without a head is its own base."""
    if isinstance(model, PreTrainedModel):
        return model.base_model
    raise UnsupportedModel(
        f"a {type(model).__name__} is not a transformers model",
        try_="pass the PreTrainedModel itself, not a wrapper of it",
    )


def _prefix(model: nn.Module) -> str:
    base = _base_model(model)
    name = next(name for name, module in model.named_modules() if module is base)
    return f"{name}." if name else ""
