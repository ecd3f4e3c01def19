"""Command lines of the documentation, held against what would read them; nothing is run."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import typer

from elastune.cli import app
from elastune.config import load_recipe

REPO = Path(__file__).resolve().parent.parent
ON_RECIPES = ("run", "sparsify", "space", "train", "search")


def command_lines(text: str) -> list[list[str]]:
    """Return the commands of a shell block as words, comments gone.

    A command goes on after a backslash, and where the next line is indented and begins with an
    option, as the comments of recipes write it.
    """
    joined = re.sub(r"\\\n|\n(?= +--)", " ", text).splitlines()
    words = [shlex.split(line, comments=True) for line in joined]
    return [line for line in words if line]


def check_command(words: list[str]) -> None:
    """Check one command.

    Raises:
        AssertionError: it would be refused, or names something that is not there.
        LookupError: a program that nothing here knows.
    """
    program, *rest = words
    if "-m" in rest and rest[rest.index("-m") + 1 :][:1] == ["elastune"]:
        check_elastune(rest[rest.index("-m") + 2 :])  # under accelerate, torchrun or python
    elif program == "elastune":
        check_elastune(rest)
    elif program == "make":
        check_make(rest)
    elif program == "pip":
        check_pip(rest)
    elif program in ("python", "python3"):
        check_script(rest)
    elif program == "sbatch":
        scripts = [word for word in rest if word.endswith((".sbatch", ".yaml")) and "/" in word]
        assert scripts, f"sbatch {' '.join(rest)} names no script"
        assert [path for path in scripts if not (REPO / path).is_file()] == []
    elif program in ("mkdocs", "optuna-dashboard", "tensorboard", "trackio", "pip-audit"):
        pass  # programs of our own extras, with arguments of their own
    elif words == ["accelerate", "config"]:
        pass
    else:
        raise LookupError(f"{program!r} is no program that the tests know")


def check_elastune(words: list[str]) -> None:
    """Let the real command line parse it, and its recipe take what is set."""
    assert words, "elastune without a command"
    group = typer.main.get_command(app)
    if words[0].startswith("-"):
        assert words[0] in {option for p in group.params for option in p.opts}, words
        return
    command = group.commands.get(words[0])  # type: ignore[attr-defined]
    assert command is not None, f"there is no command {words[0]!r}"
    try:
        context = command.make_context(words[0], list(words[1:]))
    except Exception as error:
        # The class is click's, or that of the copy which typer carries.
        why = getattr(error, "format_message", error.__str__)()
        raise AssertionError(f"elastune {' '.join(words)}: {why}") from error
    source = context.params.get("source")
    if source is not None and Path(source).parts[0] == "recipes":
        assert (REPO / source).is_file(), f"there is no {source}"
        if words[0] in ON_RECIPES:
            load_recipe(REPO / source, context.params.get("set_") or [])


def check_mention(text: str) -> None:
    """Check the command and the options of a line that leaves things out, as prose does."""
    words = [word.strip("[]") for word in text.split()[1:]]
    group = typer.main.get_command(app)
    command = group.commands.get(words[0])  # type: ignore[attr-defined]
    assert command is not None, f"there is no command {words[0]!r}"
    known = {option for parameter in command.params for option in parameter.opts}
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert option in known, f"elastune {words[0]} has no option {option}"


def check_make(words: list[str]) -> None:
    """Find the target in the Makefile."""
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z.-]+):", makefile, re.MULTILINE)
    for word in words:
        assert word in targets or "=" in word, f"the Makefile has no target {word!r}"


def check_pip(words: list[str]) -> None:
    """Find the extras in pyproject.toml."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in words:
        named = re.fullmatch(r"(?:elastune|\.)\[(.+)\]", word)
        for extra in named[1].split(",") if named else ():
            assert extra in project["optional-dependencies"], f"there is no extra {extra!r}"


def check_script(words: list[str]) -> None:
    """Find the script, or the files that are handed to a module, and the script's options."""
    paths = [word for word in words if word.endswith(".py")]
    assert paths, f"python {' '.join(words)} names no script"
    for path in paths:
        assert (REPO / path).is_file(), f"there is no {path}"
    if words[0] != "-m":
        text = (REPO / words[0]).read_text(encoding="utf-8")
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert f'"{option}"' in text, f"{words[0]} has no option {option}"
