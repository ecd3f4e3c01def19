"""The command line: one subcommand per stage, each importing what it needs only when called."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from elastune.errors import BadRecipe, ElastuneError
from elastune.version import __version__

if TYPE_CHECKING:
    from elastune.run import Run

app = typer.Typer(
    help="Compress and fine-tune Hugging Face transformers by weight-sharing architecture search.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_CHOSEN = ("largest", "heuristic", "smallest", "best")
_out = Console()
_err = Console(stderr=True)

Source = Annotated[
    Path,
    typer.Argument(
        help="A recipe (.yaml), or a run directory to go on with.", metavar="RECIPE|RUN"
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Run directory; by default runs/<recipe's name>.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override a setting of the recipe: section.key=value."),
]
Update = Annotated[
    bool, typer.Option("--update", help="Go on in OUT with a changed recipe; redo what it changes.")
]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable output.")]


@app.command()
def run(
    source: Source, out: Out = None, set_: Set = None, update: Update = False, json_: Json = False
) -> None:
    """Run a recipe from model to report; a killed run goes on where it stopped."""
    with _errors(), _run(source, out, set_, update) as work:
        from elastune.methods import METHODS

        _check(work)
        METHODS[work.recipe.method](work)
        _finish(work, json_)


@app.command()
def sparsify(
    source: Source, out: Out = None, set_: Set = None, update: Update = False, json_: Json = False
) -> None:
    """Make the base model sparse and save it to RUN/base."""
    with _errors(), _run(source, out, set_, update) as work:
        from elastune.files import read_json
        from elastune.prepare import make_base
        from elastune.report import sparsity_table

        _check(work)
        make_base(work)
        report = read_json(work.dir.sparsity)
        _show(report["total"] if json_ else sparsity_table(report))


@app.command()
def space(
    source: Source, out: Out = None, set_: Set = None, update: Update = False, json_: Json = False
) -> None:
    """Make the search space, and show what it holds."""
    with _errors(), _run(source, out, set_, update) as work:
        from elastune.prepare import make_base

        _check(work)
        make_base(work)
        found = work.space_of(work.load_sparse())
        if json_:
            _show(found.to_dict())
            return
        _show(repr(found))
        for dim in found.dims:
            _show(f"{dim.name}: {', '.join(map(str, dim.choices))}")


@app.command()
def train(
    source: Source, out: Out = None, set_: Set = None, update: Update = False, json_: Json = False
) -> None:
    """Train the super-adapter (and sparsify first, if that is not done)."""
    with _errors(), _run(source, out, set_, update) as work:
        from elastune.prepare import make_base
        from elastune.stages import train_supernet

        _check(work)
        make_base(work)
        train_supernet(work)
        _show({"supernet": str(work.dir.supernet)} if json_ else f"trained: {work.dir.supernet}")


@app.command()
def search(
    source: Source, out: Out = None, set_: Set = None, update: Update = False, json_: Json = False
) -> None:
    """Score sub-adapters on the validation examples and choose the best."""
    with _errors(), _run(source, out, set_, update) as work:
        from elastune.choose import allocate_budgets
        from elastune.choose import search as search_run

        result = search_run(work)
        allocate_budgets(work)
        if not result.trials:
            _show({"best": None} if json_ else "search.trials is 0: nothing was searched")
            return
        best = result.best()
        if json_:
            _show({"best": dict(best.config), "values": dict(best.values)})
            return
        _show(f"best of {len(result.trials)} trials: {best.config.short()}")
        _show(" ".join(f"{key} {value:.6g}" for key, value in best.values.items()))


@app.command()
def extract(
    source: Source,
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config", "-c", help="largest, heuristic, smallest, best, or JSON of dim -> choice."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Folder under RUN/subnets for a JSON configuration.")
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="Of models: auto, hf, hf-padded, hf-hetero."),
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option("--uniform", help="The nearest with blocks alike, for stock classes."),
    ] = False,
    json_: Json = False,
) -> None:
    """Write sub-networks under RUN/subnets: stock PEFT adapters, or smaller models."""
    with _errors(), _run(source, None, None, False) as work:
        from elastune.choose import chosen, extract_chosen, named_config
        from elastune.space import SearchSpace

        known = chosen(work)
        space = SearchSpace.from_dict(json.loads(work.dir.space.read_text()))
        wanted = {}
        for text in config or list(known):
            folder = _folder_name(name) if text.lstrip().startswith("{") else text
            if folder in wanted:
                raise BadRecipe(f"two configurations for subnets/{folder}", try_="one at a time")
            wanted[folder] = known.get(text) or named_config(space, text)
        written = extract_chosen(work, wanted, format=format_, uniform=uniform)
        folders = [str(folder) for folder in written]
        _show({"subnets": folders} if json_ else "\n".join(folders))


@app.command()
def evaluate(
    source: Source,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Systems to score, such as best or sparse.")
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness besides, such as piqa,arc_easy."),
    ] = None,
    lm_eval_path: Annotated[
        Path | None, typer.Option(help="Folder of task files of your own for it.")
    ] = None,
    lm_eval_limit: Annotated[
        float | None, typer.Option(help="First so many examples of each; below 1, that part.")
    ] = None,
    lm_eval_fewshot: Annotated[
        int | None, typer.Option(help="Worked examples before each question.")
    ] = None,
    json_: Json = False,
) -> None:
    """Score baselines and sub-networks on the report examples, into RUN/metrics.json."""
    with _errors(), _run(source, None, None, False) as work:
        from elastune.measure import measure, systems

        known = [system.name for system in systems(work)]
        for wrong in set(only or []) - set(known):
            raise BadRecipe(f"unknown system {wrong!r}; this run has {', '.join(known)}")
        more = []
        if lm_eval is not None:
            from elastune.measure_harness import harness_measurements

            more = harness_measurements(
                work,
                [name.strip() for name in lm_eval.split(",") if name.strip()],
                include_path=lm_eval_path,
                limit=lm_eval_limit,
                num_fewshot=lm_eval_fewshot,
            )
        measure(work, only, more)
        _finish(work, json_)


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")],
    json_: Json = False,
) -> None:
    """Write RUN/report.html and print its main table."""
    with _errors():
        from elastune.artifacts import RunDirectory
        from elastune.report import metrics_table, write_report

        directory = RunDirectory(source)
        directory.recipe()
        page = write_report(source)
        metrics = directory.metrics()
        _show({"report": str(page), **metrics} if json_ else metrics_table(metrics))
        if not json_:
            _show(f"report: {page}")


@app.command()
def demo(out: Out = None, set_: Set = None, json_: Json = False) -> None:
    """Run Shears on a small real LLM: about ten minutes on two cores, no hub access."""
    recipe = Path(__file__).with_name("demo.yaml")
    run(recipe, out or Path("runs/demo"), set_, False, json_)


@app.command()
def doctor(json_: Json = False) -> None:
    """Show versions, devices and what is installed."""
    with _errors():
        from elastune.doctor import doctor_table, examine

        facts = examine()
        _show(facts if json_ else doctor_table(facts))


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        _out.print(__version__, highlight=False)
        raise typer.Exit


@contextmanager
def _run(
    source: Path, out: Path | None, overrides: list[str] | None, update: bool
) -> Iterator[Run]:
    """Open the run directory of a recipe, or the recipe of a run directory."""
    from elastune.artifacts import RunDirectory
    from elastune.config import load_recipe

    if source.is_dir():
        if out is not None and out != source:
            raise BadRecipe(f"{source} is a run directory already; --out {out} cannot apply")
        directory = RunDirectory(source)
        directory.recipe()
        recipe = load_recipe(directory.recipe_file, overrides or [])
    else:
        recipe = load_recipe(source, overrides or [])
        directory = RunDirectory(out or Path("runs") / source.stem)
    _be_quiet()
    from elastune.console import ConsoleReporter
    from elastune.run import Run

    with directory.lock():
        directory.claim(recipe, update=update)
        yield Run(directory, recipe, ConsoleReporter(_err))


def _check(work: Run) -> None:
    """Refuse bad input; from here on the run writes to its folder."""
    from elastune.check import check

    check(work)
    work.dir.keep_recipe()


def _folder_name(name: str | None) -> str:
    """Return the folder under RUN/subnets of a configuration given as JSON."""
    name = name or "custom"
    if not re.fullmatch(r"\w[\w.-]*", name) or name in _CHOSEN:
        raise BadRecipe(
            f"--name {name!r} must be letters, digits, '.', '_' and '-', and not one of "
            f"{', '.join(_CHOSEN)}"
        )
    return name


def _finish(work: Run, as_json: bool) -> None:
    from elastune.report import metrics_table, write_report

    page = write_report(work.dir.root)
    metrics = work.dir.metrics()
    if as_json:
        _show({"report": str(page), **metrics})
    else:
        _show(metrics_table(metrics))
        _show(f"report: {page}")


def _show(what: Any) -> None:
    """Print a table or a line for people, or JSON for machines."""
    if isinstance(what, dict):
        sys.stdout.write(json.dumps(what) + "\n")
    else:
        _out.print(what, highlight=False, soft_wrap=isinstance(what, str))


def _be_quiet() -> None:
    """Keep other libraries' progress bars and notices out of ours."""
    import logging

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("elastune").setLevel(logging.INFO)


@contextmanager
def _errors() -> Iterator[None]:
    """Turn what the user can mend into one message and exit code 2; Ctrl-C into a line."""
    try:
        yield
    except ElastuneError as error:
        _complain(error.message, error.try_)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        _err.print("interrupted; run the same command again to go on")
        raise typer.Exit(130) from None
    except Exception as error:
        reason = _cannot_write(error)
        if reason is None:
            raise
        _complain(
            f"cannot write: {reason}", "free space or another --out; run again to go on from here"
        )
        raise typer.Exit(2) from None


def _complain(message: str, way_out: str | None) -> None:
    _err.print("[bold red]error:[/] ", end="")
    _err.print(message, markup=False, highlight=False, soft_wrap=True)
    if way_out:
        _err.print("[bold]try:[/] ", end="")
        _err.print(way_out, markup=False, highlight=False, soft_wrap=True)


def _cannot_write(error: BaseException) -> str | None:
    """Return why a file could not be written, if that is what the error is about."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _CANNOT_WRITE:
            return str(seen)
        # safetensors and torch report a full disk by errors of their own.
        if f"(os error {errno.ENOSPC})" in str(seen):
            return os.strerror(errno.ENOSPC)
        seen = seen.__context__
    return None


_CANNOT_WRITE = frozenset(
    [
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        *(errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
    ]
)


def main() -> None:
    """Entry point of the console script."""
    # Threads that wait by spinning cost a multiple of the time as soon as a core is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
