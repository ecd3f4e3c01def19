"""Figures with caption and legend, and sections, as markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Figure:
    """A drawing with its heading, a sentence under it, and legend entries (kind, style, text)."""

    title: str
    svg: str
    note: str = ""
    legend: tuple[tuple[str, str, str], ...] = ()


def section(name: str, body: str) -> str:
    """Write a section; nothing where it has no body."""
    return f"<section><h2>{name}</h2>{body}</section>" if body else ""


def figure_grid(drawn: Sequence[Figure | None], first: str = "") -> str:
    """Write figures side by side, with captions and legends; ``first`` is markup of one before."""
    written = first + "".join(_figure(figure) for figure in drawn if figure is not None)
    return f'<div class="figures">{written}</div>' if written else ""


def _figure(figure: Figure) -> str:
    note = f'<span class="note">{escape(figure.note)}</span>' if figure.note else ""
    caption = f"<figcaption><h3>{escape(figure.title)}</h3>{note}</figcaption>"
    return f"<figure>{caption}{legend_markup(figure.legend)}{figure.svg}</figure>"


def legend_markup(entries: Sequence[tuple[str, str, str]]) -> str:
    """Write a legend from (kind, style, text); nothing where it has no entries."""
    written = "".join(f"<span>{_key(*entry)}</span>" for entry in entries)
    return f'<div class="legend">{written}</div>' if written else ""


def _key(kind: str, style: str, words: str) -> str:
    """One legend entry: a swatch that looks like the mark, and its words."""
    shapes = {
        "line": f'<line class="line {style}" x1="0" x2="18" y1="6" y2="6"/>',
        "dot": f'<circle class="dot {style}" cx="9" cy="6" r="4.5"/>',
        "strand": f'<line class="{style}" x1="0" x2="18" y1="6" y2="6"/>',
        "cross": f'<path class="{style}" transform="translate(9 6)" d="M-3.5-3.5l7 7m0-7l-7 7"/>',
        "heat": f'<rect class="heat" fill-opacity="{style}" width="18" height="12" rx="2"/>',
    }
    shape = shapes.get(kind)
    swatch = f'<svg viewBox="0 0 18 12" aria-hidden="true">{shape}</svg>' if shape else ""
    return swatch + escape(words)
