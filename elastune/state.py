"""Copy named tensors into a network, all or none."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from elastune.errors import BadArtifact


def copy_state(given: Mapping[str, Tensor], mine: Mapping[str, Tensor], owner: str) -> None:
    """Copy tensors into those of the same name.

    Args:
        given: read from a file.
        mine: the network's own, written to.
        owner: what a message calls the network.

    Raises:
        BadArtifact: names or shapes differ; names the first few, nothing is copied.
    """
    wrong = [f"missing {name}" for name in mine if name not in given]
    wrong += [f"unexpected {name}" for name in given if name not in mine]
    wrong += [
        f"{name} has shape {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in mine.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if wrong:
        raise BadArtifact(
            f"these weights are not of {owner}: {'; '.join(wrong[:4])}"
            + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        )
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(given[name])
