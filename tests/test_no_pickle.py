"""No source reads pickles, runs text as code, or asks a shell: every file is walked."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SOURCES = sorted((REPO / "elastune").rglob("*.py"))
SCRIPTS = sorted(p for name in ("benchmarks", "examples") for p in (REPO / name).rglob("*.py"))

PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
RUNNERS = {"eval", "exec", "compile", "__import__"}

#: What is found all the same, and why it may be.
JUSTIFIED = {
    # A .pt2 archive can hold code; `elastune.export.foreign` lets nothing come here but what was
    # written in the same call, or what its owner vouched for with --trust-remote-code.
    ("elastune/export/fresh_run.py", "torch.export.load"),
    # Announces modules of transformers itself, when they are loaded.
    ("elastune/autoload.py", "exec_module"),
    # Names that are promised, in a table of the file itself.
    ("elastune/__init__.py", "import_module of a computed name"),
    # Names of this package's own functions, from process 0 of the same training, and from a caller.
    ("elastune/processes.py", "import_module of a computed name"),
    ("elastune/memory.py", "import_module of a computed name"),
    # A runtime that was compared with the list of them before, and a module of transformers.
    ("elastune/export/profile_run.py", "import_module of a computed name"),
    # configuration_decilm.py, compared with what elastune writes before this script is started.
    ("elastune/export/nemotron_nas_run.py", "exec_module"),
    ("elastune/export/nemotron_nas_run.py", "spec_from_file_location"),
    ("elastune/export/nemotron_nas_run.py", "trust_remote_code is not False"),
    # Asked for by the option itself, which is off unless a user sets it.
    ("elastune/export/checkpoint_run.py", "trust_remote_code is not False"),
    ("elastune/export/profile_run.py", "trust_remote_code is not False"),
    ("elastune/models/load.py", "trust_remote_code is not False"),
}


def dotted(node: ast.expr) -> str:
    """Return ``a.b.c`` of a name; "?" stands for what is no name, as in ``?.b`` of ``a().b``."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((k.value for k in call.keywords if k.arg == name), None)


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def dangers(tree: ast.AST) -> Iterator[str]:
    """Yield what in a file could run code that comes from data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            for name in names:
                if name.partition(".")[0] in PICKLERS:
                    yield f"import {name}"
        if isinstance(node, ast.Call):
            yield from dangers_of_call(node)


def dangers_of_call(call: ast.Call) -> Iterator[str]:
    name = dotted(call.func)
    last = name.rpartition(".")[2]
    if name in RUNNERS or name in ("os.system", "os.popen", "builtins.eval", "builtins.exec"):
        yield name
    if name == "torch.load" and not is_constant(keyword(call, "weights_only"), True):
        yield "torch.load without weights_only=True"
    if name == "torch.export.load":
        yield name
    if last in ("exec_module", "spec_from_file_location", "run_path"):
        yield last
    if last == "import_module" and not isinstance(call.args[0], ast.Constant):
        yield "import_module of a computed name"
    if last in ("read_pickle", "load_pickle", "unpickle", "loads_pickle"):
        yield name
    if name == "yaml.load":
        loader = keyword(call, "Loader") or (call.args[1] if len(call.args) > 1 else None)
        if loader is None or dotted(loader) not in ("yaml.SafeLoader", "_Loader"):
            yield "yaml.load without a SafeLoader"
    if last in ("unsafe_load", "full_load", "unsafe_load_all", "full_load_all"):
        yield name
    if not is_constant(keyword(call, "shell") or ast.Constant(False), False):
        yield f"{name} with shell"
    if keyword(call, "allow_pickle") is not None and not is_constant(
        keyword(call, "allow_pickle"), False
    ):
        yield f"{name} with allow_pickle"
    # Without the keyword transformers asks at the terminal, and takes a "y" from a pipe.
    is_auto = last == "from_pretrained" and ".".join(name.split(".")[:-1]).lower() != "peftmodel"
    if is_auto and last_two(name) != "Embedding.from_pretrained":
        trust = keyword(call, "trust_remote_code")
        given = {k.arg for k in call.keywords}
        if not is_constant(trust, False) and not (trust is None and None in given):
            yield "trust_remote_code is not False"


def last_two(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def found_in(path: Path) -> set[tuple[str, str]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {(path.relative_to(REPO).as_posix(), danger) for danger in dangers(tree)}


def test_no_source_unpickles_evaluates_or_trusts_but_the_justified() -> None:
    found = set().union(*map(found_in, SOURCES))
    assert found - JUSTIFIED == set()
    assert JUSTIFIED - found == set(), "no longer there: take them out of the list"


def test_benchmarks_and_examples_read_no_pickles_and_ask_no_shell() -> None:
    found = {danger for path in SCRIPTS for _, danger in found_in(path)}
    assert found <= {"trust_remote_code is not False"}


def test_our_yaml_loader_is_a_safe_one() -> None:
    import yaml

    from elastune import yaml_text

    assert issubclass(yaml_text._Loader, yaml.SafeLoader)
    with pytest.raises(yaml.YAMLError):
        yaml_text.parse_yaml("!!python/object/apply:os.system [echo]")


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from dill import loads", "import joblib.numpy_pickle", "import shelve"),
        *("eval('1')", "exec(text)", "os.system('ls')", "torch.load(path)"),
        *("torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)"),
        *("yaml.load(text)", "yaml.load(text, yaml.Loader)", "yaml.unsafe_load(text)"),
        *("subprocess.run(command, shell=True)", "np.load(path, allow_pickle=True)"),
        *("pd.read_pickle(path)", "torch.export.load(path)", "AutoModel.from_pretrained(name)"),
        "AutoConfig.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_walk_sees_each_of_them(line: str) -> None:
    assert list(dangers(ast.parse(line)))


def test_the_walk_lets_safe_ones_be() -> None:
    safe = (
        "torch.load(path, weights_only=True)\nyaml.load(text, yaml.SafeLoader)\n"
        "subprocess.run(command)\nnp.load(path)\nmodel.eval()\n"
        "AutoModel.from_pretrained(name, trust_remote_code=False)"
    )
    assert list(dangers(ast.parse(safe))) == []
