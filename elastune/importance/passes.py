"""The passes over calibration batches that criteria look at: forward, or with a loss.

Shapes: `N` rows, `L` tokens a row, `I` in features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from elastune.data import row_batches
from elastune.decoding import evaluating
from elastune.errors import BadData
from elastune.heads import Head
from elastune.losses import head_loss
from elastune.models.families import architecture

Batches = Tensor | Iterable[Mapping[str, Any]]
"""Token ids ``(N, L)``, or batches as a head or the model itself takes them."""


class Passes:
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
            raise BadData(
                "there are no calibration batches", try_="at least one batch of token ids"
            )

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
                raise BadData(
                    f"token ids are (rows, tokens), got {tuple(self.inputs.shape)}",
                    try_="a tensor of two dimensions: rows.reshape(-1, length)",
                )
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
def gradients_of(model: PreTrainedModel, wanted: Collection[Tensor]) -> Iterator[None]:
    """Ask for the gradients of ``wanted`` alone; afterwards flags and gradients are as before."""
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    gradients = [(tensor, tensor.grad) for tensor in wanted]
    chosen = {id(tensor) for tensor in wanted}
    for parameter, _ in asked:
        parameter.requires_grad_(id(parameter) in chosen)
    for tensor, _ in gradients:
        tensor.grad = None
    try:
        yield
    finally:
        for parameter, flag in asked:
            parameter.requires_grad_(flag)
        for tensor, gradient in gradients:
            tensor.grad = gradient
