"""The command line: what it prints, what it refuses, and that refusing leaves no trace."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_run import save_recipe, save_sums, save_tiny_model, tiny_recipe
from typer.testing import CliRunner, Result

from elastune.cli import app
from elastune.console import ConsoleReporter
from elastune.export.registry import EXPORT_FORMATS

COMMANDS = ["run", "sparsify", "space", "train", "search", "extract"]
COMMANDS += ["export", "check", "profile"]
COMMANDS += ["sweep", "fit", "adapter", "push", "evaluate", "report", "runs"]
COMMANDS += ["demo", "doctor"]


def cli(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def refused(result: Result) -> str:
    """Check that this was bad input, told in one message, and return the message."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sums(tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe(model: Path, data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    return save_recipe(path, tiny_recipe(model, data, train={"max_steps": 2}, baselines=["dense"]))


@pytest.fixture(scope="module")
def finished(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    short = tiny_recipe(model, data, train={"max_steps": 2}, baselines=["dense"])
    result = cli("run", save_recipe(folder / "r.yaml", short), "--out", folder / "run")
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- help and version ---------------------------------------------------------------------------


def test_help_lists_every_command_and_each_explains_itself() -> None:
    top = cli("--help")
    assert top.exit_code == 0
    assert [name for name in COMMANDS if not re.search(rf"\b{name}\b", top.stdout)] == []
    shown = [c for c in app.registered_commands if not c.hidden]
    assert sorted(COMMANDS) == sorted(c.callback.__name__ for c in shown)  # type: ignore[union-attr]
    for name in COMMANDS:
        result = cli(name, "--help")
        assert result.exit_code == 0
        assert "--json" in result.stdout


def test_help_and_bad_recipes_do_not_wait_for_torch(tmp_path: Path) -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['elastune', *sys.argv[1:]]\n"
        "try: runpy.run_module('elastune', run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'optuna'} & set(sys.modules)\n"
        "sys.exit(f'{code} {sorted(heavy)}')"
    )
    (tmp_path / "bad.yaml").write_text("modle: x")
    for arguments, expected in ((["--help"], "0 []"), (["run", "bad.yaml"], "2 []")):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, text=True, capture_output=True
        )
        assert done.stderr.strip().splitlines()[-1] == expected
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_version_is_the_packages() -> None:
    from elastune.version import __version__

    assert cli("--version").stdout.strip() == __version__


def test_doctor_tells_versions_and_tasks() -> None:
    facts = json.loads(cli("doctor", "--json").stdout)
    assert facts["packages"]["torch"]
    assert "gsm8k" in facts["tasks"]
    assert facts["exports"]["hf"] is None
    assert set(facts["exports"]) == set(EXPORT_FORMATS)
    assert "smollm2-135m" in cli("doctor").stdout


# --- bad input ----------------------------------------------------------------------------------

#: Overrides of a good recipe -> what the message must say.
REFUSALS: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["train.bach_size=4"], ["'train.bach_size'", "did you mean 'batch_size'"]),
    "sparsity of 1": (["sparsify.ratio=1.0"], ["sparsify.ratio", "less than 1", "got 1.0"]),
    "missing model": (["model=/no/such/model"], ["no model at '/no/such/model'", "try: "]),
    "unknown hub model": (["model=nobody/nothing"], ["nobody/nothing", "try: "]),
    "rank above the bound": (
        ["adapter.max_rank=6"],
        ["rank 8 is above the adapter's full rank 6", "raise adapter.max_rank to 8"],
    ),
    "pattern without a match": (
        ["adapter.ranks={'*.dwn': [8, 4]}"],
        ["'*.dwn' matches no dim", "groups are qkv, up_gate, down", "try: a pattern such as"],
    ),
    "negative rank": (["adapter.ranks=[8, -4]"], ["at least 0", "-4"]),
    "only rank 0": (["adapter.ranks=[0]"], ["rank above 0"]),
    "unknown projection": (["adapter.targets=[qq]"], ["unknown projection 'qq'"]),
    "bad pattern": (["sparsify.pattern=2-4"], ["'2-4' is not like '2:4'"]),
    "pattern that does not divide": (["sparsify.pattern=2:7"], ["groups of 7", "32 inputs"]),
    "no calibration text": (["sparsify.calibration.source=/no.txt"], ["there is no file /no.txt"]),
    "unknown task": (["task.name=gsm9k"], ["'gsm9k' is not known", "did you mean 'gsm8k'"]),
    "missing data": (["task.name=/no/train.jsonl"], ["there is no file /no/train.jsonl"]),
    "unknown option": (["task.options.reprot=x"], ["no option 'reprot'", "did you mean 'report'"]),
    "too few examples": (["data.n_validation=48"], ["48 training examples cannot give 48"]),
    "completions that do not fit": (["train.max_length=4"], ["within 4 tokens", "max_length"]),
    "half precision without a GPU": (["train.precision=fp16"], ["needs a GPU", "try: fp32"]),
    "unknown tracker": (["train.report_to=nobody"], ["no tracker 'nobody'", "try: "]),
    "answers beyond the context": (
        ["task.options.max_new_tokens=300"],
        ["with max_new_tokens=300 it exceeds the model's context of 256", "try: lower"],
    ),
    "chat without a template": (["task.template=chat"], ["chat"]),
}


@pytest.mark.parametrize(("overrides", "said"), REFUSALS.values(), ids=REFUSALS.keys())
@pytest.mark.parametrize("command", ["run", "sparsify"])
def test_bad_input_is_refused_before_anything_is_written(
    recipe: Path, tmp_path: Path, command: str, overrides: list[str], said: list[str]
) -> None:
    before = tree(tmp_path)
    settings = [part for text in overrides for part in ("--set", text)]
    message = refused(cli(command, recipe, "--out", tmp_path / "new" / "out", *settings))
    for words in said:
        assert words in message
    assert tree(tmp_path) == before


BAD_DATA: dict[str, tuple[str, list[str]]] = {
    "empty": ("", ["bad.jsonl holds no rows"]),
    "not JSON": ('{"prompt": 1}\n{"prom', ["bad.jsonl line 2 is not valid JSON"]),
    "no objects": ("[1, 2]", ["item 1 is a int; every row must be a JSON object"]),
    "without the field": (
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "complete": "b"}',
        ["line 2 has no field 'completion'", "did you mean 'complete'"],
    ),
    "null": ('{"prompt": "a", "completion": null}', ["line 1: field 'completion' is None"]),
}


@pytest.mark.parametrize("place", ["task.name", "task.options.report"])
@pytest.mark.parametrize(("text", "said"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data_is_refused_with_file_and_line(
    recipe: Path, tmp_path: Path, place: str, text: str, said: list[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    before = tree(tmp_path)
    settings = ["--set", f"{place}={tmp_path / 'bad.jsonl'}"]
    message = refused(cli("run", recipe, "--out", tmp_path / "out", *settings))
    for words in said:
        assert words in message
    assert tree(tmp_path) == before


def test_too_little_calibration_text_is_refused(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words.")
    settings = ["--set", f"sparsify.calibration.source={tmp_path / 'short.txt'}"]
    message = refused(cli("run", recipe, "--out", tmp_path / "out", *settings))
    assert "less than one row of 32" in message
    assert "lower sparsify.calibration.length" in message
    assert not (tmp_path / "out").exists()


def test_training_on_what_is_reported_is_refused(recipe: Path, data: Path, tmp_path: Path) -> None:
    settings = ["--set", f"task.options.report={data / 'train.jsonl'}"]
    message = refused(cli("run", recipe, "--out", tmp_path / "out", *settings))
    assert "question(s) of report:train.jsonl" in message
    assert "data.leaks=drop" in message
    assert not (tmp_path / "out").exists()


def test_a_corrupt_model_is_refused_by_file_name(recipe: Path, model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    settings = ["--set", f"model={broken}"]
    message = refused(cli("run", recipe, "--out", tmp_path / "out", *settings))
    assert "model.safetensors" in message
    assert "truncated or corrupt" in message
    assert not (tmp_path / "out").exists()


def test_an_encoder_is_refused(recipe: Path, model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(model)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    BertModel(
        BertConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)  # type: ignore[arg-type]
    ).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    out = tmp_path / "out"
    message = refused(cli("run", recipe, "-o", out, "-s", f"model={tmp_path / 'bert'}"))
    assert "is an encoder (bert), which generates no text" in message
    assert not out.exists()


@pytest.mark.parametrize("command", ["run", "sparsify", "train", "search", "extract", "evaluate"])
def test_a_missing_recipe_is_refused(command: str, tmp_path: Path) -> None:
    message = refused(cli(command, tmp_path / "none.yaml"))
    assert "cannot read the recipe" in message
    assert tree(tmp_path) == {}


def test_a_report_of_a_missing_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        message = refused(cli("report", folder))
        assert f"{folder} is not a run directory" in message
        assert f"elastune run RECIPE --out {folder}" in message
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("command", ["search", "extract", "evaluate"])
def test_later_stages_without_the_earlier_are_refused(
    recipe: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    message = refused(cli(command, recipe))
    assert "missing" in message
    assert "try: " in message
    assert tree(tmp_path) == before


# --- the output folder --------------------------------------------------------------------------


def test_a_folder_of_another_recipe_is_refused_and_left_alone(run: Path, recipe: Path) -> None:
    before = tree(run)
    message = refused(cli("run", recipe, "--out", run, "--set", "seed=5"))
    assert "seed (0 there, 5 here)" in message
    assert "--update" in message
    assert refused(cli("run", run, "--set", "train.max_steps=3"))
    assert tree(run) == before


def test_a_run_directory_takes_no_other_out(run: Path, tmp_path: Path) -> None:
    assert "--out" in refused(cli("run", run, "--out", tmp_path / "other"))


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300])
def test_an_output_that_cannot_be_a_folder_is_refused(
    recipe: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    message = refused(cli("run", recipe, "--out", tmp_path / name))
    assert "cannot write" in message
    assert "another --out" in message
    assert tree(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 500 KB, where this machine lets the tests mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs more rights than these tests have")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)  # weights may be mapped still


def _remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def test_a_full_disk_costs_one_line_and_more_space_goes_on(
    recipe: Path, small_disk: Path, finished: Path
) -> None:
    out = small_disk / "out"
    failures = 0
    for kilobytes in range(40, 2000, 120):
        _remount(small_disk, f"size={kilobytes}k")
        result = cli("run", recipe, "--out", out)
        if result.exit_code == 0:
            break
        message = refused(result)
        assert "cannot write: " in message
        assert "o space left" in message
        assert len(message.strip().splitlines()[-2:]) == 2
        assert "run again to go on" in message
        failures += 1
    assert failures >= 3
    assert result.exit_code == 0
    mine, other = (json.loads((f / "metrics.json").read_text())["rows"] for f in (out, finished))
    for row in mine + other:
        row["seconds"] = 0
    assert mine == other


def test_a_read_only_output_is_refused(recipe: Path, small_disk: Path) -> None:
    _remount(small_disk, "ro")
    message = refused(cli("run", recipe, "--out", small_disk / "out"))
    assert "cannot write" in message
    assert str(small_disk) in message


def test_an_output_without_permission_is_refused(recipe: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "Permission denied" in refused(cli("run", recipe, "--out", locked / "out"))


# --- failing runs -------------------------------------------------------------------------------


def test_a_loss_that_diverges_names_the_step_and_keeps_the_checkpoint(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from elastune import train as _  # noqa: F401
    from elastune.losses import completion_loss

    calls = 0

    def loss_until_step_four(*arguments: Any) -> tuple[torch.Tensor, int]:
        nonlocal calls
        calls += 1
        loss, count = completion_loss(*arguments)
        return (loss * float("nan") if calls == 4 else loss), count

    module = sys.modules["elastune.heads.causal_lm"]
    monkeypatch.setattr(module, "completion_loss", loss_until_step_four)
    settings = ["--set", "train.max_steps=6", "--set", "train.checkpoint_every=2"]
    result = cli("run", recipe, "--out", tmp_path / "out", *settings)
    assert result.exit_code == 2
    assert "the loss became nan at step 4; checkpoint-2 is kept" in result.stderr
    assert "a lower train.learning_rate" in result.stderr
    kept = {path.name for path in (tmp_path / "out" / "supernet").iterdir() if path.is_dir()}
    assert kept == {"checkpoint-2"}
    monkeypatch.setattr(module, "completion_loss", completion_loss)
    assert cli("run", tmp_path / "out").exit_code == 0
    rows = (tmp_path / "out" / "supernet" / "train.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_a_huge_learning_rate_ends_in_one_message(recipe: Path, tmp_path: Path) -> None:
    settings = ["--set", "train.learning_rate=1e30", "--set", "train.max_steps=4"]
    result = cli("run", recipe, "--out", tmp_path / "out", *settings)
    assert result.exit_code == 2
    assert re.search(r"the loss became (nan|inf) at step \d", result.stderr)
    assert "Traceback" not in result.output


# --- what it prints -----------------------------------------------------------------------------


def test_stages_one_by_one_end_like_a_whole_run(
    recipe: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    total = json.loads(cli("sparsify", recipe, "-o", out, "--json").stdout)
    assert total["sparsity"] == 0.5
    assert json.loads(cli("train", out, "--json").stdout) == {"supernet": str(out / "supernet")}
    best = json.loads(cli("search", out, "--json").stdout)
    assert set(best["values"]) == {"loss", "params"}
    folders = json.loads(cli("extract", out, "--json").stdout)["subnets"]
    assert [Path(f).name for f in folders] == ["largest", "heuristic", "smallest", "best"]
    scored = json.loads(cli("evaluate", out, "--json").stdout)
    reported = json.loads(cli("report", out, "--json").stdout)
    assert scored == reported
    whole = json.loads((finished / "metrics.json").read_text())["rows"]
    for row in scored["rows"] + whole:
        row["seconds"] = 0
    assert scored["rows"] == whole
    assert scored["rows"][-1]["config"] == best["best"]


def test_one_configuration_is_extracted_under_its_name(run: Path) -> None:
    config = json.loads((run / "subnets" / "largest" / "subnet.json").read_text())
    config[next(iter(config))] = 4
    assert cli("extract", run, "-c", json.dumps(config), "--name", "mine").exit_code == 0
    assert json.loads((run / "subnets" / "mine" / "subnet.json").read_text()) == config


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-c", "medium"], "'medium' is neither largest, heuristic, smallest, best nor"),
        (["-c", "{"], "a sub-network is a JSON object"),
        (["-c", '{"layers.0.qv": 8}'], "unknown dim 'layers.0.qv' (did you mean 'layers.0.qkv'?)"),
        (["-c", "{}", "--name", "../up"], "--name '../up'"),
        (["-c", "{}", "--name", "best"], "--name 'best'"),
        (["-c", "largest", "-c", "largest"], "two configurations for subnets/largest"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(
    run: Path, arguments: list[str], said: str
) -> None:
    before = tree(run.parent)
    assert said in refused(cli("extract", run, *arguments))
    assert tree(run.parent) == before


def test_evaluating_one_system_keeps_the_other_rows(run: Path) -> None:
    before = json.loads((run / "metrics.json").read_text())["rows"]
    assert cli("evaluate", run, "--only", "heuristic").exit_code == 0
    assert json.loads((run / "metrics.json").read_text())["rows"] == before
    assert "unknown system 'medium'" in refused(cli("evaluate", run, "--only", "medium"))


def test_progress_fits_a_terminal_of_80_columns() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=False)
    title = "evaluate dense+lora, reasoning_gym:chain_sum"
    with ConsoleReporter(console).bar(title, "examples") as bar:
        bar(1, 250000, "")
        time.sleep(0.05)
        bar(250000, 250000, "loss 6.803, 15930 tokens/s and more that no one has room for")
    lines = file.getvalue().splitlines()
    assert len(lines) == 1
    assert len(lines[0]) <= 80
    assert lines[0].startswith("evaluate dense+lora, reas…")
    for fact in ("250000/250000", "examples/s", "in 0:00"):
        assert fact in lines[0]
