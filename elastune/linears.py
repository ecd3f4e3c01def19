"""Linear layers in either spelling: `nn.Linear`, and transformers' `Conv1D` with its weight turned.

Shapes: `O` out features, `I` in features.
"""

from __future__ import annotations

from torch import Tensor, nn

from elastune.errors import UnsupportedModel


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer of any kind, quantised ones too."""
    return hasattr(module, "in_features") or hasattr(module, "nx")


def in_features(module: nn.Module) -> int:
    """Return the in features of a linear layer; `Conv1D` calls them nx.

    Raises:
        UnsupportedModel: not a linear layer.
    """
    return _feature(module, "in_features", "nx")


def out_features(module: nn.Module) -> int:
    """Return the out features of a linear layer; `Conv1D` calls them nf.

    Raises:
        UnsupportedModel: not a linear layer.
    """
    return _feature(module, "out_features", "nf")


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a layer keeps its weight as ``(I, O)``, as `Conv1D` does."""
    return hasattr(module, "nx")


def weight_of(module: nn.Module) -> Tensor:
    """Return a linear layer's weight as ``(O, I)``; writing to it writes to the layer."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if is_transposed(module) else weight


def _feature(module: nn.Module, *names: str) -> int:
    for name in names:
        if hasattr(module, name):
            return int(getattr(module, name))
    raise UnsupportedModel(f"a {type(module).__name__} is not a linear layer")
