"""What all commands share: their options, the run they open, how they end and fail."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from elastune.cli import completion
from elastune.errors import BadRecipe, ElastuneError

if TYPE_CHECKING:
    from elastune.run import Run

OUT = Console()
ERR = Console(stderr=True)

Source = Annotated[
    Path,
    typer.Argument(
        help="A recipe (.yaml), or a run directory to go on with.",
        metavar="RECIPE|RUN",
        autocompletion=completion.recipes_and_runs,
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Run directory; by default runs/<recipe's name>.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        help="Override a setting of the recipe: section.key=value.",
        autocompletion=completion.settings,
    ),
]
Update = Annotated[
    bool, typer.Option("--update", help="Go on in OUT with a changed recipe; redo what it changes.")
]
RunFolder = Annotated[
    Path,
    typer.Argument(help="A run directory.", metavar="RUN", autocompletion=completion.runs),
]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable output.")]


@contextmanager
def opened(
    source: Path, out: Path | None, overrides: list[str] | None, update: bool
) -> Iterator[Run]:
    """Open the run directory of a recipe, or the recipe of a run directory."""
    from elastune.artifacts import RunDirectory
    from elastune.config import load_recipe

    if source.is_dir():
        if out is not None and out != source:
            raise BadRecipe(
                f"{source} is a run directory already; --out {out} cannot apply",
                try_="leave --out out, or give the recipe instead of the run",
            )
        directory = RunDirectory(source)
        directory.recipe()
        recipe = load_recipe(directory.recipe_file, overrides or [])
    else:
        recipe = load_recipe(source, overrides or [])
        name = source.stem.strip(".")
        directory = RunDirectory(out or Path("runs") / (name or "run"))
    be_quiet()
    from elastune.console import ConsoleReporter
    from elastune.run import Run

    with directory.lock():
        directory.claim(recipe, update=update)
        yield Run(directory, recipe, ConsoleReporter(ERR))


def checked(work: Run) -> None:
    """Refuse bad input; from here on the run writes to its folder."""
    from elastune.check import check

    check(work)
    work.dir.keep_recipe()


def finish(work: Run, as_json: bool) -> None:
    """Write the report, and show its main table and where it is."""
    from elastune.report import metrics_table, write_report

    page = write_report(work.dir.root)
    metrics = work.dir.metrics()
    if as_json:
        show({"report": str(page), **metrics})
    else:
        show(metrics_table(metrics))
        show(f"report: {page}")


def show(what: Any) -> None:
    """Print a table or a line for people, or JSON for machines."""
    if isinstance(what, dict):
        sys.stdout.write(json.dumps(what) + "\n")
    else:
        OUT.print(what, highlight=False, soft_wrap=isinstance(what, str))


def be_quiet() -> None:
    """Keep other libraries' progress bars and notices out of ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("elastune").setLevel(logging.INFO)


@contextmanager
def reported() -> Iterator[None]:
    """Turn what the user can mend into one message and exit code 2; signals into a line."""
    try:
        with _terminable():
            yield
    except ElastuneError as error:
        _complain(error.message, error.try_)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        ERR.print("interrupted; run the same command again to go on")
        raise typer.Exit(130) from None
    except _Terminated:
        ERR.print("terminated; run the same command again to go on")
        raise typer.Exit(128 + signal.SIGTERM) from None
    except Exception as error:
        told = _mendable(error)
        if told is None:
            raise
        _complain(*told)
        raise typer.Exit(2) from None


class _Terminated(BaseException):
    """SIGTERM, as schedulers of clusters send it before they kill."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, where nobody else has an answer to it."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would break what tidies up
    raise _Terminated


def follow() -> None:
    """Take part in the trainings of the process that runs the command line."""
    from elastune import processes

    def open_run(job: Mapping[str, Any]) -> Run:
        from elastune.artifacts import OthersRunDirectory
        from elastune.config import Recipe
        from elastune.progress import Reporter
        from elastune.run import Run

        be_quiet()
        recipe = Recipe.model_validate(job["recipe"])
        return Run(OthersRunDirectory(Path(job["root"])), recipe, Reporter())

    try:
        with reported():
            processes.join()
            processes.follow(open_run)
    except typer.Exit as end:  # no command is there to take it
        sys.exit(end.exit_code)


def _complain(message: str, way_out: str | None) -> None:
    ERR.print("[bold red]error:[/] ", end="")
    ERR.print(_printable(message), markup=False, highlight=False, soft_wrap=True)
    if way_out:
        ERR.print("[bold]try:[/] ", end="")
        ERR.print(_printable(way_out), markup=False, highlight=False, soft_wrap=True)


def _printable(text: str) -> str:
    """Spell out what would steer the terminal, and half characters: names in files hold anything.

    The marks that turn the direction of text round are among them.
    """
    plain = (c if c == "\n" or c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)
    return "".join(plain)


def _mendable(error: Exception) -> tuple[str, str] | None:
    """Return the message and the way out for a full disk and for too little memory, else None."""
    reason = _cannot_write(error)
    if reason is not None:
        way_out = "free space or another --out; run again to go on from here"
        return f"cannot write: {reason}", way_out
    names = {cls.__name__ for cls in type(error).__mro__}
    # torch's allocator of the CPU has no error of its own.
    if names & {"MemoryError", "OutOfMemoryError"} or "DefaultCPUAllocator" in str(error):
        first = str(error).strip().partition("\n")[0]
        return (
            "out of memory" + (f": {first}" if first else ""),
            "a smaller train.batch_size (and more train.accumulation), "
            "train.gradient_checkpointing=true or a smaller evaluate.batch_tokens, with --update; "
            "run again to go on from here",
        )
    return None


def _cannot_write(error: BaseException) -> str | None:
    """Return why a file could not be written, if that is what the error is about."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _CANNOT_WRITE:
            return str(seen)
        # safetensors and torch report a full disk by errors of their own.
        for number in _CANNOT_WRITE:
            if f"(os error {number})" in str(seen):
                return os.strerror(number)
        if "PytorchStreamWriter failed writing" in str(seen):
            return "the disk is full, or a file may not be as large"
        seen = seen.__context__
    return None


_CANNOT_WRITE = frozenset(
    [
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        *(errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
    ]
)
