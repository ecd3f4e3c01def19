"""Commands for what is made and used outside of a run: a LoRA of one's own, and the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elastune.cli.frame import Json, be_quiet, reported, show


def adapter(
    source: Annotated[
        Path, typer.Argument(help="A LoRA as PEFT saves it: a folder.", metavar="ADAPTER")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the adapter that is cut.")],
    model: Annotated[
        str | None, typer.Option(help="Its base; by default the one its config names.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Part of its energy that every module keeps, such as 0.9.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Largest rank of every module.")] = None,
    target: Annotated[
        str | None, typer.Option(help='What it may cost, such as "params<=0.5x".')
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="A text file, a text a line: ranks are ordered by outputs on it."),
    ] = None,
    whole: Annotated[bool, typer.Option(help="A row of the table for every module.")] = False,
    json_: Json = False,
) -> None:
    """Cut the ranks of a trained LoRA by what they add; nothing is trained."""
    with reported():
        from elastune.adapters import cut_adapter
        from elastune.errors import BadData

        be_quiet()
        texts = None
        if calibration is not None:
            try:
                lines = calibration.read_text(encoding="utf-8").splitlines()
            except (OSError, ValueError) as error:
                raise BadData(
                    f"the calibration text cannot be read: {error}",
                    try_="a text file in UTF-8, a text a line",
                ) from error
            texts = [line for line in lines if line.strip()]
        found = cut_adapter(
            source, out, model=model, energy=energy, rank=rank, target=target, calibration=texts
        )
        if json_:
            show(
                {
                    "adapter": str(found.folder),
                    "params": found.n_params,
                    "params_before": found.n_before,
                    "energy": found.kept,
                    "largest_difference": found.largest_difference,
                    "ranks": {m.module: found.config[m.dim] for m in found.energies.modules},
                }
            )
            return
        show(found.table(whole=whole))
        show(f"adapter: {found.folder}, loads with plain PEFT")


def push(
    folder: Annotated[Path, typer.Argument(help="A finished export.", metavar="EXPORT")],
    repo: Annotated[str, typer.Argument(help="owner/name on the hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="A new repository is public, not private.")
    ] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    json_: Json = False,
) -> None:
    """Upload an export to the Hugging Face hub, as one commit."""
    with reported():
        from elastune.push import push as upload

        done = upload(folder, repo, private=not public, message=message)
        if json_:
            show({"repo": done.repo_id, "url": done.url, "files": list(done.files)})
        else:
            show(
                f"{done.repo_id}: {len(done.files)} files, {done.n_bytes / 1e6:.1f} MB, {done.url}"
            )
