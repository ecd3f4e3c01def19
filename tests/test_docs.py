"""The site builds without a broken link, and no line of code on it is out of date."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from docs_blocks import PAGES, REPO, Block, all_blocks, blocks, spans
from docs_commands import check_command, check_mention, command_lines
from docs_names import add_needs, small_llama

import elastune as et
from elastune.config import make_recipe
from elastune.export import EXPORT_FORMATS
from elastune.search import ALGORITHMS
from elastune.sparsify import METHODS

#: Blocks of a language that stand for no code at all.
PLAIN = ("text",)
#: page -> how many of its blocks say that nothing checks them. A new one is to be meant.
NOT_RUN = {"docs/exports.md": 2, "docs/search.md": 1}

SHELL = all_blocks("bash", "sh")
YAML = all_blocks("yaml")
RECIPES = sorted((REPO / "recipes").glob("*.yaml"))
PYTHON_PAGES = [page for page in PAGES if any(b.language == "python" for b in blocks(page))]


@pytest.fixture
def page_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for what a page writes; built-in models are small random ones there."""

    def load_model(name: str, **_: Any) -> Any:
        assert name in ("smollm2-135m", "minilm-l6"), f"{name} would come from elsewhere"
        return small_llama()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(et, "load_model", load_model)
    # What a page registers goes again: other tests run over the same tables.
    with patch.dict(ALGORITHMS), patch.dict(EXPORT_FORMATS), patch.dict(METHODS):
        yield tmp_path


def test_the_site_builds_and_no_link_on_it_is_broken(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=REPO,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    loaded = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert [url for url in loaded if url.startswith(("http", "//"))] == []


def test_the_api_page_has_every_promised_name() -> None:
    page = (REPO / "docs/api.md").read_text(encoding="utf-8")
    shown = [line.rpartition(".")[2] for line in page.splitlines() if line.startswith(":::")]
    assert sorted(shown) == sorted(set(et.__all__) - {"__version__"})


def test_every_recipe_is_on_the_page_of_recipes() -> None:
    page = (REPO / "docs/recipes.md").read_text(encoding="utf-8")
    assert [path.name for path in RECIPES if f"`recipes/{path.name}`" not in page] == []


def test_every_page_is_in_the_navigation() -> None:
    text = (REPO / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")]
    assert [page for page in pages if f": {page}\n" not in text] == []


def test_every_block_is_of_a_kind_that_is_checked_or_says_why_not() -> None:
    kinds = {"python", "bash", "sh", "yaml", "json", *PLAIN}
    assert [str(block) for block in all_blocks() if block.language not in kinds] == []
    not_run = [block for block in all_blocks() if block.reason is not None]
    assert Counter(block.page for block in not_run) == NOT_RUN
    assert all(len(block.reason or "") > 10 for block in not_run)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_of_the_page_runs(page: str, page_folder: Path) -> None:
    names: dict[str, Any] = {"et": et}
    for block in blocks(page):
        if block.language == "python" and block.reason is None:
            add_needs(block.said("needs") or "", names)
            _run(block, names)


def _run(block: Block, names: dict[str, Any]) -> None:
    """Run a block; a traceback has the line of the page."""
    text = "\n" * (block.line - 1) + block.text
    exec(compile(text, str(REPO / block.page), "exec"), names)


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_are_those_of_the_command_line(block: Block) -> None:
    if block.reason is not None:
        return  # counted above
    for words in command_lines(block.text):
        check_command(words)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_running_text_have_these_options(page: str) -> None:
    for text in spans(page):
        if text.startswith("elastune ") and text.split()[1].isalpha():
            check_mention(text)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_commands_in_the_head_of_a_recipe_are_valid(recipe: Path) -> None:
    head = [
        line.removeprefix("#")
        for line in recipe.read_text(encoding="utf-8").splitlines()
        if line.startswith(("#   elastune", "#     --"))
    ]
    assert head, "it does not say how it is run"
    for words in command_lines("\n".join(head)):
        check_command(words)


@pytest.mark.parametrize("block", YAML, ids=str)
def test_fragments_of_recipes_are_valid(block: Block) -> None:
    around = yaml.safe_load(block.said("within") or "{}")
    for fragment in yaml.safe_load_all(block.text):
        recipe = {"model": "minilm-l6", "task": "sst2"} | around | fragment
        make_recipe(recipe, str(block))


@pytest.mark.parametrize("block", all_blocks("json"), ids=str)
def test_json_is_json(block: Block) -> None:
    text = block.text.strip()
    json.loads(text if text.startswith(("{", "[")) else f"{{{text}}}")


def test_a_command_that_is_not_there_is_found_out() -> None:
    wrong = (
        "elastune fly recipes/shears.yaml",
        "elastune run recipes/shears.yaml --sett a=b",
        "elastune run recipes/none.yaml",
        "make everything",
        "pip install 'elastune[everything]'",
        "python benchmarks/none.py",
        "python benchmarks/equality.py --none",
    )
    for line in wrong:
        with pytest.raises(AssertionError):
            check_command(command_lines(line)[0])
    with pytest.raises(et.ElastuneError, match="unknown key"):
        check_command(command_lines("elastune run recipes/shears.yaml --set train.steps=1")[0])


def test_a_comment_that_belongs_to_no_block_is_found_out() -> None:
    with pytest.raises(ValueError, match="belongs to no block"):
        blocks("page", "<!-- snippet: not run: for fun -->\nText.\n")
    with pytest.raises(ValueError, match="a comment is one of"):
        blocks("page", "<!-- snippet: skip -->\n```python\n```\n")
