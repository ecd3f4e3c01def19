"""Commands for exports: write them, prove them again, and measure them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from elastune.cli import completion
from elastune.cli.frame import ERR, Json, be_quiet, opened, reported, show
from elastune.errors import BadRecipe, ElastuneError

if TYPE_CHECKING:
    from elastune.export.profiles import ExportProfile
    from elastune.export.result import Checked, Export
    from elastune.export_run import Failed

_MB = 2**20

Exports = Annotated[
    list[Path],
    typer.Argument(
        help="Folders that elastune export wrote.",
        metavar="EXPORT...",
        autocompletion=completion.exports,
    ),
]

Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run code that an export brings and elastune did not write."
    ),
]


def export(
    source: Annotated[
        Path,
        typer.Argument(
            help="A run directory, or a saved model or adapter.",
            metavar="RUN|MODEL",
            autocompletion=completion.runs,
        ),
    ],
    format_: Annotated[
        list[str],
        typer.Option(
            "--format",
            "-f",
            help="hf, hf-padded, hf-hetero, peft, merged-sparse, compressed-tensors, onnx, "
            "openvino, openvino:int8, openvino:int4, torch-export, gguf, gguf:q8_0, ..., "
            "nemotron-nas; several by commas.",
            autocompletion=completion.formats,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder that gets one for each format; by default RUN/export.",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            "-c",
            help="Sub-network of the run: its name, such as best, or JSON. By default best, else "
            "heuristic.",
            autocompletion=completion.subnets,
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="Of a saved model as merged-sparse: the same before it was merged."),
    ] = None,
    json_: Json = False,
) -> None:
    """Export a sub-network for the runtimes that load it; each is proved in a fresh process."""
    texts = [part.strip() for text in format_ for part in text.split(",") if part.strip()]
    formats = list(dict.fromkeys(texts))
    with reported():
        if (source / "recipe.yaml").is_file():
            if base is not None:
                raise BadRecipe(
                    "--base is of saved models; a run has its own", try_="leave --base out"
                )
            with opened(source, None, None, False) as work:
                from elastune.export_run import export_run
                from elastune.report import write_report

                made, failed = export_run(work, formats, out, config=config)
                if work.dir.report.exists():
                    write_report(work.dir.root)
        else:
            if config is not None:
                raise BadRecipe(
                    f"--config chooses among the sub-networks of a run, and {source} is none",
                    try_="leave --config out",
                )
            from elastune.console import ConsoleReporter
            from elastune.export_run import export_folder

            be_quiet()
            made, failed = export_folder(source, formats, out, ConsoleReporter(ERR), base=base)
        _finish_exports(made, failed, json_)


def _finish_exports(made: Sequence[Export], failed: Sequence[Failed], as_json: bool) -> None:
    """Show what was written; then fail if anything was not.

    Raises:
        ElastuneError: with the reasons of all formats that failed.
    """
    if as_json and made:
        rows: list[dict[str, Any]] = [_plain(one) for one in made]
        lost = [{"format": f.label, "error": f.error.message, "try": f.error.try_} for f in failed]
        show({"exports": rows, "failed": lost})
    elif made:
        show(_exports_table(made))
        for one in made:
            show(f"{one.label}: {one.folder}")
    if len(failed) == 1 and not made:
        raise failed[0].error
    if failed:
        reasons = "; ".join(f"{one.label}: {one.error.message}" for one in failed)
        ways = dict.fromkeys(one.error.try_ for one in failed if one.error.try_)
        raise ElastuneError(
            f"{len(failed)} of {len(made) + len(failed)} formats could not be written. {reasons}",
            try_="; or ".join(ways) or None,
        )


def _plain(one: Export | Checked | ExportProfile) -> dict[str, Any]:
    return {n: str(v) if isinstance(v, Path) else v for n, v in asdict(one).items()}


def _exports_table(made: Sequence[Export]) -> Table:
    titles = ("format", "MB", "largest difference", "loads with")
    rows = [
        (one.label, f"{one.n_bytes / _MB:.1f}", f"{one.largest_difference:.1e}", one.loads_with)
        for one in made
    ]
    return _table(titles, rows, left=("format", "loads with"))


def check(exports: Exports, trust: Trust = False, json_: Json = False) -> None:
    """Prove exports again: each is run in a fresh process, and its files are compared."""
    with reported():
        from elastune.console import ConsoleReporter
        from elastune.export import check_export

        be_quiet()
        rows: list[dict[str, Any]] = []
        found: list[tuple[str, Checked | ElastuneError]] = []
        with ConsoleReporter(ERR).bar("check", "exports") as bar:
            for number, folder in enumerate(exports):
                bar(number, len(exports), folder.name)
                try:
                    checked: Checked | ElastuneError = check_export(folder, trust_remote_code=trust)
                except ElastuneError as error:
                    checked = error
                found.append((str(folder), checked))
            bar(len(exports), len(exports))
        wrong = [(name, one) for name, one in found if isinstance(one, ElastuneError)]
        for name, one in found:
            if isinstance(one, ElastuneError):
                rows.append({"folder": name, "ok": False, "error": one.message, "try": one.try_})
            else:
                rows.append(_plain(one) | {"folder": name, "ok": True})
        if json_:
            show({"checks": rows})
        else:
            for name, outcome in found:
                show(_verdict(name, outcome))
        if wrong:
            said = "; ".join(f"{name}: {one.message}" for name, one in wrong)
            raise ElastuneError(said, try_=wrong[0][1].try_)


def _verdict(name: str, found: Checked | ElastuneError) -> str:
    if isinstance(found, ElastuneError):
        return f"broken  {name}"
    what = f"largest difference {found.largest_difference or 0.0:.1e}"
    if found.zeros is not None:
        what = f"{found.zeros:,} zeros"
    return f"good    {name}: {found.format}, {what}, by {found.runtime}"


def profile(
    exports: Exports,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated after it.")] = 32,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of every runtime; all processors by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each is measured, in turns.")] = 3,
    trust: Trust = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it, too: a .png, .svg or .pdf file.")
    ] = None,
    json_: Json = False,
) -> None:
    """Measure exports side by side: disk, loading, tokens a second, memory; the first is 1x."""
    with reported():
        from elastune.console import ConsoleReporter
        from elastune.export.profile_plot import draw_profiles, refuse_plot
        from elastune.export.profiles import profile_exports

        if plot is not None:
            refuse_plot(plot)
        with ConsoleReporter(ERR).bar("profile", "processes") as bar:
            found = profile_exports(
                exports,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                threads=threads,
                rounds=rounds,
                trust_remote_code=trust,
                progress=bar,
            )
        if plot is not None:
            draw_profiles(found, plot)
        if json_:
            rows = [_plain(one) for one in found]
            show({"profiles": rows, "plot": None if plot is None else str(plot)})
            return
        show(_profile_table(found))
        if plot is not None:
            show(f"plot: {plot}")


def _profile_table(found: Sequence[ExportProfile]) -> Table:
    generates = any(one.decode_tokens_per_s is not None for one in found)
    titles = ["export", "runtime", "disk MB", "load s", "prefill tok/s", "peak MB"]
    if generates:
        titles.insert(5, "decode tok/s")
    rows = []
    for one in found:
        row = [one.name, one.runtime, f"{one.disk_mb:.1f}", f"{one.load_s:.2f}"]
        row.append(_rate(one.prefill_tokens_per_s, one.prefill_speed_up))
        if generates:
            row.append(_rate(one.decode_tokens_per_s, one.decode_speed_up))
        rows.append([*row, f"{one.peak_memory_mb:.0f}"])
    return _table(titles, rows, left=("export", "runtime"))


def _rate(tokens_per_s: float | None, speed_up: float | None) -> str:
    """Return tokens a second, and beside it how many times those of the first export."""
    if tokens_per_s is None:
        return "-"
    beside = "" if speed_up is None else f" {speed_up:.2f}x"
    return f"{tokens_per_s:,.{0 if tokens_per_s >= 100 else 1}f}{beside}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in titles:
        table.add_column(title, justify="left" if title in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
