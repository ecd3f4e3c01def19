"""The commands export and check: what they write, where, and that refusing leaves no trace."""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_export_sparse import sparse_net
from tiny_llama import tiny_llama, tiny_tokenizer
from tiny_run import cli, save_recipe, save_sums, save_tiny_model, tiny_recipe
from transformers import AutoModelForCausalLM

import elastune
from elastune.artifacts import RunDirectory
from elastune.errors import ElastuneError
from elastune.export import EXPORT_FORMATS, check_export, export_model
from elastune.progress import Reporter
from elastune.report import write_report
from elastune.run import Run
from elastune.subnetwork import extract_model

pytest.importorskip("openvino")
pytest.importorskip("xllamacpp")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = torch.arange(3, 40)[None]
STRUCTURE: dict[str, Any] = {
    "ffn": [1.0, 0.67, 0.34],
    "heads": [1.0, 0.5],
    "round_to": 8,
    "calibration": {"source": "task", "n_sequences": 4, "length": 16},
}
FORMATS = ("gguf:q8_0", "openvino", "hf-padded")


def trained(folder: Path, **sections: Any) -> Path:
    """Return a run that was trained, and not searched."""
    model, data = save_tiny_model(folder / "model"), save_sums(folder / "data")
    recipe = tiny_recipe(model, data, train={"max_steps": 2}, baselines=[], **sections)
    cli("train", save_recipe(folder / "tiny.yaml", recipe), "--out", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose sub-networks are smaller models."""
    return trained(tmp_path_factory.mktemp("cuts"), method="lonas", structure=STRUCTURE)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose sub-networks are adapters."""
    return trained(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def exported(cuts: Path) -> dict[str, Any]:
    """What the command says of a sub-network in several formats."""
    result = cli("export", cuts, "--format", ",".join(FORMATS), "--json")
    assert "exporting heuristic" in result.stderr
    found = json.loads(result.stdout)
    assert found["failed"] == []
    return {row["format"]: row for row in found["exports"]}


def activated(run: Path, name: str) -> torch.Tensor:
    """Return logits of a sub-network inside the super-network."""
    directory = RunDirectory(run)
    net = Run(directory, directory.recipe(), Reporter()).load_supernet()
    config = getattr(net.space, name)()
    with net.active(config), torch.no_grad():
        found: torch.Tensor = net.model.eval()(IDS).logits
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def traces(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- what is written ----------------------------------------------------------------------------


def test_each_format_has_its_folder_in_the_run_and_a_card_with_what_the_run_did(
    cuts: Path, exported: dict[str, Any]
) -> None:
    folders = {"gguf": "gguf-q8_0", "openvino": "openvino", "hf-padded": "hf-padded"}
    assert sorted(p.name for p in (cuts / "export").iterdir()) == sorted(folders.values())
    for name, folder in folders.items():
        row = exported[name]
        assert row["folder"] == str(cuts / "export" / folder)
        found = [p for p in Path(row["folder"]).rglob("*") if p.is_file()]
        assert len(found) == len(row["files"])
        shipped = [p for p in found if p.name != "reference.safetensors"]
        assert row["n_bytes"] == sum(p.stat().st_size for p in shipped)
        card = (Path(row["folder"]) / "README.md").read_text()
        assert card.splitlines().count(f"# {folder}") == 1
        assert "- **method**: lonas" in card
        assert "licence of the base" in card


def test_the_report_lists_the_exports_and_forgets_those_that_are_gone(
    cuts: Path, exported: dict[str, Any], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(cuts, tmp_path / "run"))
    page = write_report(run).read_text()
    section = page.partition("<h2>Exports</h2>")[2].partition("</section>")[0]
    for row in exported.values():
        folder = Path(row["folder"])
        assert f"<code>{folder.relative_to(cuts)}</code>" in section
        assert f"{row['largest_difference']:.1e}" in section
        assert row["loads_with"] in html.unescape(section)
        shutil.rmtree(run / folder.relative_to(cuts))
    assert "<h2>Exports</h2>" not in write_report(run).read_text()


def test_what_is_exported_is_the_subnetwork_with_its_adapter(
    cuts: Path, exported: dict[str, Any]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(exported["hf-padded"]["folder"])
    torch.testing.assert_close(logits(plain), activated(cuts, "heuristic"), atol=1e-4, rtol=1e-4)


def test_one_that_is_named_goes_to_a_folder_of_that_name(cuts: Path, tmp_path: Path) -> None:
    run = shutil.copytree(cuts, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    result = cli("export", run, "-f", "gguf", "-f", "gguf", "--config", "smallest")
    assert traces(run / "export")[:2] == ["smallest", "smallest/gguf"]
    assert "llama.cpp" in result.stdout
    assert str(run / "export" / "smallest" / "gguf") in result.stdout.replace("\n", "")


def test_an_adapter_computes_on_its_base_what_the_super_network_does(ranks: Path) -> None:
    (row,) = json.loads(cli("export", ranks, "-f", "peft", "--json").stdout)["exports"]
    base = AutoModelForCausalLM.from_pretrained(ranks / "base")
    model = PeftModel.from_pretrained(base, row["folder"])
    torch.testing.assert_close(logits(model), activated(ranks, "heuristic"), atol=1e-4, rtol=1e-4)
    (checked,) = json.loads(cli("check", row["folder"], "--json").stdout)["checks"]
    assert (checked["ok"], checked["format"]) == (True, "peft")


def test_a_folder_with_an_adapter_is_exported_merged(ranks: Path, tmp_path: Path) -> None:
    cli("extract", ranks, "--config", "largest")
    result = cli("export", ranks / "subnets" / "largest", "-f", "gguf", "-o", tmp_path, "--json")
    assert json.loads(result.stdout)["exports"][0]["largest_difference"] < 1e-3
    # The reference beside it is of base and adapter, not of the base alone.
    stored = load_file(tmp_path / "gguf" / "reference.safetensors")
    prompt, best = stored["prompt0.input_ids"], stored["prompt0.ids"][0, 0]
    directory = RunDirectory(ranks)
    net = Run(directory, directory.recipe(), Reporter()).load_supernet()
    with net.active(net.space.largest()), torch.no_grad():
        expected = net.model.eval()(prompt[None]).logits[0, -1].log_softmax(-1)
    assert int(best) == int(expected.argmax())
    assert float(stored["prompt0.logprobs"][0, 0]) == pytest.approx(float(expected.max()), abs=1e-3)


def test_zeros_of_a_merge_are_counted_against_the_base(ranks: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight[weight.abs() < 0.2] = 0
    elastune.save_model(model, tokenizer, tmp_path / "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1.1
    elastune.save_model(model, tokenizer, tmp_path / "merged")
    n_zeros = sum(int((w == 0).sum()) for w in model.parameters() if w.dim() == 2)
    source = [tmp_path / "merged", "-f", "merged-sparse", "-o", tmp_path]
    refused = cli("export", *source, code=2)
    assert "try: base=" in refused.stderr
    cli("export", *source, "--base", tmp_path / "base")
    (row,) = json.loads(cli("check", tmp_path / "merged-sparse", "--json").stdout)["checks"]
    assert row["zeros"] == n_zeros > 0
    # A plain LoRA fills the zeros of its base.
    lost = cli("export", ranks, "-f", "merged-sparse", "-o", tmp_path / "lost", code=2)
    assert "the merge lost" in lost.stderr
    assert traces(tmp_path / "lost") == []


# --- what cannot be written ---------------------------------------------------------------------


def test_a_format_that_fails_keeps_no_other_from_being_written(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model")
    result = cli("export", source, "-f", "peft,gguf", "-o", tmp_path / "out", "--json", code=2)
    found = json.loads(result.stdout)
    assert [row["format"] for row in found["exports"]] == ["gguf"]
    assert [row["format"] for row in found["failed"]] == ["peft"]
    assert "1 of 2 formats could not be written. peft: " in result.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["gguf"]


def test_bad_input_is_refused_before_anything_is_written(cuts: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    own = tmp_path / "own" / "gguf"
    own.mkdir(parents=True)
    (own / "thesis.tex").write_text("years of work")
    before = traces(tmp_path)
    cases: dict[str, list[Any]] = {
        "unknown format 'onx' (did you mean 'onnx'?)": [model, "-f", "gguf,onx", "-o", tmp_path],
        "known are float32, int8, int4": [model, "-f", "openvino:int3", "-o", tmp_path],
        "it must be said where to": [model, "-f", "gguf"],
        "is no export, so it is not replaced": [model, "-f", "gguf", "-o", tmp_path / "own"],
        "there is no folder": [tmp_path / "none", "-f", "gguf", "-o", tmp_path],
        "--config chooses among": [model, "-f", "gguf", "-o", tmp_path, "-c", "best"],
        "(did you mean 'smallest'?)": [cuts, "-f", "gguf", "-o", tmp_path, "-c", "smalest"],
        "holds what is to be exported": [tmp_path / "own/gguf", "-f", "gguf", "-o", own.parent],
    }
    for message, arguments in cases.items():
        result = cli("export", *arguments, code=2)
        assert message in result.stderr, result.stderr
        assert "\ntry: " in result.stderr
        assert result.stdout == ""
    assert traces(tmp_path) == before


def test_a_missing_package_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_model(tmp_path / "model")
    find = "elastune.export.registry.importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: None)
    result = cli("export", model, "-f", "onnx", "-o", tmp_path / "out", code=2)
    assert "try: pip install 'elastune[runtimes]'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_names_every_format() -> None:
    said = cli("export", "--help").stdout
    assert [name for name in EXPORT_FORMATS if name not in said] == []


# --- check --------------------------------------------------------------------------------------


def test_check_tells_good_exports_from_broken_ones(
    exported: dict[str, Any], tmp_path: Path
) -> None:
    folders = {name: tmp_path / name for name in exported}
    for name, row in exported.items():
        shutil.copytree(row["folder"], folders[name])
    good = cli("check", folders["gguf"] / "model.gguf", folders["openvino"])
    lines = good.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["good", "good"]
    assert str(folders["openvino"]) in lines[1]
    file = folders["hf-padded"] / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    breaks = {
        "does not compute what the model does": whole | {name: -whole[name]},
        "changed since the export": whole | {name: whole[name] + 1e-9},
    }
    for message, state in breaks.items():
        save_file(state, file, {"format": "pt"})
        result = cli("check", folders["gguf"], folders["hf-padded"], "--json", code=2)
        rows = json.loads(result.stdout)["checks"]
        assert [row["ok"] for row in rows] == [True, False]
        assert message in rows[1]["error"]
        assert message in result.stderr
    file.unlink()
    lacking = cli("check", folders["hf-padded"], tmp_path / "none", code=2)
    assert "lacks model.safetensors" in lacking.stderr
    assert "there is no folder" in lacking.stderr
    unproved = cli("check", save_tiny_model(tmp_path / "model"), code=2)
    assert "nothing was recorded to check it by" in unproved.stderr


@pytest.mark.slow
def test_a_checkpoint_with_an_adapter_beside_it_is_proved_with_both(tmp_path: Path) -> None:
    sub = extract_model(*sparse_net(), merge=False)
    assert sub.adapter is not None
    made = export_model(sub, "hf-hetero", tmp_path / "out", tokenizer=tiny_tokenizer())
    named = json.loads((made.folder / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(made.folder)
    assert check_export(made.folder).largest_difference == pytest.approx(0.0, abs=1e-5)
    file = made.folder / "adapter" / "adapter_model.safetensors"
    state = load_file(file)
    save_file({name: 2 * weight for name, weight in state.items()}, file, {"format": "pt"})
    with pytest.raises(ElastuneError, match="does not compute what the model does"):
        check_export(made.folder)
