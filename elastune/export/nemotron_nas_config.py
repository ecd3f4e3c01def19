"""The config of a nemotron-nas checkpoint: a Llama whose blocks have sizes of their own.

This file imports transformers alone: exported folders carry a copy of it as
``configuration_decilm.py``. Readers ask for ``config.block_configs[i].attention.no_op`` and so on,
and for some names only whether they are there.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Sizes(dict):  # type: ignore[type-arg]
    """A dictionary whose keys are attributes, too; it is saved as JSON."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """Llama's config with ``block_configs``: of each block its ``attention`` and its ``ffn``."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self.block_configs = [
            Sizes({half: Sizes(sizes) for half, sizes in block.items()})
            for block in block_configs or ()
        ]
