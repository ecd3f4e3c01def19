"""What the shell offers for tab, and that asking for it does not wait for torch."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from docs_commands import check_elastune
from typer.testing import CliRunner

from elastune.cli import app, completion
from elastune.config import Recipe, apply_override
from elastune.export.registry import EXPORT_FORMATS
from elastune.models.builtin import BUILTIN
from elastune.search import ALGORITHMS
from elastune.sections.search import SearchConfig
from elastune.tasks import TASKS

HEAVY = {"torch", "transformers", "optuna", "scipy"}
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two recipes, a run with an export, and what is none of them."""
    for name in ("recipes/one.yaml", "recipes/two.yaml", "recipes/notes.md", ".hidden/x.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("recipe.yaml", "subnets/best-50/config.json", "export/gguf/export.json"):
        (tmp_path / "runs/mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs/mine" / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def request(*words: str) -> dict[str, str]:
    """What bash puts into the environment to ask what may stand in place of the last word."""
    return {
        "_ELASTUNE_COMPLETE": "complete_bash",
        "COMP_WORDS": shlex.join(["elastune", *words[:-1]]) + f" {words[-1]}",
        "COMP_CWORD": str(len(words)),
    }


def run(*arguments: str, **environment: str) -> str:
    result = CliRunner().invoke(app, arguments, prog_name="elastune", env=environment)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", ""], ["recipes/one.yaml", "recipes/two.yaml", "runs/mine"]),
        (["run", "recipes/o"], ["recipes/one.yaml"]),
        (["report", "ru"], ["runs/mine"]),
        (["run", "recipes/one.yaml", "--set", "train.max_s"], ["train.max_steps="]),
        (["search", "runs/mine", "--algorithm", "n"], ["nsga2"]),
        (["export", "runs/mine", "--format", "openv"], ["openvino"]),
        (["export", "runs/mine", "--config", "best-"], ["best-50"]),
        (["check", "runs/"], ["runs/mine/export/gguf"]),
        (["fit", "--task", "gsm"], ["gsm8k"]),
        (["fit", "--model", "smol"], ["smollm2-135m"]),
    ],
)
def test_the_shell_is_offered(folder: Path, words: list[str], expected: list[str]) -> None:
    assert run(**request(*words)).split() == expected


@pytest.mark.parametrize("words", [["run", "x", "--set", "task"], ["fit", "--task", ""]])
def test_a_request_does_not_wait_for_torch(folder: Path, words: list[str]) -> None:
    code = (
        "import sys, atexit; sys.argv[0] = 'elastune'\n"
        f"atexit.register(lambda: print(*{HEAVY!r} & {{*sys.modules}}))\n"
        "from elastune.cli import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | request(*words),
        text=True,
        capture_output=True,
    )
    assert done.stderr == ""
    assert done.stdout
    assert not HEAVY & set(done.stdout.split())


def test_what_is_spelt_for_the_shell_is_what_the_library_has() -> None:
    assert list(completion.FORMATS) == list(EXPORT_FORMATS)
    for name, made in EXPORT_FORMATS.items():
        assert completion.FORMATS[name] == made.weights[1:]  # the first is what a bare name means
    assert tuple(BUILTIN) == completion.MODELS
    assert set(completion.algorithms("")) == set(ALGORITHMS)
    assert completion.tasks("") == list(TASKS)


def test_every_setting_offered_is_one_of_a_recipe() -> None:
    names = [text.removesuffix("=") for text in completion.settings("")]
    assert len(names) == len(set(names)) > 100
    tops = {name.partition(".")[0] for name in names}
    assert tops == set(Recipe.model_fields)
    for text in completion.settings("search.algorithm="):
        data: dict[str, object] = {}
        apply_override(data, text)
        SearchConfig.model_validate(data["search"])


def test_formats_go_on_after_a_comma_and_a_colon() -> None:
    assert completion.formats("hf,onn") == ["hf,onnx"]
    assert completion.formats("gguf:q8") == ["gguf:q8_0"]
    assert completion.formats("hf,gguf:q4") == ["hf,gguf:q4_0"]
    assert "openvino:int8" in completion.formats("openvino")


def test_a_folder_that_cannot_be_read_offers_nothing(tmp_path: Path) -> None:
    assert completion.recipes_and_runs(f"{tmp_path}/none/") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_is_printed(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The shell is told by name where it cannot be seen from the process that asks.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert "_ELASTUNE_COMPLETE" in run("--show-completion", shell)


def test_completion_is_installed_where_the_shell_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    run("--install-completion", "bash", HOME=str(tmp_path))
    (line,) = (tmp_path / ".bashrc").read_text().strip().splitlines()
    script = Path(shlex.split(line)[1])
    assert script.is_relative_to(tmp_path)
    assert "_ELASTUNE_COMPLETE=complete_bash" in script.read_text()


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if not command.hidden])
def test_the_help_of_a_command_ends_with_an_example_that_it_takes(name: str) -> None:
    example = COMMANDS[name].epilog.removeprefix("Example: ")
    program, *words = shlex.split(example)
    assert program == "elastune"
    assert words[0] == name
    check_elastune(words)
