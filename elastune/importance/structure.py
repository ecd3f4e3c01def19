"""How much each head (key/value group) and each feed-forward channel of a model matters.

One score for each unit of a block's half (`elastune.models.blocks`), large = keep:

- ``wanda``: the norm of a unit's output columns times the norm of what flows into them, after Wanda
  (Sun et al. 2023, eq. 1): sqrt(sum_j ||W_:j||^2 ||x_j||^2) over the columns j of the unit in the
  projection that ends the half.
- ``taylor``: |sum_j sum_t x_tj dL/dx_tj| over the same columns and all tokens, the first-order
  change of the loss when the unit is removed (Molchanov et al. 2019).
- ``magnitude``: the L1 norm of the unit's rows in q, k, v or gate, up (MultiPruner, Munoz et al.
  2025). It takes no data, and it removes channels of massive activations.

Shapes: `N` rows, `L` tokens a row, `U` units of a half, `O` out features, `I` in features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from elastune.data import row_batches
from elastune.decoding import evaluating
from elastune.errors import BadData, BadRecipe, nearest
from elastune.heads import Head
from elastune.importance.base import Scores
from elastune.linears import is_linear, weight_of
from elastune.losses import head_loss
from elastune.models.blocks import PARTS, Block, Part, blocks
from elastune.models.families import architecture

logger = logging.getLogger("elastune")

StructureMethod = Literal["wanda", "taylor", "magnitude"]
STRUCTURE_METHODS: tuple[StructureMethod, ...] = ("wanda", "taylor", "magnitude")

UnitScores = dict[str, Tensor]
"""``layers.<block>.heads`` or ``layers.<block>.ffn`` -> float32 ``(U,)``; large = keep."""

Batches = Tensor | Iterable[Mapping[str, Any]]
"""Token ids ``(N, L)``, or batches as a head or the model itself takes them."""

Hook = Callable[[nn.Module, tuple[Any, ...]], Any]

_END_ROLES = ("o", "down")


def structure_scores(
    model: PreTrainedModel,
    inputs: Batches | None = None,
    method: StructureMethod = "wanda",
    *,
    head: Head | None = None,
    tokens_per_batch: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> UnitScores:
    """Score every head unit and every feed-forward channel of a model.

    The model is not changed. Activations of one batch are alive at a time; with ``taylor`` those of
    a training step with frozen weights.

    Args:
        model: of a known architecture, not yet elastic, or all of it active.
        inputs: token ids ``(N, L)`` without padding, or batches: as ``head.collate`` makes them
            where a head is given, else the keyword arguments of the model's forward (``taylor``:
            with labels). Positions that an ``attention_mask`` leaves out do not count. Magnitude
            reads none.
        method: one of `STRUCTURE_METHODS`.
        head: makes the loss of the batches.
        tokens_per_batch: of token ids, in one forward pass.
        progress: called with the number of batches done.

    Returns:
        Dim-like names -> float32 ``(U,)`` on the CPU. ``taylor`` is in nats per target where the
        targets can be counted (token ids, or a head), else in units of the summed loss.

    Raises:
        BadRecipe: unknown method.
        BadData: inputs are missing, empty, or have no loss that ``taylor`` could follow.
        UnsupportedModel: unknown family.
    """
    if method not in STRUCTURE_METHODS:
        known = ", ".join(STRUCTURE_METHODS)
        raise BadRecipe(
            f"unknown importance {method!r}{nearest(method, STRUCTURE_METHODS)}; known are {known}"
        )
    if method == "magnitude":
        logger.warning(
            "magnitude removes the few channels of massive activations first, which can destroy a "
            "language model; wanda and taylor look at the activations"
        )
        return _magnitude(model)
    if inputs is None:
        raise BadData(f"{method} needs calibration data", try_="give token ids, or use magnitude")
    passes = _Passes(model, inputs, head, tokens_per_batch, progress)
    return _wanda(model, passes) if method == "wanda" else _taylor(model, passes)


def units_from_weights(model: PreTrainedModel, scores: Scores) -> UnitScores:
    """Sum scores of single weights over the rows and columns that each unit consists of.

    Args:
        model: that the weights belong to.
        scores: name of a weight -> ``(O, I)``, of any criterion. Weights without a score count
            nothing; halves without any score are left out of the result.

    Raises:
        BadData: a name that is no weight of a block's projections, or another shape.
    """
    found: UnitScores = {}
    used: set[str] = set()
    known = []
    for block in blocks(model):
        for part in PARTS:
            total = torch.zeros(block.n_units(part))
            n_used = len(used)
            for path, dim, table in unit_indices(block, part):
                name = f"{block.name}.{path}.weight"
                module = block.module.get_submodule(path)
                known.append(name)
                if name not in scores or not is_linear(module):
                    continue
                used.add(name)
                given, wanted = tuple(scores[name].shape), tuple(weight_of(module).shape)
                if given != wanted:
                    raise BadData(f"the scores of {name} are {given}, the weight is {wanted}")
                sums = scores[name].detach().float().cpu().sum(dim=1 - dim)
                total += sums[table].sum(dim=1)
            if len(used) > n_used:
                found[f"layers.{block.index}.{part}"] = total
    unknown = [name for name in scores if name not in used]
    if unknown:
        raise BadData(
            f"{unknown[0]!r} is no weight of the model's attention or feed-forward"
            f"{nearest(unknown[0], known)}"
        )
    return found


def unit_indices(block: Block, part: Part) -> Iterator[tuple[str, Literal[0, 1], Tensor]]:
    """Yield path, dim and an index ``(U, k)``: the k rows (columns) of each unit in a module.

    Rows that all units share, such as the one key of multi-query attention, stand in each.
    """
    n = block.n_units(part)
    if part == "ffn":  # too many to ask for one by one; fused gate and up lie one after the other
        for path, dim, index in block.weights_of(part, torch.arange(n)):
            yield path, dim, index.view(-1, n).T
        return
    of_unit = [list(block.weights_of(part, torch.tensor([unit]))) for unit in range(n)]
    for same in zip(*of_unit, strict=True):
        yield same[0].path, same[0].dim, torch.stack([weights.index for weights in same])


@torch.no_grad()
def _magnitude(model: PreTrainedModel) -> UnitScores:
    found = {}
    for block in blocks(model):
        for part in PARTS:
            total = torch.zeros(block.n_units(part))
            for path, dim, table in unit_indices(block, part):
                module = block.module.get_submodule(path)
                if dim == 0 and is_linear(module):
                    norms = weight_of(module).float().abs().sum(dim=1).cpu()
                    total += norms[table].sum(dim=1)
            found[f"layers.{block.index}.{part}"] = total
    return found


@torch.no_grad()
def _wanda(model: PreTrainedModel, passes: _Passes) -> UnitScores:
    ends = list(_ends(model))
    squares: dict[str, Tensor] = {}

    def observer(name: str) -> Hook:
        def observe(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = passes.counted(args[0].reshape(-1, args[0].shape[-1]))
            new = torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square_()
            squares[name] = squares[name].add_(new) if name in squares else new

        return observe

    with ExitStack() as stack:
        for name, module, _ in ends:
            stack.callback(module.register_forward_pre_hook(observer(name)).remove)
        for batch in passes:
            passes.forward(batch)
    found = {}
    for name, module, table in ends:
        columns = torch.linalg.vector_norm(weight_of(module), dim=0, dtype=torch.float32)
        products = (columns.square() * squares[name]).cpu()
        found[name] = products[table].sum(dim=1).sqrt()
    return found


def _taylor(model: PreTrainedModel, passes: _Passes) -> UnitScores:
    ends = list(_ends(model))
    # dL/dg of a gate g = 1 on each column is the sum of x dL/dx over the tokens.
    gates = {
        name: torch.ones(table.numel(), device=weight_of(module).device, requires_grad=True)
        for name, module, table in ends
    }

    def gate(name: str) -> Hook:
        def multiply(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return ((args[0] * gates[name]).to(args[0].dtype), *args[1:])

        return multiply

    n_targets = 0
    with _frozen(model), torch.enable_grad(), ExitStack() as stack:
        for name, module, _ in ends:
            stack.callback(module.register_forward_pre_hook(gate(name)).remove)
        for batch in passes:
            loss, targets = passes.loss(batch)
            loss.backward()
            n_targets += targets
    found = {}
    for name, _, table in ends:
        gradient = gates[name].grad
        if gradient is None:
            raise BadData(f"the loss does not depend on {name}")
        found[name] = (gradient.cpu() / max(n_targets, 1))[table].sum(dim=1).abs()
    return found


def _ends(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield each half's name, the projection that ends it, and the units' columns ``(U, k)``."""
    for block in blocks(model):
        for part in PARTS:
            ends = [block.record.roles[role] for role in _END_ROLES]
            path, table = next((p, t) for p, _, t in unit_indices(block, part) if p in ends)
            yield f"layers.{block.index}.{part}", block.module.get_submodule(path), table


class _Passes:
    """The batches, and how the model is run on one; iterating has the model in evaluation mode."""

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Batches,
        head: Head | None,
        tokens_per_batch: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.head = head
        self.tokens_per_batch = tokens_per_batch
        self.progress = progress
        self._counted: Tensor | None = None
        record = architecture(model)
        self._options = {"use_cache": False} if record.kind == "decoder" else {}
        self._plain_head = record.plain_head
        self._is_decoder = record.kind == "decoder"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        done = 0
        with evaluating(self.model), ExitStack() as stack:
            if self.head is not None:
                stack.enter_context(self.head.training(self.model))
            for batch in self._batches():
                mask = batch.get("attention_mask")
                self._counted = None if mask is None else mask.flatten().bool()
                yield batch
                done += 1
                if self.progress is not None:
                    self.progress(done)
        if not done:
            raise BadData("there are no calibration batches")

    def counted(self, x: Tensor) -> Tensor:
        """Return the positions ``(tokens, I)`` of the current batch that are no padding."""
        is_alike = self._counted is not None and len(self._counted) == len(x)
        return x[self._counted] if is_alike else x

    def forward(self, batch: dict[str, Any]) -> None:
        """Run the model, head or not."""
        if isinstance(self.inputs, Tensor):
            self.model.base_model(**batch, **self._options)
        elif self.head is not None:
            self.head.outputs(self.model, batch)
        else:
            self.model(**batch, **self._options)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Return the summed loss of a batch and its targets; 0 where they are not known."""
        if isinstance(self.inputs, Tensor):
            return self._next_token_loss(batch["input_ids"])
        if self.head is not None:
            return self.head.loss(self.model, batch), int(self.head.n_targets(batch))
        loss = getattr(self.model(**batch, **self._options), "loss", None)
        if loss is None:
            raise BadData(
                "taylor follows a loss, and the model gave none for these batches",
                try_="batches with labels, or the task's head; wanda needs neither",
            )
        return loss, 0

    def _batches(self) -> Iterator[dict[str, Any]]:
        if isinstance(self.inputs, Tensor):
            if self.inputs.dim() != 2:
                raise BadData(f"token ids are (rows, tokens), got {tuple(self.inputs.shape)}")
            for rows in row_batches(self.inputs, self.tokens_per_batch):
                yield {"input_ids": rows.to(self.model.device)}
            return
        for batch in self.inputs:
            yield {
                k: v.to(self.model.device) if isinstance(v, Tensor) else v for k, v in batch.items()
            }

    def _next_token_loss(self, ids: Tensor) -> tuple[Tensor, int]:
        embeddings = self.model.get_output_embeddings() if self._is_decoder else None
        if embeddings is None:
            raise BadData(
                f"taylor follows a loss, and token ids alone give none for a "
                f"{type(self.model).__name__}",
                try_="batches of a task and its head; wanda takes token ids",
            )
        labels = ids[:, 1:].flatten()
        if self._plain_head:
            hidden = self.model.base_model(input_ids=ids, use_cache=False)[0][:, :-1]
            hidden = hidden.reshape(-1, hidden.shape[-1])
            bias = getattr(embeddings, "bias", None)
            return head_loss(hidden, embeddings.weight, bias, labels), len(labels)  # type: ignore[arg-type]
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return cross_entropy(logits.flatten(0, 1), labels, reduction="sum"), len(labels)


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Ask for no gradient of the model's own weights as long as the context lasts."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
