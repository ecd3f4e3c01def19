"""Nearly valid inputs and raw bytes for fuzz tests, and what may come of them.

The property is the same everywhere: a normal result or an `ElastuneError` of one message; no other
exception, no gigabytes, no hang, and no file outside of the folder that is written to.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from elastune.errors import ElastuneError

SECONDS = 20
"""After which one input counts as a hang."""
HEADROOM = 3 * 2**30
"""Bytes of address space that one input may take beyond what the process has."""

#: Examples of the slow tier, of a target whose inputs take a millisecond; dearer ones take a part.
MANY = int(os.environ.get("ELASTUNE_FUZZ_EXAMPLES", "3000"))


def _settings(examples: int, *, fixed: bool) -> settings:
    return settings(
        max_examples=examples,
        derandomize=fixed,
        database=None,
        deadline=SECONDS * 1000,
        print_blob=True,
        phases=[Phase.explicit, Phase.generate, Phase.target] + ([] if fixed else [Phase.shrink]),
        suppress_health_check=list(HealthCheck),
    )


def tiers(few: int, part: float = 1.0) -> Any:
    """Run a test on a few fixed inputs, and in the slow tier on a part of `MANY` random ones.

    The test takes ``tier``, and applies what it is to its inner function.
    """
    quick = _settings(few, fixed=True)
    slow = _settings(max(50, int(MANY * part)), fixed=False)
    return pytest.mark.parametrize(
        "tier", [pytest.param(quick, id="few"), pytest.param(slow, id="many", marks=[_SLOW])]
    )


_SLOW = pytest.mark.slow


class Outcomes:
    """Counts of what came of the inputs."""

    def __init__(self) -> None:
        self.done = 0
        self.refused = 0

    def of(self, call: Callable[[], Any]) -> Any:
        """Return what a call returns, or the `ElastuneError` that it refuses its input with."""
        try:
            with little_memory():
                found = call()
        except ElastuneError as error:
            self.refused += 1
            return error
        self.done += 1
        return found

    def both(self) -> None:
        """Make sure that inputs were near enough to valid ones: some pass, some do not."""
        assert self.done > 0, "no input was taken: they do not reach what is behind the parser"
        assert self.refused > 0, "no input was refused"


@contextmanager
def little_memory() -> Iterator[None]:
    """Let allocations fail that a size in a header asks for and its file does not hold."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + HEADROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def snapshot(root: Path, *but: Path) -> dict[str, Any]:
    """Return every file, folder and link below ``root`` with what it holds, but those ``but``."""
    found: dict[str, Any] = {}
    for folder, names, files in os.walk(root):
        here = Path(folder)
        names[:] = [name for name in names if here / name not in but]
        for path in (here / name for name in [*names, *files]):
            if path in but:
                continue
            key = str(path.relative_to(root))
            if path.is_symlink():
                found[key] = ("link", os.readlink(path))
            elif path.is_dir():
                found[key] = ("folder", oct(path.stat().st_mode))
            else:
                found[key] = ("file", path.read_bytes())
    return found


# --- values ---------------------------------------------------------------------------------------

NASTY_TEXT = (
    *("", " ", "\0", "..", "../../x", "/etc/passwd", "~", "a" * 300, "\ud800", "\u202e", "é"),
    *(
        "<script>",
        "{{ 1 }}",
        "%s",
        "${HOME}",
        "a\nb",
        "-1",
        "nan",
        "1e999",
        "null",
        "*",
        "[",
        "\x1b[2J",
    ),
)
NASTY_NUMBERS = (0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, 1e-320)
_texts = st.one_of(st.sampled_from(NASTY_TEXT), st.text(max_size=12))
_numbers = st.one_of(
    st.sampled_from(NASTY_NUMBERS),
    st.integers(-5, 70),
    st.floats(allow_nan=True, allow_infinity=True),
)
scalars = st.one_of(st.none(), st.booleans(), _numbers, _texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(_texts, inner, max_size=4)
    ),
    max_leaves=8,
)
"""Anything that JSON can say, and NaN."""


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [place]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _places(inner, (*place, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value[:6]):
            found += _places(inner, (*place, number))
    return found


@st.composite
def changed(draw: Any, valid: Any, most: int = 2) -> Any:
    """Return ``valid`` with a few fields replaced, removed, renamed or added."""
    made = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(0, most))):
        places = _places(made)
        place = draw(st.sampled_from(places))
        if not place:
            if draw(st.integers(0, 20)) == 0:
                made = draw(values)
            continue
        home = made
        for key in place[:-1]:
            home = home[key]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "swap"]))
        if kind == "remove":
            del home[place[-1]]
        elif kind == "add" and isinstance(home, dict):
            home[draw(_texts)] = draw(values)
        elif kind == "swap":  # with another part of the same document
            other: Any = made
            for key in draw(st.sampled_from(places)):
                other = other[key] if _has(other, key) else None
            home[place[-1]] = json.loads(json.dumps(other))
        else:
            home[place[-1]] = draw(values)
    return made


def _has(home: Any, key: Any) -> bool:
    if isinstance(home, dict):
        return key in home
    return isinstance(home, list) and isinstance(key, int) and key < len(home)


@st.composite
def damaged(draw: Any, valid: bytes, most: int = 4) -> bytes:
    """Return bytes with a few changed, cut, doubled or put in; sometimes quite other ones."""
    if draw(st.integers(0, 15)) == 0:
        return draw(st.binary(max_size=200))
    made = bytearray(valid)
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, max(0, len(made) - 1)))
        kind = draw(st.sampled_from(["byte", "int", "cut", "insert", "double", "end"]))
        if kind == "byte" and made:
            made[at] = draw(st.integers(0, 255))
        elif kind == "int":
            size = draw(st.sampled_from([1, 2, 4, 8]))
            number = draw(st.sampled_from([0, 1, 127, 2**31 - 1, 2**32 - 1, 2**62, 2**64 - 1]))
            made[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
        elif kind == "cut":
            del made[at : at + draw(st.integers(1, 40))]
        elif kind == "insert":
            made[at:at] = draw(st.binary(max_size=12))
        elif kind == "double":
            made[at:at] = made[at : at + draw(st.integers(1, 60))]
        elif kind == "end":
            del made[at:]
    return bytes(made)


def json_bytes(value: Any) -> bytes:
    """Return JSON in bytes; NaN and lone surrogates as Python writes them."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def texts_near(valid: str) -> Any:
    """Return JSON text with changed fields, or its bytes damaged."""
    data = json.loads(valid)
    return st.one_of(changed(data).map(json_bytes), damaged(valid.encode()))
