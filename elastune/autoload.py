"""Let transformers load exported models of non-uniform sizes wherever elastune is imported.

Nothing is imported for it: the types are announced to transformers once it is there, and the
classes are made when a model of such a type is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"

#: The families' model types, as in `elastune.models.families`, which is too slow to import here.
MODEL_TYPES = (
    *("llama", "mistral", "qwen2", "smollm3", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2"),
    *("granite", "gpt2", "gpt_neox", "opt", "bloom", "mpt", "falcon"),
    *("bert", "roberta", "electra", "deberta-v2", "distilbert", "vit"),
)


def announce_when_imported() -> None:
    """Announce the types now if transformers' auto classes are there, or else when they come."""
    if _AUTO_CONFIG in sys.modules:
        _announce(sys.modules[_AUTO_CONFIG])
    else:
        sys.meta_path.insert(0, _Finder())


def _announce(auto: ModuleType) -> None:
    for name in MODEL_TYPES:
        model_type = f"elastune_{name}"
        if model_type not in auto.CONFIG_MAPPING:
            auto.AutoConfig.register(model_type, _later(name, model_type))


def _later(stock_type: str, model_type: str) -> type:
    """Return what stands in for a config class until it is asked for a config."""

    def make() -> Any:
        registration = import_module("elastune.models.registration")
        return registration.register(stock_type)

    def new(cls: type, *args: Any, **options: Any) -> Any:
        return make()(*args, **options)

    def from_dict(cls: type, *args: Any, **options: Any) -> Any:
        return make().from_dict(*args, **options)

    content = {"model_type": model_type, "__new__": new, "from_dict": classmethod(from_dict)}
    return type("ConfigToCome", (), content | {"__module__": __name__})


class _Finder(MetaPathFinder):
    """Waits for one module, and is gone after it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Announcing(spec.loader)
        return spec


class _Announcing(Loader):
    """Loads a module as its own loader does, and announces the types to it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self._loader  # so that its source can be asked for
        self._loader.exec_module(module)
        _announce(module)
