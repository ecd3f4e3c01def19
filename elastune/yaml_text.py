"""YAML whose numbers are those of YAML 1.2: ``3e-4`` is a number, ``2:4`` is text."""

from __future__ import annotations

import re
from typing import Any

import yaml

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
_MOST_VALUES = 10**6
_FLOAT = re.compile(
    r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.1 but for the numbers; in 1.1, 3e-4 is text and 2:4 is the number 124."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in pairs if tag not in _NUMBERS]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes text that a reader of either version would take for a number."""


for _kind in (_Loader, _Dumper):
    for _tag, _pattern in zip(_NUMBERS, (_INT, _FLOAT), strict=True):
        _kind.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """Return the value of YAML text.

    Raises:
        yaml.YAMLError: it is not YAML, or stands for more than a million values by its aliases.
    """
    try:
        value = yaml.load(text, _Loader)  # a SafeLoader: plain data only
        _refuse_bombs(value)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        # What PyYAML's constructors raise for a date of month 13, `!!timestamp x`, and the like.
        raise yaml.YAMLError(f"a value that is none of its kind: {error}") from error
    return value


def _refuse_bombs(value: Any) -> None:
    """Raise for values that would be endless, or immense, were every alias written out."""
    sizes: dict[int, int] = {}
    above: set[int] = set()

    def size(node: Any) -> int:
        if not isinstance(node, dict | list | set | tuple):
            if isinstance(node, str):
                node.encode("utf-8")  # half a character, which no file can hold, is a ValueError
            return 1
        if id(node) in above:
            raise yaml.YAMLError("an alias stands within what it names")
        if id(node) not in sizes:
            above.add(id(node))
            inner = [*node, *node.values()] if isinstance(node, dict) else node
            sizes[id(node)] = 1 + sum(map(size, inner))
            above.remove(id(node))
        return sizes[id(node)]

    if size(value) > _MOST_VALUES:
        raise yaml.YAMLError(f"its aliases make more than {_MOST_VALUES:,} values of it")


def dump_yaml(data: Any) -> str:
    """Return plain data as YAML, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
