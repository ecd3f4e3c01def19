"""Limits as text: ``latency<=60%``, ``params<=0.9B``, ``score>=dense-1.0``.

    limit   = name ("<=" | ">=") bound
    bound   = number [unit]             1.5M (counts), 12 ms, 900 MiB
            | number ("%" | "x")        a part of what the dense model has
            | system [("+" | "-") number]     what another system has, for scores with a distance

Several limits are separated by commas or "and". Distances of scores are in points: 1.0 is one
hundredth of a score between 0 and 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from elastune.errors import BadRecipe, nearest

Range = tuple[float, float]
"""The least and the most that a value may be; infinite where it is not limited."""

REFERENCE = "dense"
"""The system that ``%`` and ``x`` are parts of: the full model."""
POINT = 0.01
"""One point of a score that is a share."""

_COUNTS = {"k": 3, "m": 6, "g": 9, "b": 9, "t": 12}
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_TIMES = {"us": "0.001", "ms": "1", "s": "1000"}


@dataclass(frozen=True)
class _Kind:
    """What numbers of a name may look like."""

    what: str
    units: Mapping[str, Decimal]
    unit: str = ""
    """The one that a number has by itself."""
    distances: bool = False
    """Whether a bound may be a system plus or minus a number."""


_COUNT = _Kind("a count", {unit: Decimal(10) ** power for unit, power in _COUNTS.items()})
_TIME = _Kind("a time", {unit: Decimal(factor) for unit, factor in _TIMES.items()}, "ms")
_MEMORY = _Kind("memory", {u: Decimal(n) / 2**20 for u, n in _BYTES.items()}, "MiB")
_SIZE = _Kind("a size", {u: Decimal(n) for u, n in _BYTES.items()}, "B")
_QUALITY = _Kind("a quality", {}, distances=True)

_NAMES: Mapping[str, tuple[str, _Kind]] = {
    "latency": ("latency_ms", _TIME),
    "decode_latency": ("decode_latency_ms", _TIME),
    "memory": ("memory_mb", _MEMORY),
    "size": ("size", _SIZE),
    "params": ("params", _COUNT),
    "nonzero": ("nonzero", _COUNT),
    "macs": ("macs", _COUNT),
    "block_macs": ("block_macs", _COUNT),
    "decode_macs": ("decode_macs", _COUNT),
    "score": ("score", _QUALITY),
    "loss": ("loss", _QUALITY),
    "error": ("error", _QUALITY),
}
_ALIASES = {
    "prefill_latency": "latency",
    "latency_ms": "latency",
    "decode_latency_ms": "decode_latency",
    "memory_mb": "memory",
    "peak_memory": "memory",
    "ram": "memory",
    "disk": "size",
    "bytes": "size",
    "parameters": "params",
    "nonzeros": "nonzero",
    "non_zero": "nonzero",
    "non_zeros": "nonzero",
    "accuracy": "score",
}
_SHORT = {value: short for short, (value, _) in _NAMES.items()}

_NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]{1,3})?"
_WHOLE = re.compile(r"([^<>=≤≥!~]*)([<>=≤≥!~]+)([^<>=≤≥!~]*)", re.DOTALL)
_BOUND = re.compile(rf"({_NUMBER})\s*([a-z%]*)", re.IGNORECASE)
_SYSTEM = re.compile(
    rf"([a-z]\w*(?:-[a-z]\w*)*)(?:\s*([+-])\s*({_NUMBER[5:]}))?", re.IGNORECASE | re.ASCII
)
_SIGNS = {"<=": "<=", "≤": "<=", ">=": ">=", "≥": ">="}


@dataclass(frozen=True)
class Limit:
    """One bound on one value.

    ``str()`` spells it such that `parse_limit` reads the same limit.

    Attributes:
        name: of the value, as trials and reports have it, such as ``latency_ms``.
        sign: which side is allowed.
        number: the bound in the value's own unit; a part of ``of``'s value; or, in points, how far
            the bound is from ``of``'s value.
        of: the system that the bound is relative to; None for an absolute bound.
        part: whether ``number`` is a part of ``of``'s value.
    """

    name: str
    sign: Literal["<=", ">="]
    number: float
    of: str | None = None
    part: bool = False

    def __str__(self) -> str:
        name = _SHORT[self.name]
        if self.part:
            return f"{name}{self.sign}{_plain(self.number)}x"
        if self.of is None:
            return f"{name}{self.sign}{_plain(self.number)}{_NAMES[name][1].unit}"
        distance = f"{'-' if self.number < 0 else '+'}{_plain(abs(self.number))}"
        return f"{name}{self.sign}{self.of}{distance if self.number else ''}"

    def bound(
        self, references: Mapping[str, Mapping[str, float]] | None = None, *, point: float = POINT
    ) -> float:
        """Return the bound in the value's own unit.

        Args:
            references: system -> name of a value -> what it has.
            point: what one point of a score is; 1 for perplexity and other scores that are no
                share. Distances of losses and errors are always plain.

        Raises:
            BadRecipe: the system is not there, or has no such value.
        """
        if self.of is None:
            return self.number
        value = self._reference(references or {})
        if self.part:
            return self.number * value
        return value + self.number * (point if self.name == "score" else 1.0)

    def _reference(self, references: Mapping[str, Mapping[str, float]]) -> float:
        if self.of is None or self.of not in references:
            raise BadRecipe(
                f"{self}: nothing is known of {self.of!r}{nearest(str(self.of), references)}; "
                f"known are {', '.join(references) or 'no systems'}",
                try_=f"a number without %: {_SHORT[self.name]}{self.sign}..."
                if self.part
                else None,
            )
        values = references[self.of]
        value = values.get(self.name)
        if value is None or not math.isfinite(value):
            raise BadRecipe(
                f"{self}: {self.of} has no {_SHORT[self.name]}{nearest(self.name, values)}; "
                f"it has {', '.join(values) or 'no values'}"
            )
        return value


def parse_limit(text: str) -> Limit:
    """Read one limit.

    >>> parse_limit("latency<=60%")
    Limit(name='latency_ms', sign='<=', number=0.6, of='dense', part=True)
    >>> str(parse_limit("params ≤ 0.9B"))
    'params<=900000000'

    Raises:
        BadRecipe: what is wrong with it, and what is allowed.
    """
    found = _WHOLE.fullmatch(text)
    if found is None:
        raise BadRecipe(
            f"a limit is a name, <= or >=, and a bound; got {_cut(text)!r}",
            try_='"latency<=60%", "params<=0.9B" or "score>=dense-1.0"',
        )
    given, sign, right = (part.strip() for part in found.groups())
    name = _name(given, text)
    if sign not in _SIGNS:
        towards = ">=" if ">" in sign else "<="
        raise BadRecipe(
            f"a limit has <= or >=; got {_cut(sign)!r} in {_cut(text)!r}",
            try_=f"{name}{towards}{_cut(right)}",
        )
    return _bound(name, "<=" if _SIGNS[sign] == "<=" else ">=", right, text)


def parse_limits(text: str | Sequence[str]) -> tuple[Limit, ...]:
    """Read several limits: a list, or one text with commas or "and" between them.

    Raises:
        BadRecipe: one of them is wrong, or there is none.
    """
    texts = [text] if isinstance(text, str) else list(text)
    parts = [part for one in texts for part in re.split(r",|\band\b", one)]
    if not any(part.strip() for part in parts):
        raise BadRecipe(f"no limit in {texts!r}", try_='"latency<=60%"')
    return tuple(map(parse_limit, parts))


def resolve(
    limits: str | Sequence[str] | Sequence[Limit],
    references: Mapping[str, Mapping[str, float]] | None = None,
    *,
    point: float = POINT,
) -> dict[str, Range]:
    """Return name -> the least and the most that the value may be, as `Known.limits` holds them.

    Args:
        limits: texts or what `parse_limits` returned; several on one value all hold.
        references: system -> name of a value -> what it has; ``dense`` for ``%`` and ``x``.
        point: what one point of a score is.

    Raises:
        BadRecipe: a text that is no limit, a reference that is not known, or limits on one value
            that leave nothing between them.
    """
    found: dict[str, Range] = {}
    texts = [limits] if isinstance(limits, str) else limits
    for one in texts:
        for limit in [one] if isinstance(one, Limit) else parse_limits(one):
            low, high = found.get(limit.name, (-math.inf, math.inf))
            bound = limit.bound(references, point=point)
            low, high = (low, min(high, bound)) if limit.sign == "<=" else (max(low, bound), high)
            if low > high:
                raise BadRecipe(
                    f"no {_SHORT[limit.name]} is >= {low:.10g} and <= {high:.10g}: "
                    "the limits contradict each other",
                    try_="leave one of them out",
                )
            found[limit.name] = (low, high)
    return found


def limits_of_quality(
    limits: Mapping[str, Range], quality: str, *, higher_is_better: bool
) -> dict[str, Range]:
    """Turn a limit on the score into one on the quality that a search minimises.

    A score of which more is better is minimised as the error 1 - score; any other as it is. So is a
    loss, on which a limit stays as it is.

    Args:
        limits: as `resolve` returns.
        quality: name of the minimised value that stands for the score.
        higher_is_better: of the score.
    """
    found = dict(limits)
    if "score" in found and quality != "score":
        low, high = found.pop("score")
        if higher_is_better:
            low, high = 1 - high, 1 - low
        before = found.get(quality, (-math.inf, math.inf))
        found[quality] = (max(low, before[0]), min(high, before[1]))
    return found


def violation(values: Mapping[str, float], limits: Mapping[str, Range]) -> float:
    """Return by how much values miss limits: the misses as parts of the bounds, added up.

    A value that is not there misses nothing; one that is NaN misses infinitely.
    """
    total = 0.0
    for name, (low, high) in limits.items():
        value = values.get(name)
        if value is None:
            continue
        if math.isnan(value):
            return math.inf
        for excess, bound in ((value - high, high), (low - value, low)):
            if excess > 0:
                total += excess / (abs(bound) or 1.0)
    return total


def _name(given: str, text: str) -> str:
    name = re.sub(r"[\s-]+", "_", given.lower())
    name = _ALIASES.get(name, name)
    if name not in _NAMES:
        raise BadRecipe(
            f"no limit can be set on {_cut(given)!r}{nearest(name, [*_NAMES, *_ALIASES])} "
            f"in {_cut(text)!r}; limits are on {', '.join(_NAMES)}"
        )
    return name


def _bound(name: str, sign: Literal["<=", ">="], right: str, text: str) -> Limit:
    value, kind = _NAMES[name]
    relative = _SYSTEM.fullmatch(right)
    if relative is not None and relative[1].lower() not in ("inf", "infinity", "nan"):
        system, direction, number = relative.groups()
        if number is None:
            return Limit(value, sign, 0.0, system)
        if not kind.distances:
            raise BadRecipe(
                f"{_cut(text)!r}: only limits on score, loss and error are so much more or less "
                f"than {system}",
                try_=f"{name}{sign}60%, which is of {REFERENCE}",
            )
        return Limit(value, sign, _finite(Decimal(direction + number), text), system)
    found = _BOUND.fullmatch(right)
    if found is None:
        more = ", or a system such as dense-1.0" if kind.distances else ""
        raise BadRecipe(
            f"{_cut(text)!r}: the bound must be a number, a part such as 60% or 0.6x{more}; "
            f"got {_cut(right)!r}"
        )
    number, unit = Decimal(found[1]), found[2].lower()
    is_part = unit in ("%", "x")
    if (is_part or kind is not _QUALITY) and number < 0:
        raise BadRecipe(f"{_cut(text)!r}: the bound cannot be negative")
    if is_part:
        share = number / 100 if unit == "%" else number
        return Limit(value, sign, _finite(share, text), REFERENCE, part=True)
    if unit and unit not in kind.units:
        allowed = ", ".join(_spelt(kind))
        raise BadRecipe(
            f"{_cut(text)!r}: {found[2]!r} is no unit of {name}, {kind.what}; allowed are {allowed}"
        )
    factor = kind.units[unit or kind.unit.lower()] if unit or kind.unit else Decimal(1)
    return Limit(value, sign, _finite(number * factor, text))


def _spelt(kind: _Kind) -> list[str]:
    """Return a kind's units as they are usually written."""
    if kind is _COUNT:
        return ["k", "M", "B or G", "T", "%", "x"]
    binary = [unit[0].upper() + unit[1:].replace("b", "B") for unit in kind.units]
    return [*(kind.units if kind is _TIME else binary), "%", "x"]


def _finite(number: Decimal, text: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise BadRecipe(
            f"{_cut(text)!r}: the bound is too large", try_="a bound below the full model's cost"
        )
    return value


def _plain(number: float) -> str:
    """Return the shortest decimal that is read as the same number."""
    return repr(number).removesuffix(".0")


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
