"""Profiles of exports: what is measured, against what, and the plot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from test_export import cut, word_tokenizer
from tiny_llama import tiny_llama, tiny_tokenizer
from tiny_run import cli, save_tiny_model

from elastune.errors import BadArtifact, BadRecipe, ElastuneError
from elastune.export import export_model
from elastune.export.profile_plot import draw_profiles
from elastune.export.profiles import ExportProfile, names_of, profile_exports

pytest.importorskip("openvino")
pytest.importorskip("xllamacpp")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SHORT: dict[str, Any] = {"prompt_tokens": 16, "new_tokens": 4, "threads": 1}
OPTIONS = ["--prompt-tokens", 16, "--new-tokens", 4, "--threads", 1, "--rounds", 1]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny model: as a checkpoint, an adapter for it, and for two runtimes."""
    root = tmp_path_factory.mktemp("exports")
    model = save_tiny_model(root / "model")
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(tiny_llama(tiny_tokenizer()), lora).save_pretrained(str(root / "lora"))
    config = root / "lora" / "adapter_config.json"
    named = json.loads(config.read_text()) | {"base_model_name_or_path": str(model)}
    config.write_text(json.dumps(named))
    found = {"model": model, "lora": root / "lora"}
    for name in ("openvino", "gguf"):
        found[name] = export_model(model, name, root / name).folder
    return found


@pytest.fixture(scope="module")
def profiles(exports: dict[str, Path]) -> dict[str, ExportProfile]:
    steps: list[tuple[int, int]] = []
    made = profile_exports(
        list(exports.values()), rounds=1, progress=lambda *step: steps.append(step), **SHORT
    )
    assert steps == [(done + 1, 4) for done in range(4)]
    return dict(zip(exports, made, strict=True))


def n_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_every_runtime_is_measured_and_compared_with_the_first(
    profiles: dict[str, ExportProfile],
) -> None:
    runtimes = {name: one.runtime for name, one in profiles.items()}
    assert runtimes == {
        "model": "transformers",
        "lora": "transformers",
        "openvino": "openvino",
        "gguf": "llama.cpp",
    }
    first = profiles["model"]
    assert (first.prefill_speed_up, first.decode_speed_up) == (1.0, 1.0)
    for one in profiles.values():
        assert one.decode_tokens_per_s is not None
        assert first.decode_tokens_per_s is not None
        # Of one round, the ratio of times is that of the rates.
        ratio = one.decode_tokens_per_s / first.decode_tokens_per_s
        assert one.decode_speed_up == pytest.approx(ratio)
        ratio = one.prefill_tokens_per_s / first.prefill_tokens_per_s
        assert one.prefill_speed_up == pytest.approx(ratio)
        assert one.load_s > 0
        assert one.peak_memory_mb > 20
    # Neither runtime imports torch, which alone takes more than they do.
    assert profiles["gguf"].peak_memory_mb < first.peak_memory_mb
    assert profiles["openvino"].peak_memory_mb < first.peak_memory_mb


def test_size_on_disk_is_of_the_files_that_are_needed(
    exports: dict[str, Path], profiles: dict[str, ExportProfile]
) -> None:
    reference = (exports["gguf"] / "reference.safetensors").stat().st_size
    card = (exports["gguf"] / "README.md").stat().st_size
    wanted = (n_bytes(exports["gguf"]) - reference - card) / 2**20
    assert profiles["gguf"].disk_mb == pytest.approx(wanted, abs=0.006)
    card = (exports["lora"] / "README.md").stat().st_size
    both = (n_bytes(exports["lora"]) + n_bytes(exports["model"]) - card) / 2**20
    assert profiles["lora"].disk_mb == pytest.approx(both, abs=0.006)  # with its base


def test_an_encoder_reads_and_generates_nothing(tmp_path: Path) -> None:
    sub = cut("bert", "classifier", ((2, 24), (4, 0)))
    folder = export_model(sub, "openvino", tmp_path / "out", tokenizer=word_tokenizer()).folder
    (found,) = profile_exports([folder], rounds=1, **SHORT)
    assert (found.decode_tokens_per_s, found.decode_speed_up) == (None, None)
    assert found.prefill_tokens_per_s > 0


def test_names_tell_exports_of_the_same_format_apart() -> None:
    assert names_of([Path("/a/x/onnx"), Path("/a/y/gguf")]) == ["onnx", "gguf"]
    assert names_of([Path("/a/x/onnx"), Path("/a/y/onnx")]) == ["x/onnx", "y/onnx"]
    assert names_of([Path("/x/a/onnx"), Path("/y/a/onnx")]) == ["x/a/onnx", "y/a/onnx"]


def test_what_cannot_be_run_says_why(exports: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadArtifact, match="is no export"):
        profile_exports([tmp_path])
    nas = tmp_path / "nas"
    nas.mkdir()
    (nas / "export.json").write_text('{"format": "nemotron-nas", "runtime": "vllm"}')
    with pytest.raises(BadArtifact, match="for vLLM, which is not run here"):
        profile_exports([nas])
    broken = Path(shutil.copytree(exports["openvino"], tmp_path / "broken"))
    (broken / "openvino_model.bin").write_bytes(b"")
    with pytest.raises(ElastuneError, match="broken cannot be run"):
        profile_exports([broken], rounds=1, **SHORT)


# --- the command --------------------------------------------------------------------------------


def test_the_command_prints_a_row_for_each_and_draws_them(
    exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "140")
    plot = tmp_path / "profiles.png"
    two = [exports["gguf"], exports["openvino"]]
    result = cli("profile", *two, *OPTIONS, "--plot", plot, "--json")
    found = json.loads(result.stdout)
    assert [row["runtime"] for row in found["profiles"]] == ["llama.cpp", "openvino"]
    assert found["plot"] == str(plot)
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in tmp_path.iterdir()] == ["profiles.png"]
    table = cli("profile", exports["gguf"], *OPTIONS).stdout
    titles = ("runtime", "disk MB", "load s", "prefill tok/s", "decode tok/s", "peak MB", "1.00x")
    assert [title for title in titles if title not in table] == []


def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr("elastune.export.profiles._measured", measured)
    for file, message in (("a.gif", "got 'a.gif'"), ("none/a.png", "there is no folder")):
        result = cli("profile", exports["gguf"], "--plot", tmp_path / file, code=2)
        assert message in result.stderr
    monkeypatch.setattr("elastune.export.profile_plot.importlib.util.find_spec", lambda name: None)
    result = cli("profile", exports["gguf"], "--plot", tmp_path / "a.png", code=2)
    assert "try: pip install 'elastune[plot]'" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_plot_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    file = tmp_path / "a.png"
    file.write_bytes(b"old")

    def full(self: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(figure.Figure, "savefig", full)
    one = ExportProfile("a", "openvino", 1.0, 0.1, 10.0, None, 50.0, 1.0, None)
    with pytest.raises(OSError, match="no space"):
        draw_profiles([one], file)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.png", b"old")]
    with pytest.raises(BadRecipe, match="png"):
        draw_profiles([one], tmp_path / "a.txt")
