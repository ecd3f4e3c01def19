"""Draw profiles of exports: a panel for each measure, a bar for each export."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastune.errors import BadRecipe
from elastune.export.profiles import ExportProfile

_KINDS = (".png", ".svg", ".pdf")

#: Title, field, whether more is better.
_PANELS = (
    ("size on disk, MB", "disk_mb", False),
    ("load time, s", "load_s", False),
    ("prefill, tokens/s", "prefill_tokens_per_s", True),
    ("decode, tokens/s", "decode_tokens_per_s", True),
    ("peak memory, MB", "peak_memory_mb", False),
)


def refuse_plot(file: Path) -> None:
    """Raise if a plot could not be written there.

    Raises:
        BadRecipe: another kind of file, a folder that is missing, or matplotlib is.
    """
    if file.suffix.lower() not in _KINDS:
        raise BadRecipe(
            f"a plot is a {', '.join(_KINDS)} file, got {file.name!r}", try_="--plot speeds.png"
        )
    if not file.absolute().parent.is_dir():
        raise BadRecipe(
            f"there is no folder {file.absolute().parent} for the plot",
            try_="make the folder first, or --plot in another",
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise BadRecipe(
            "plots need matplotlib, which is not installed", try_="pip install 'elastune[plot]'"
        )


def draw_profiles(found: Sequence[ExportProfile], file: Path) -> None:
    """Write a plot of profiles, whole or not at all.

    Raises:
        BadRecipe: as `refuse_plot`.
    """
    refuse_plot(file)
    from matplotlib.figure import Figure

    names = [f"{one.name} ({one.runtime})" for one in found]
    # Encoders generate nothing.
    panels = [p for p in _PANELS if any(getattr(one, p[1]) is not None for one in found)]
    figure = Figure(figsize=(3.0 * len(panels) + 1.5, 1.2 + 0.45 * len(found)))
    axes: Any = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, field, more_is_better) in zip(axes, panels, strict=True):
        values = [getattr(one, field) for one in found]
        bars = axis.barh(names, [value or 0.0 for value in values], color="#4878a8")
        axis.bar_label(bars, ["-" if v is None else f"{v:.4g}" for v in values], padding=3)
        axis.set_title(f"{title}\n{'more' if more_is_better else 'less'} is better", fontsize=10)
        axis.margins(x=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.tight_layout()
    partial = file.with_name(f".{file.stem}.partial{file.suffix}")
    try:
        figure.savefig(partial, dpi=150)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
