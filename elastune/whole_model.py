"""A model all of whose weights are trained: what plain fine-tuning trains."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from elastune.space import SubnetConfig
from elastune.state import copy_state


class WholeModel:
    """Stands in training where a `SuperNetwork` would, with nothing to choose.

    Args:
        model: changed in place; every weight is trained, tied ones once.
    """

    space = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        model.requires_grad_(True)

    def activate(self, config: SubnetConfig) -> None:
        """Do nothing: there is one network."""

    def trained_state(self) -> dict[str, Tensor]:
        """Return every parameter by name, tied ones once."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Copy in what `trained_state` returned.

        Raises:
            BadArtifact: names or shapes differ; nothing is copied.
        """
        copy_state(state, self.trained_state(), "this model")
