"""The classes that load exported models of non-uniform sizes, made for one family at a time.

They are the stock classes with `PerLayerConfig` and `PerLayerModel` mixed in. A folder that they
save carries a modelling file that says the same without elastune.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from elastune.errors import UnsupportedModel
from elastune.files import write_text
from elastune.models.families import HETERO_PREFIX, record_for
from elastune.models.modeling_source import modeling_source
from elastune.models.per_layer_config import PerLayerConfig
from elastune.models.per_layer_model import Family, PerLayerModel

#: Auto classes whose stock classes get a counterpart, where a family has one.
AUTO_CLASSES = (
    *("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"),
    *("AutoModelForQuestionAnswering", "AutoModelForTokenClassification", "AutoModelForMaskedLM"),
    "AutoModelForImageClassification",
)

_STANDARD_FIELDS = {
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
}


@dataclass(frozen=True)
class FamilyClasses:
    """The classes of one family.

    Attributes:
        stock_type: the family's own model type.
        config: the config class.
        models: name of an auto class -> the model class.
        family: where the sizes are.
    """

    stock_type: str
    config: type[PreTrainedConfig]
    models: Mapping[str, type[PreTrainedModel]]
    family: Family

    @property
    def file_name(self) -> str:
        """Name of the modelling file that goes into folders."""
        return f"modeling_{HETERO_PREFIX}{self.stock_type.replace('-', '_')}.py"

    def auto_map(self) -> dict[str, str]:
        """Return what a config.json says to find the classes in the modelling file."""
        module = self.file_name.removesuffix(".py")
        classes = {"AutoConfig": self.config, **self.models}
        return {auto: f"{module}.{cls.__name__}" for auto, cls in classes.items()}

    def source(self) -> str:
        """Return the modelling file."""
        return modeling_source(self.config, list(self.models.values()), self.family)


class _Saved:
    """Adds the modelling file to what a model saves."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Save as the stock class does, and the modelling file beside the weights."""
        model: Any = self
        classes = family_classes(type(model.config).model_type.removeprefix(HETERO_PREFIX))
        model.config.auto_map = classes.auto_map()
        super().save_pretrained(save_directory, **options)  # type: ignore[misc]
        write_text(Path(save_directory) / classes.file_name, classes.source())


def register(stock_type: str) -> type[PreTrainedConfig]:
    """Make a family's classes known to transformers' auto classes; return the config class.

    Raises:
        UnsupportedModel: unknown family.
    """
    classes = family_classes(stock_type)
    AutoConfig.register(str(classes.config.model_type), classes.config, exist_ok=True)
    for auto, model in classes.models.items():
        getattr(transformers, auto).register(classes.config, model, exist_ok=True)
    return classes.config


@cache
def family_classes(stock_type: str) -> FamilyClasses:
    """Return the classes for models of ``stock_type`` whose blocks differ in size.

    Raises:
        UnsupportedModel: unknown family.
    """
    family = family_of(stock_type)
    stock_config = CONFIG_MAPPING[stock_type]
    config = _config_class(stock_type, stock_config)
    models = {}
    for auto in AUTO_CLASSES:
        mapping = getattr(transformers, auto)._model_mapping
        if stock_config in mapping:
            found = mapping[stock_config]
            stock = found[0] if isinstance(found, tuple) else found
            models[auto] = _model_class(stock, config, family)
    return FamilyClasses(stock_type, config, models, family)


def family_of(stock_type: str) -> Family:
    """Return where the models of a type keep what can differ in size.

    Raises:
        UnsupportedModel: unknown type, or one that is non-uniform already.
    """
    if stock_type.startswith(HETERO_PREFIX):
        raise UnsupportedModel(f"{stock_type!r} is not the model type of a stock class")
    record = record_for(stock_type)
    attention = record.attention
    return Family(
        blocks=record.blocks,
        roles=dict(record.roles),
        attention=attention.path,
        head_dim=attention.head_dim,
        sizes=dict(attention.sizes),
        followers=dict(attention.followers),
        adds_residual=attention.adds_residual,
        fields={k: record.config_names.get(k, name) for k, name in _STANDARD_FIELDS.items()},
    )


def _config_class(stock_type: str, stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    content: dict[str, Any] = {"model_type": f"{HETERO_PREFIX}{stock_type}", "__module__": __name__}
    if isinstance(getattr(stock, "head_dim", None), property):  # computed from the number of heads
        content["head_dim"] = None
    return type(f"Elastune{stock.__name__}", (PerLayerConfig, stock), content)


def _model_class(
    stock: type[PreTrainedModel], config: type[PreTrainedConfig], family: Family
) -> type[PreTrainedModel]:
    content = {"config_class": config, "family": family, "__module__": __name__}
    return type(f"Elastune{stock.__name__}", (_Saved, PerLayerModel, stock), content)
