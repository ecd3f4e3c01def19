"""Write the modelling file of an exported model: readable Python that needs no elastune."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Mapping, Sequence
from types import ModuleType

from transformers import PreTrainedConfig, PreTrainedModel

from elastune.elastic import absent, factorised, sizes
from elastune.models import per_layer_config, per_layer_model
from elastune.models.per_layer_model import Family
from elastune.version import __version__

_PARTS: tuple[ModuleType, ...] = (absent, factorised, sizes, per_layer_config, per_layer_model)

_HEADER = '''"""{stock} with blocks of different sizes, for transformers 5.15 or later.

Written by elastune {version}; it needs transformers and torch alone. ``per_layer_config`` in
config.json says which sizes a layer has where they are not those of the whole config, and which
halves it skips; ``embedding_rank`` is the rank of a factorised word embedding. Load it with
``trust_remote_code=True``.
"""

from __future__ import annotations

'''


def modeling_source(
    config: type[PreTrainedConfig], models: Sequence[type[PreTrainedModel]], family: Family
) -> str:
    """Return the source of a file that defines ``config`` and ``models`` on stock classes.

    The classes are those of `elastune.models.registration`: the same code, copied.
    """
    stock_config = _stock(config)
    stock_models = [_stock(model) for model in models]
    imports, bodies = set(), []
    for part in _PARTS:
        found, body = _split(part)
        imports |= found
        bodies.append(body)
    names = ", ".join(sorted(cls.__name__ for cls in [stock_config, *stock_models]))
    imports.add(f"from transformers import {names}")
    text = _HEADER.format(stock=stock_config.__name__.removesuffix("Config"), version=__version__)
    text += _ordered(imports) + "\n\n" + "\n\n\n".join(bodies)
    text += f"\n\n\nFAMILY = {_literal(family)}\n\n\n"
    text += _config_text(config, stock_config)
    for model, stock in zip(models, stock_models, strict=True):
        text += _model_text(model, stock, config)
    return text


def _stock(cls: type) -> type:
    """Return the class of transformers that one of ours is made of."""
    return cls.__bases__[-1]


def _split(module: ModuleType) -> tuple[set[str], str]:
    """Return a module's imports, elastune's own left out, and what comes after them."""
    source = inspect.getsource(module)
    tree = ast.parse(source)
    imports: set[str] = set()
    last = tree.body[0].end_lineno or 0  # the docstring
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            last = node.end_lineno or 0
            name = getattr(node, "module", None)
            if name != "__future__" and not str(name).startswith("elastune"):
                imports.add(ast.unparse(node))
    return imports, "\n".join(source.splitlines()[last:]).strip()


def _ordered(imports: set[str]) -> str:
    """Return import lines, the standard library's first, one line for each module."""
    by_module: dict[str, set[str]] = {}
    for line in imports:
        if line.startswith("from "):
            module, _, names = line.removeprefix("from ").partition(" import ")
            by_module.setdefault(module, set()).update(names.split(", "))
    lines = [line for line in imports if line.startswith("import ")]
    lines += [
        f"from {module} import ({', '.join(sorted(names))})"
        if len(names) > 4
        else f"from {module} import {', '.join(sorted(names))}"
        for module, names in by_module.items()
    ]
    third_party = ("torch", "transformers")

    def is_ours(line: str) -> bool:
        return line.split()[1].split(".")[0] in third_party

    own = sorted(line for line in lines if not is_ours(line))
    return "\n".join([*own, "", *sorted(line for line in lines if is_ours(line))]) + "\n"


def _literal(family: Family) -> str:
    lines = []
    for name, value in vars(family).items():
        if isinstance(value, Mapping) and value:
            lines.append(f"    {name}={{")
            lines += [f"        {_quoted(k)}: {_quoted(v)}," for k, v in value.items()]
            lines.append("    },")
        else:
            lines.append(f"    {name}={_quoted(value)},")
    return "\n".join(["Family(", *lines, ")"])


def _quoted(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _config_text(config: type[PreTrainedConfig], stock: type) -> str:
    return (
        f"class {config.__name__}(PerLayerConfig, {stock.__name__}):\n"
        f'    """Sizes of the whole model, and of single layers in ``per_layer_config``."""\n\n'
        f'    model_type = "{config.model_type}"\n'
        + ("    head_dim = None\n" if "head_dim" in vars(config) else "")
    )


def _model_text(model: type[PreTrainedModel], stock: type, config: type[PreTrainedConfig]) -> str:
    return (
        f"\n\nclass {model.__name__}(PerLayerModel, {stock.__name__}):\n"
        f'    """{stock.__name__} with layers of different sizes."""\n\n'
        f"    config_class = {config.__name__}\n    family = FAMILY\n"
    )
