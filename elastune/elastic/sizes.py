"""Fields of a module that must say how many heads it has.

This file imports nothing of elastune: exported models carry a copy of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class ConfigView:
    """A config with some fields of its own: of one layer, where a module reads its config."""

    def __init__(self, config: Any, values: Mapping[str, int]) -> None:
        self.__dict__.update(_config=config, **values)

    def __getattr__(self, name: str) -> Any:
        if "_config" not in self.__dict__:  # while being copied
            raise AttributeError(name)
        return getattr(self.__dict__["_config"], name)


def set_sizes(module: nn.Module, sizes: Mapping[str, int]) -> None:
    """Set fields of a module; those called ``config.x`` in a view of its config."""
    own = {name: value for name, value in sizes.items() if "." not in name}
    read = {name.partition(".")[2]: v for name, v in sizes.items() if "." in name}
    for name, value in own.items():
        setattr(module, name, value)
    if read:
        config: Any = module.config
        held: dict[str, Any] = {}
        if isinstance(config, ConfigView):
            held = dict(vars(config))
            config = held.pop("_config")
        module.config = ConfigView(config, held | read)  # type: ignore[assignment]
