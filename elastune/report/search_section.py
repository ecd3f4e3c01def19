"""The section on the search: what can be said of it, its trials, its front, its sub-networks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from elastune.report.front import front_figure
from elastune.report.front_map import front_maps, shown_members
from elastune.report.load import RunData
from elastune.report.maps import subnet_map
from elastune.report.markup import figure_grid, section
from elastune.report.parallel import parallel_figure
from elastune.report.quantities import DASH, cost_texts
from elastune.report.results import System
from elastune.report.search_progress import progress_figure
from elastune.report.search_remarks import remarks
from elastune.report.space_map import space_figures
from elastune.report.trials import COST_TITLES, Searched, searched


def search(run: RunData, rows: Sequence[System]) -> str:
    """Write the space where it was generated, the search, and the sub-networks by layer."""
    found = searched(run, rows)
    markup, more = "", ""
    drawn = [*space_figures(run)]
    if found is not None:
        told = remarks(run, found, rows)
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in told)
        markup += f'<ul class="remarks">{items}</ul>' if items else ""
        markup += front_figure(run, found, rows) + front_table(run, found)
        more = progress_figure(found)
        drawn = [parallel_figure(found), *front_maps(found), *drawn]
    drawn.append(subnet_map(run, rows))
    return section("Search and sub-networks", markup + figure_grid(drawn, first=more))


def front_table(run: RunData, found: Searched) -> str:
    """Write the front as a table: quality, costs beside the largest's, and where it loads."""
    members = shown_members(found)
    if not members:
        return ""
    columns = [[f"{point.quality:.4f}" for point in members]]
    heads = [escape(f"validation {found.quality}")]
    for cost in found.costs:
        values = [point.costs.get(cost) for point in members]
        prefix, texts = cost_texts(cost, values)
        shares = [found.relative(cost, value) for value in values]
        columns.append(
            [
                text if share is None else f"{text} <small>{100 * share:.0f} %</small>"
                for text, share in zip(texts, shares, strict=True)
            ]
        )
        heads.append(escape(f"{COST_TITLES[cost]} ({prefix})" if prefix else COST_TITLES[cost]))
    folders = [next((n for n in p.names if n in run.subnets), "") for p in members]
    columns.append([f"<code>subnets/{escape(n)}</code>" if n else DASH for n in folders])
    heads.append("extracted as")
    names = [", ".join([p.key, *p.names]) for p in members]
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{column[place]}</td>" for column in columns)
        + "</tr>"
        for place, name in enumerate(names)
    )
    head = "".join(f'<th scope="col">{title}</th>' for title in ["", *heads])
    few = len(members) < len(found.front)
    count = f"{len(members)} of {len(found.front)} members" if few else f"{len(members)}"
    return (
        f"<details><summary>The Pareto front as a table ({count})</summary>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        '</div><p class="note">Per cent: of the largest sub-network.</p></details>'
    )
