"""The config of a model whose blocks differ in size, whatever its family.

This file imports nothing of elastune: exported models carry a copy of it.
"""

from __future__ import annotations

import copy
from typing import Any

#: Halves of a block that a layer can leave out: the words allowed in ``"skip"``.
HALVES = ("attention", "mlp")


class PerLayerConfig:
    """Mixed into a stock config class, it accepts sizes of single layers that the class would not.

    ``per_layer_config`` (transformers 5.15 or later) maps the number of a layer to the sizes that
    are not those of the whole config, and to ``"skip"``: the halves that the layer does not have.
    ``embedding_rank`` is the rank of the word embedding, where that is factorised.
    """

    def __post_init__(self, **options: Any) -> None:
        super().__post_init__(**options)  # type: ignore[misc]
        self.validate()

    def uniform(self) -> Any:
        """Return a copy of the stock class, all layers alike: of the sizes of the whole config."""
        config: Any = copy.deepcopy(self)
        config.per_layer_config = None
        vars(config).pop("embedding_rank", None)
        stock = config.__class__ = type(self).__bases__[-1]
        # What the stock class says or computes itself is not kept.
        dropped = {"auto_map", "model_type"}
        dropped |= {n for n in vars(config) if isinstance(getattr(stock, n, None), property)}
        for name in dropped:
            vars(config).pop(name, None)
        return config

    def validate(self) -> None:
        """Hold the rules of the stock class against the whole config, not against single layers.

        Heads of one layer need not divide the hidden size, for example, for their own size is set.
        """
        config: Any = self
        if not config.is_heterogeneous:
            super().validate()  # type: ignore[misc]
            return
        for number, layer in enumerate(config.per_layer_config):
            unknown = [half for half in layer.skip if half not in HALVES]
            if unknown:
                raise ValueError(f"layer {number} skips {unknown}; known are {list(HALVES)}")
        self.uniform().validate()
