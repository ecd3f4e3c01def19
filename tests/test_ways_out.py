"""Every error says the way out: in `try_`, or where the message itself tells what is allowed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import elastune.errors as errors

PACKAGE = Path(__file__).resolve().parent.parent / "elastune"
CLASSES = {name for name in vars(errors) if isinstance(vars(errors)[name], type)}
#: Words of a message that tells what is allowed; a recipe's are one line for each setting.
TOLD = re.compile(
    r"\bmust\b|allowed|known are|known:|\bneeds? |at least|at most|above 0|0 to |between|within"
    r"|outside"
    r"|cannot be negative|one of|such as|did you mean|nearest\(|owner/name|a part of|is a list"
    r"|not of the form|is not like|named like|whole numbers|this (?:model|run) has|it has|they have"
    r"|trials have|limits are on|losses of|give one|from 0 on|join\(lines\)"
)
#: Messages that do neither: what is given is the mistake, and the call is the caller's own.
MOST = 15


def messages() -> Iterator[tuple[str, str]]:
    """Yield the place and the message of every error that has no `try_`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            options = {keyword.arg for keyword in node.keywords}
            if name in CLASSES and not options & {"try_", None}:
                place = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                yield place, ast.unparse(node.args[0])


def test_errors_without_a_way_out_are_few_and_become_fewer() -> None:
    silent = [f"{place}: {message}" for place, message in messages() if not TOLD.search(message)]
    assert len(silent) <= MOST, "\n".join(silent)


def test_nothing_the_command_line_refuses_lacks_a_way_out() -> None:
    silent = [
        f"{place}: {message}"
        for place, message in messages()
        if place.startswith(("cli/", "config.py", "check.py", "targets.py", "fit"))
        and not TOLD.search(message)
    ]
    assert silent == []


def test_a_raise_without_a_way_out_is_found() -> None:
    assert not TOLD.search("f'{name} is wrong'")
    assert TOLD.search("f'{name} must be a number'")
