"""Fuzz: the files of a run directory, the records of exports, and the names of repositories."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fuzzing import NASTY_TEXT, Outcomes, changed, damaged, json_bytes, snapshot, texts_near, tiers
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file
from test_report_search import make_searched
from tiny_run import save_tiny_model

from elastune.artifacts import RunDirectory
from elastune.errors import ElastuneError
from elastune.export import check_export
from elastune.export.profiles import runtime_of
from elastune.export.runtimes import RUNTIME_FORMATS
from elastune.files import file_digest
from elastune.push import complete_export, push
from elastune.report import find_runs, load_run, runs_table, write_report
from elastune.report.runs import differences_table, read_run


def lines_near(valid: str) -> Any:
    """Return JSON lines with changed fields, or their bytes damaged."""
    rows = [json.loads(line) for line in valid.splitlines()]
    spelt = changed(rows, most=3).map(
        lambda made: b"\n".join(map(json_bytes, made)) if isinstance(made, list) else b"{}"
    )
    return st.one_of(spelt, damaged(valid.encode()))


def yaml_near(valid: str) -> Any:
    spelt = changed(yaml.safe_load(valid)).map(
        lambda made: yaml.safe_dump(made).encode("utf-8", "surrogatepass")
    )
    return st.one_of(spelt, damaged(valid.encode()))


@tiers(12, 0.3)
def test_any_file_of_a_run_is_shown_or_refused_and_the_page_alone_is_written(
    tmp_path: Path, tier: Any
) -> None:
    outcomes = Outcomes()
    run = make_searched(tmp_path / "run")
    files = sorted(p for p in run.rglob("*") if p.suffix in (".json", ".jsonl", ".yaml"))
    near = {".json": texts_near, ".jsonl": lines_near, ".yaml": yaml_near}
    kept = {file: file.read_bytes() for file in files}
    strategies = [st.tuples(st.just(f), near[f.suffix](f.read_text())) for f in files]
    page = run / "report.html"
    outcomes.of(lambda: write_report(run))

    @tier
    @given(st.one_of(*strategies))
    def check(change: tuple[Path, bytes]) -> None:
        file, content = change
        before, shown = snapshot(tmp_path, page, file), page.read_bytes()
        file.write_bytes(content)
        directory = RunDirectory(run)
        try:
            found = outcomes.of(lambda: write_report(run))
            assert not isinstance(found, ElastuneError) or page.read_bytes() == shown
            outcomes.of(lambda: load_run(run))
            for read in (directory.recipe, directory.manifest, directory.metrics):
                outcomes.of(read)
            rows = [read_run(folder) for folder in find_runs([tmp_path])]
            Console(file=None, quiet=True).print(
                runs_table(rows), differences_table([*rows, {**rows[0]}])
            )
            assert snapshot(tmp_path, page, file) == before
        finally:
            file.write_bytes(kept[file])

    check()
    outcomes.both()


# --- exports --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What passes for exports: records beside a model."""
    home = tmp_path_factory.mktemp("exports")
    for name in ("hf", "onnx", "merged-sparse", "peft"):
        folder = save_tiny_model(home / name)
        (folder / "README.md").write_text("# mine")
        save_file(
            {"in.input_ids": torch.zeros(1, 2), "logits": torch.zeros(1, 2, 3)},
            folder / "reference.safetensors",
        )
    digest = {"config.json": file_digest(home / "hf" / "config.json")}
    hf = {"format": "hf", "runtime": "transformers", "auto_class": "AutoModelForCausalLM"}
    hf |= {"base": None, "outputs": ["logits"], "sha256": digest}
    chosen = RUNTIME_FORMATS["onnx"]
    onnx = {"format": "onnx", "runtime": chosen.runtime, "file": chosen.file, "sha256": {}}
    onnx |= {
        "runtime_options": dict(chosen.runtime_options),
        "weights": "float32",
        "generates": True,
    }
    onnx |= {
        "inputs": ["input_ids"],
        "outputs": ["logits"],
        "cache": [],
        "cases": [{}],
        "prompts": [],
    }
    onnx |= {"tolerance": chosen.tolerances["float32"]._asdict()}
    sparse = {"format": "merged-sparse", "auto_class": "AutoModelForCausalLM", "sha256": digest}
    sparse |= {"tensors": {"lm_head.weight": {"zeros": 3}}, "total": {"zeros": 3, "weights": 9}}
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(home / "hf"), "r": 4}
    (home / "hf" / "export.json").write_text(json.dumps(hf))
    (home / "onnx" / "export.json").write_text(json.dumps(onnx))
    (home / "onnx" / chosen.file).write_bytes(b"onnx")
    (home / "merged-sparse" / "sparsity.json").write_text(json.dumps(sparse))
    (home / "peft" / "adapter_config.json").write_text(json.dumps(adapter))
    save_file({"x.lora_A.weight": torch.zeros(1)}, home / "peft" / "adapter_model.safetensors")
    return home


def answering(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """Stand for a runtime that computes what was recorded."""
    out = Path(command[-1])
    if out.suffix == ".json":
        out.write_text('{"lm_head.weight": 3}')
    else:
        found = {name: torch.zeros(1, 2, 3) for name in ("logits", "case0.logits")}
        save_file(found, out)
    return subprocess.CompletedProcess(list(command), 0, "", "")


@tiers(30, 0.5)
def test_any_record_of_an_export_is_checked_or_refused_and_nothing_is_written(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: Any
) -> None:
    monkeypatch.setattr("subprocess.run", answering)
    outcomes = Outcomes()
    home = tmp_path / "home"
    shutil.copytree(exports, home)
    names = ("hf/export.json", "onnx/export.json", "merged-sparse/sparsity.json")
    names += ("peft/adapter_config.json", "hf/config.json", "merged-sparse/config.json")
    strategies = [st.tuples(st.just(name), texts_near((home / name).read_text())) for name in names]

    @tier
    @given(st.one_of(*strategies))
    def check(change: tuple[str, bytes]) -> None:
        name, content = change
        file, folder = home / name, (home / name).parent
        kept = file.read_bytes()
        file.write_bytes(content)
        before = snapshot(home)
        try:
            for use in (check_export, complete_export, runtime_of):
                outcomes.of(lambda use=use: use(folder))
            assert snapshot(home) == before
        finally:
            file.write_bytes(kept)

    check()
    outcomes.both()


@tiers(40, 0.3)
def test_any_name_of_a_repository_is_refused_or_asked_for(
    exports: Path, monkeypatch: pytest.MonkeyPatch, tier: Any
) -> None:
    outcomes = Outcomes()
    names = st.one_of(
        st.sampled_from(NASTY_TEXT),
        st.text(alphabet="ab./-_~ A0\n%?#", max_size=12),
        st.builds("{}/{}".format, st.text("ab.-_", max_size=4), st.text("ab.-_", max_size=110)),
    )

    @tier
    @given(names, st.one_of(st.none(), st.text(max_size=8)))
    def check(name: str, message: str | None) -> None:
        # Nobody listens there: a name that is taken ends in "cannot be reached".
        found = outcomes.of(
            lambda: push(
                exports / "hf", name, message=message, token="t", endpoint="http://127.0.0.1:9"
            )
        )
        assert isinstance(found, ElastuneError)

    check()
