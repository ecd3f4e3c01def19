"""The fenced blocks of the documentation, and what the comments above them say about them.

A comment above a block, invisible on the page, tells the tests what to make of it:

- ``<!-- snippet: needs net, rows -->``: names that `docs_names` defines beforehand;
- ``<!-- snippet: within {method: eftnas} -->``: the rest of the recipe that a YAML fragment is of;
- ``<!-- snippet: not run: REASON -->``: nothing is checked, and why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(p.relative_to(REPO)) for p in REPO.glob("docs/**/*.md")),
)

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\S*)\s*$")
_COMMENT = re.compile(r"^ *<!-- snippet: (?P<text>.*?) -->$")
_WORDS = ("needs ", "within ", "not run: ")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: path from the repository's root.
        line: of its first line of text, from 1.
        language: the word behind the fence.
        text: what stands between the fences, without their indent.
        comments: what the comments right above it say.
    """

    page: str
    line: int
    language: str
    text: str
    comments: tuple[str, ...] = ()

    def said(self, word: str) -> str | None:
        """Return what follows ``needs``, ``within`` or ``not run:`` in a comment."""
        found = (c.removeprefix(word) for c in self.comments if c.startswith(word))
        return next((text.strip() for text in found), None)

    @property
    def reason(self) -> str | None:
        """Why it is not checked; None: it is."""
        return self.said("not run:")

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str | None = None) -> list[Block]:
    """Return the blocks of a page, from top to bottom.

    Raises:
        ValueError: a fence that is not closed, or a comment that says nothing known.
    """
    found: list[Block] = []
    comments: list[str] = []
    lines = iter(enumerate((text or (REPO / page).read_text(encoding="utf-8")).splitlines(), 1))
    for number, line in lines:
        comment, fence = _COMMENT.match(line), _FENCE.match(line)
        if comment:
            comments.append(comment["text"])
            if not comment["text"].startswith(_WORDS):
                raise ValueError(f"{page}:{number}: a comment is one of {_WORDS}")
        elif fence:
            inner = _inside(lines, len(fence["indent"]), f"{page}:{number}")
            found.append(Block(page, number + 1, fence["language"], inner, tuple(comments)))
            comments = []
        elif line.strip() and comments:
            raise ValueError(f"{page}:{number}: the comment above belongs to no block")
    return found


def _inside(lines: Iterator[tuple[int, str]], indent: int, place: str) -> str:
    """Return the lines up to the closing fence."""
    kept: list[str] = []
    for _, line in lines:
        if line.strip() == "```":
            return "\n".join(kept) + "\n"
        kept.append(line[indent:])
    raise ValueError(f"{place}: the fence is not closed")


def spans(page: str) -> list[str]:
    """Return what stands between single backticks, outside of blocks."""
    text = (REPO / page).read_text(encoding="utf-8")
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def all_blocks(*languages: str) -> list[Block]:
    """Return the blocks of all pages in some languages, or in any."""
    every = [block for page in PAGES for block in blocks(page)]
    return [block for block in every if not languages or block.language in languages]
