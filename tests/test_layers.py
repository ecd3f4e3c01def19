"""The layout: who may import whom, who may print, and what no file is called."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "elastune"

#: From the ground up. A file imports from layers below its own and from its own folder, only.
LAYERS: list[set[str]] = [
    {"errors", "version", "progress", "yaml_text", "packing", "metrics", "autoload"}
    | {"name_patterns", "json_text"},
    {"files", "sections", "space", "tasks", "linears", "decoding", "console", "statistics"}
    | {"race", "processes"},
    {"seals"},
    {"allocate"},
    {"config", "elastic", "state", "search", "leaks", "report", "predictions"},
    {
        "models",
        "hidden_states",
        "inputs",
        "sampling",
        "generate",
        "whole_model",
        "step_log",
        "length_groups",
    },
    {"data", "calibration_text", "structure", "artifacts", "macs", "generated"}
    | {"drop_blocks", "tokenizer_file", "trained"},
    {
        "build_space",
        "build_structure",
        "supernet",
        "shards",
        "zero",
        "calibrate",
        "losses",
        "likelihood",
        "features",
    }
    | {"slice_counts", "merged"},
    {"block_choices"},
    {"cost", "extract", "memory", "choices", "heads", "reorder"},
    {"subnetwork", "latency", "importance", "predict", "harness_model", "harness_results"}
    | {"prefix_reuse"},
    {"export", "latency_table", "sparsify", "evaluate", "harness", "vocabulary", "outcomes"}
    | {"choice_slopes"},
    {"quantise", "stream", "merge_report", "estimate_losses"},
    {"objective", "block_costs", "teacher", "build_sparsity", "adapters", "push"} | {"doctor"},
    {"threshold", "train_step", "trainer_arguments"},
    {"generate_space", "train", "rank_in_rounds"},
    {"finetune", "learn_scores"},
    {"run"},
    {"base_stage"},
    {"stages"},
    {"budgets", "prepare"},
    {"search_costs", "search_limits", "search_workers"},
    {"search_stage"},
    {"choose"},
    {"alone", "export_run", "targets"},
    {"check", "measure"},
    {"measure_harness", "methods"},
    {"fit_request"},
    {"fit_recipe"},
    {"fit_plan"},
    {"fit_facts"},
    {"fit"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

#: These start at once, or work without torch: it must not be imported before it is needed.
WITHOUT_TORCH = (
    *(
        "__init__",
        "__main__",
        "cli",
        "config",
        "sections",
        "errors",
        "space",
        "search",
        "artifacts",
    ),
    *(
        "inputs",
        "files",
        "yaml_text",
        "progress",
        "report",
        "metrics",
        "statistics",
        "tasks",
        "autoload",
    ),
    "allocate",
)
HEAVY = ("torch", "transformers", "peft", "accelerate", "safetensors", "datasets")

FILES = sorted(PACKAGE.rglob("*.py"))


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Yield the full names of imported modules."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs when the module is imported: no function bodies, no TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from at_import(child)


def test_every_file_stands_in_one_layer() -> None:
    found = {layer(path) for path in FILES}
    assert found == set(LEVEL)
    assert sum(map(len, LAYERS)) == len(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    own = layer(path)
    for name in imported(ast.walk(tree(path))):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top != "elastune" or target not in LEVEL or target == own:
            continue
        assert LEVEL[target] < LEVEL[own], f"{own} imports {name}, which is not below it"


def test_what_must_start_at_once_imports_no_torch() -> None:
    wrong = []
    for path in FILES:
        if layer(path) in WITHOUT_TORCH:
            names = imported(at_import(tree(path)))
            heavy = {name.partition(".")[0] for name in names} & set(HEAVY)
            wrong += [f"{path.relative_to(PACKAGE)} imports {name}" for name in sorted(heavy)]
    assert wrong == []


def test_only_the_command_line_prints_and_exits() -> None:
    wrong = []
    for path in FILES:
        if layer(path) in ("cli", "console"):
            continue
        for node in ast.walk(tree(path)):
            text = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if text in ("print", "exit", "sys.exit", "sys.stdout.write", "sys.stderr.write"):
                wrong.append(f"{path.relative_to(PACKAGE)} line {node.lineno}: {text}")  # type: ignore[attr-defined]
    assert wrong == []


def test_no_file_is_a_drawer_for_anything() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc", "base_utils"}
    parts = {part for path in FILES for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert parts & drawers == set()


def test_files_and_functions_stay_short() -> None:
    wrong = []
    for path in FILES:
        length = len(path.read_text(encoding="utf-8").splitlines())
        if length > 400:
            wrong.append(f"{path.relative_to(PACKAGE)} has {length} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (node.end_lineno or 0) - (body[0].lineno if body else node.lineno) + 1
                if lines > 50:
                    wrong.append(f"{path.name}: {node.name} has {lines} lines")
    assert wrong == []


def test_only_the_models_folder_knows_families() -> None:
    wrong = []
    for path in FILES:
        if layer(path) in ("models", "cli", "doctor"):
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Constant) and node.value in ("q_proj", "down_proj", "mlp"):
                wrong.append(f"{path.name} line {node.lineno}: {node.value}")
    assert wrong == []
