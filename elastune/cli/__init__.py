"""The command line: one subcommand per stage, each importing what it needs only when called."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from elastune import processes
from elastune.cli import adapters, exporting, fitting, looking, searching, stages
from elastune.cli.frame import OUT, follow, reported
from elastune.version import __version__

app = typer.Typer(
    help="Compress and fine-tune Hugging Face transformers by weight-sharing architecture search.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _command in (
    stages.run,
    fitting.fit,
    stages.sparsify,
    stages.space,
    stages.train,
    searching.search,
    searching.extract,
    searching.sweep,
    exporting.export,
    exporting.check,
    exporting.profile,
    adapters.adapter,
    adapters.push,
    stages.evaluate,
    looking.report,
    looking.runs,
    stages.demo,
    looking.doctor,
):
    app.command()(_command)
app.command(hidden=True)(searching.work)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        OUT.print(__version__, highlight=False)
        raise typer.Exit


def main() -> None:
    """Entry point of the console script."""
    # Threads that wait by spinning cost a multiple of the time as soon as a core is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not processes.is_main():
        follow()
        return
    try:
        with reported():
            processes.join()
    except typer.Exit as end:  # no command is there to take it
        sys.exit(end.exit_code)
    try:
        app()
    finally:
        processes.release()
