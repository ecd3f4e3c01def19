"""Inline SVG from small parts: elements, scales, ticks, and a frame with axes."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass

from elastune.report.quantities import MINUS

WIDTH = 520.0
CHARACTER_WIDTH = 7.0  # of the 12-unit text; a little wide, since phones show it larger
Points = Iterable[tuple[float, float]]


def tag(name: str, *children: str, **attributes: object) -> str:
    """Write one element; ``children`` are markup, attribute values are escaped."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{''.join(children)}</{name}>"


def _attribute(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return html.escape(str(value))


def text(x: float, y: float, content: str, **attributes: object) -> str:
    """Write a text element with escaped ``content``."""
    return tag("text", html.escape(content), x=float(x), y=float(y), **attributes)


def tip(content: str) -> str:
    """Write the tooltip of the enclosing element."""
    return tag("title", html.escape(content))


def path(points: Points) -> str:
    """Spell a polyline's ``points`` attribute."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def drawing(height: float, title: str, *children: str) -> str:
    """Wrap markup as an image of ``WIDTH`` by ``height`` units that scales with the page."""
    view = f"0 0 {WIDTH:.0f} {height:.0f}"
    return tag("svg", *children, viewBox=view, role="img", aria_label=title)


def nice_ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """Choose about ``count`` round numbers (1, 2 or 5 times a power of ten) within [low, high].

    ``whole`` keeps to integers, for steps and other counts.
    """
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    options = []
    for times in (1, 2, 5, 10):
        step = max(times * power, 1.0) if whole else times * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        options.append([place * step for place in range(first, last + 1)])
    return min(options, key=lambda ticks: abs(len(ticks) - count))


def tick_texts(ticks: list[float]) -> list[str]:
    """Format ticks with the same number of decimals, as many as their step needs."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else (abs(ticks[0]) if ticks else 1) or 1
    top = max((abs(tick) for tick in ticks), default=0)
    if step < 1e-4 or top >= 1e6:
        return [f"{tick:.3g}".replace("-", MINUS) for tick in ticks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if len(ticks) == 1:
        decimals += 1
    return [f"{tick:,.{decimals}f}".replace("-", MINUS) for tick in ticks]


def padded(values: Iterable[float], share: float = 0.06) -> tuple[float, float]:
    """Find the range of the finite ``values`` with room at both ends; never empty."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    room = (high - low) * share or abs(high) * 0.05 or 1.0
    return low - room, high + room


@dataclass(frozen=True)
class Scale:
    """A linear map from [low, high] to drawing units [start, stop]."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """Place ``value``, clamped to the range."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)


@dataclass(frozen=True)
class Frame:
    """A plot area with grid, ticks and axis labels (units in the labels)."""

    x: Scale
    y: Scale
    x_label: str
    y_label: str
    height: float
    whole_x: bool = False

    @classmethod
    def around(
        cls,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        labels: tuple[str, str],
        height: float = 320.0,
        *,
        whole_x: bool = False,
    ) -> Frame:
        """Make a frame for these ranges, with a left margin as wide as the y tick texts."""
        longest = max(len(t) for t in tick_texts(nice_ticks(*y_range)))
        left = 14 + CHARACTER_WIDTH * longest
        x = Scale(*x_range, left, WIDTH - 16)
        return cls(x, Scale(*y_range, height - 48, 34), *labels, height, whole_x)

    def markup(self) -> str:
        """Draw grid lines, tick texts and labels."""
        parts = []
        ticks = nice_ticks(self.y.low, self.y.high)
        for tick, written in zip(ticks, tick_texts(ticks), strict=True):
            y = self.y(tick)
            parts.append(tag("line", class_="grid", x1=self.x.start, x2=self.x.stop, y1=y, y2=y))
            parts.append(text(self.x.start - 7, y + 4, written, text_anchor="end"))
        ticks = nice_ticks(self.x.low, self.x.high, whole=self.whole_x)
        bottom = self.y.start
        for tick, written in zip(ticks, tick_texts(ticks), strict=True):
            x = self.x(tick)
            parts.append(tag("line", class_="tick", x1=x, x2=x, y1=bottom, y2=bottom + 4))
            parts.append(text(x, bottom + 18, written, text_anchor="middle"))
        ends = {"x1": self.x.start, "x2": self.x.stop, "y1": bottom, "y2": bottom}
        parts.append(tag("line", class_="axis", **ends))
        # The y label lies flat above the axis: read without tilting the head.
        parts.append(text(2, 16, self.y_label, class_="label"))
        parts.append(
            text(self.x.stop, self.height - 8, self.x_label, class_="label", text_anchor="end")
        )
        return "".join(parts)
