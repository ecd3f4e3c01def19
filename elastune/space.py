"""What can be chosen and what was chosen: `ElasticDim`, `SearchSpace`, `SubnetConfig`. No torch.

A sub-network has one spelling everywhere: a `SubnetConfig`, an immutable mapping from the name of
each dim to one of its choices.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from elastune.errors import InvalidSpace, InvalidSubnet, nearest
from elastune.json_text import parse_json

DimKind = Literal["rank", "heads", "ffn", "depth", "embedding", "density"]
"""What a dim cuts: an adapter's rank, a block's query heads, the channels of its feed-forward,
the whole block (1 keeps it, 0 leaves it out), the rank of the word embedding (its width is the
table as it is), or the percentage of weights that are not zero. 0 heads or channels leave that half
out."""


class SubnetConfig(Mapping[str, int]):
    """An immutable, hashable choice for every dim of a space.

    >>> config = SubnetConfig({"layers.0.qkv": 16, "layers.0.down": 32})
    >>> config["layers.0.qkv"]
    16
    >>> SubnetConfig.from_json(config.to_json()) == config
    True

    Raises:
        InvalidSubnet: a choice that is not a whole number.
    """

    __slots__ = ("_choices", "_hash")

    def __init__(self, choices: Mapping[str, int]) -> None:
        self._choices = {name: _whole(name, choice) for name, choice in choices.items()}
        self._hash = hash(frozenset(self._choices.items()))

    def __getitem__(self, name: str) -> int:
        return self._choices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SubnetConfig) and self._choices == other._choices

    def __repr__(self) -> str:
        return f"SubnetConfig({self.short()})"

    def short(self) -> str:
        """Return how often each choice occurs, such as ``"32x10 24x30 16x50"``."""
        counts: dict[int, int] = {}
        for choice in self._choices.values():
            counts[choice] = counts.get(choice, 0) + 1
        return " ".join(f"{choice}x{counts[choice]}" for choice in sorted(counts, reverse=True))

    def to_json(self) -> str:
        """Return one line of JSON, dims in their order."""
        return json.dumps(self._choices)

    @classmethod
    def from_json(cls, text: str) -> SubnetConfig:
        """Read what `to_json` wrote.

        Raises:
            InvalidSubnet: not a JSON object of whole numbers.
        """
        try:
            choices = parse_json(text)
        except ValueError as error:
            raise InvalidSubnet(
                f"a sub-network is a JSON object, got {text[:80]!r}",
                try_='dim -> choice, such as {"layers.0.ffn": 512}',
            ) from error
        if not isinstance(choices, dict):
            raise InvalidSubnet(f"a sub-network maps dim names to whole numbers, got {text[:80]!r}")
        return cls(choices)


def _whole(name: str, choice: Any) -> int:
    """Return the choice as a plain int; numpy's integers are welcome, 16.7 and True are not."""
    if isinstance(choice, bool) or not hasattr(choice, "__index__"):
        raise InvalidSubnet(f"{name}: a choice must be a whole number, got {choice!r}")
    return operator.index(choice)


@dataclass(frozen=True)
class ElasticDim:
    """One decision: which of ``choices`` the ``modules`` that share it use.

    Args:
        name: unique in its space, such as ``"layers.3.qkv"``.
        kind: what is cut.
        choices: distinct, largest first.
        modules: full names of the modules in the model.
    """

    name: str
    kind: DimKind
    choices: tuple[int, ...]
    modules: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.choices or list(self.choices) != sorted(set(self.choices), reverse=True):
            raise InvalidSpace(
                f"{self.name}: choices must be distinct and largest first, got {self.choices}"
            )
        if self.kind not in get_args(DimKind):
            known = ", ".join(get_args(DimKind))
            raise InvalidSpace(f"{self.name}: unknown kind {self.kind!r}; known are {known}")
        if self.choices[-1] < 0:
            raise InvalidSpace(f"{self.name}: choices cannot be negative, got {self.choices}")
        if not self.modules:
            raise InvalidSpace(
                f"{self.name}: no module shares this dim",
                try_="the names of the modules that it cuts",
            )

    @property
    def middle(self) -> int:
        """The heuristic choice: index floor(n/2) of the descending list (Shears, section 3.3)."""
        # The reference code uses floor((n-1)/2), which gives the *largest* of two choices.
        return self.choices[len(self.choices) // 2]


class SearchSpace:
    """An ordered set of dims, and the configurations they span.

    >>> dim = ElasticDim("layers.0.qkv", "rank", (32, 24, 16), ("model.layers.0.self_attn.q_proj",))
    >>> space = SearchSpace([dim])
    >>> space.heuristic()["layers.0.qkv"], space.size
    (24, 3)
    """

    def __init__(self, dims: Sequence[ElasticDim]) -> None:
        self.dims = tuple(dims)
        names = [dim.name for dim in self.dims]
        if not names:
            raise InvalidSpace("a search space needs at least one dim")
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise InvalidSpace(f"dim names must be unique, these are not: {', '.join(twice)}")

    def __len__(self) -> int:
        return len(self.dims)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SearchSpace) and self.dims == other.dims

    def __hash__(self) -> int:
        return hash(self.dims)

    def __add__(self, other: SearchSpace) -> SearchSpace:
        """Return the space of both's dims, such as ranks and widths together."""
        return SearchSpace([*self.dims, *other.dims])

    def __repr__(self) -> str:
        return f"SearchSpace({len(self.dims)} dims, 10^{math.log10(self.size):.1f} sub-networks)"

    def __contains__(self, config: object) -> bool:
        return (
            isinstance(config, SubnetConfig)
            and len(config) == len(self.dims)
            and all(config.get(dim.name) in dim.choices for dim in self.dims)
        )

    @cached_property
    def size(self) -> int:
        """The number of configurations."""
        return math.prod(len(dim.choices) for dim in self.dims)

    def largest(self) -> SubnetConfig:
        """Return every dim at its first choice."""
        return SubnetConfig({dim.name: dim.choices[0] for dim in self.dims})

    def smallest(self) -> SubnetConfig:
        """Return every dim at its last choice."""
        return SubnetConfig({dim.name: dim.choices[-1] for dim in self.dims})

    def heuristic(self) -> SubnetConfig:
        """Return every dim at its middle choice: no search at all (Shears, LoNAS)."""
        return SubnetConfig({dim.name: dim.middle for dim in self.dims})

    def sample(self, rng: np.random.Generator) -> SubnetConfig:
        """Draw every dim's choice uniformly and independently."""
        return self.decode([int(rng.integers(len(dim.choices))) for dim in self.dims])

    def neighbours(self, config: SubnetConfig) -> list[SubnetConfig]:
        """Return the configurations that differ by one step of one dim."""
        indices = self.encode(config)
        found = []
        for position, dim in enumerate(self.dims):
            for index in (indices[position] - 1, indices[position] + 1):
                if 0 <= index < len(dim.choices):
                    changed = [*indices[:position], index, *indices[position + 1 :]]
                    found.append(self.decode(changed))
        return found

    def encode(self, config: SubnetConfig) -> tuple[int, ...]:
        """Return the index of each dim's choice, in the order of the dims.

        Raises:
            InvalidSubnet: the configuration is not in this space.
        """
        self.check(config)
        return tuple(dim.choices.index(config[dim.name]) for dim in self.dims)

    def decode(self, indices: Sequence[int]) -> SubnetConfig:
        """Return the configuration whose dims take the choices at ``indices``."""
        if len(indices) != len(self.dims):
            raise InvalidSubnet(
                f"{len(indices)} indices given for {len(self.dims)} dims",
                try_="one index for every dim, in the order of the space",
            )
        for dim, index in zip(self.dims, indices, strict=True):
            if not 0 <= index < len(dim.choices):
                raise InvalidSubnet(f"{dim.name}: index {index} of {len(dim.choices)} choices")
        return SubnetConfig(
            {dim.name: dim.choices[i] for dim, i in zip(self.dims, indices, strict=True)}
        )

    def check(self, config: SubnetConfig) -> None:
        """Raise an error that names every dim that is missing, unknown or out of its choices.

        Raises:
            InvalidSubnet: with all mismatches at once.
        """
        if config in self:
            return
        known = {dim.name: dim for dim in self.dims}
        wrong = [f"unknown dim {n!r}{nearest(n, known)}" for n in config if n not in known]
        wrong += [f"missing dim {name!r}" for name in known if name not in config]
        for name, dim in known.items():
            if name in config and config[name] not in dim.choices:
                close = min(dim.choices, key=lambda choice: abs(choice - config[name]))
                wrong.append(
                    f"{dim.kind} {config[name]} is not a choice of {name} {dim.choices}; "
                    f"nearest is {close}"
                )
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InvalidSubnet("; ".join(wrong[:5]) + more)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for ``space.json``."""
        return {
            "schema": 1,
            "dims": [
                {
                    "name": dim.name,
                    "kind": dim.kind,
                    "choices": list(dim.choices),
                    "modules": list(dim.modules),
                }
                for dim in self.dims
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchSpace:
        """Build a space from what `to_dict` returned.

        Raises:
            InvalidSpace: a field is missing or of the wrong type.
        """
        try:
            return cls([_dim_from_dict(row) for row in data["dims"]])
        except (KeyError, TypeError, InvalidSubnet) as error:
            raise InvalidSpace(
                f"not a search space: {error!r}",
                try_="RUN/space.json, or the dict that SearchSpace.to_dict gives",
            ) from error


def _dim_from_dict(row: Mapping[str, Any]) -> ElasticDim:
    """Build a dim from one row of `SearchSpace.to_dict`."""
    name, choices, modules = row["name"], row["choices"], row["modules"]
    if not isinstance(choices, list) or not isinstance(modules, list):
        raise TypeError(f"choices and modules of {name} must be lists")
    return ElasticDim(
        str(name),
        row["kind"],
        tuple(_whole(name, choice) for choice in choices),
        tuple(str(module) for module in modules),
    )
