"""The whole of Shears at toy size: what it leaves, what it skips, and what a kill costs."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_run import ROWS, STEPS, save_recipe, save_sums, save_tiny_model, tiny_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from elastune.cli import app, main
from elastune.files import read_json
from elastune.space import SearchSpace, SubnetConfig

FIELDS: dict[str, Any] = {
    "name": str,
    "task": str,
    "metric": str,
    "score": float,
    "stderr": float,
    "n": int,
    "other_metrics": list,
    "params": int,
    "nonzero": int,
    "macs": int,
    "latency_ms": type(None),
    "decode_latency_ms": type(None),
    "seconds": float,
    "config": (dict, type(None)),
    "notes": type(None),
    "options": type(None),
}


def cli(*arguments: Any) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, the data and the recipe."""
    folder = tmp_path_factory.mktemp("source")
    model, data = save_tiny_model(folder / "model"), save_sums(folder / "data")
    save_recipe(folder / "tiny.yaml", tiny_recipe(model, data))
    return folder


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run; tests read it and change copies."""
    out = tmp_path_factory.mktemp("runs") / "run"
    cli("run", source / "tiny.yaml", "--out", out)
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def metrics(run: Path) -> list[dict[str, Any]]:
    return read_json(run / "metrics.json")["rows"]


def outcome(run: Path) -> list[dict[str, Any]]:
    """The rows without what differs between two equal runs."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in metrics(run)]


def steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def times(run: Path) -> dict[str, int]:
    return {str(p.relative_to(run)): p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}


# --- what a run leaves --------------------------------------------------------------------------


def test_metrics_have_the_schema_and_all_rows_in_order(run: Path) -> None:
    data = read_json(run / "metrics.json")
    assert list(data) == ["schema", "rows", "environment", "seal"]
    assert data["schema"] == 1
    assert [row["name"] for row in data["rows"]] == ROWS
    for row in data["rows"]:
        assert list(row) == list(FIELDS)
        for field, kind in FIELDS.items():
            assert isinstance(row[field], kind), (row["name"], field)
        assert (row["task"], row["metric"], row["n"]) == ("train.jsonl", "accuracy", 6)


def test_the_run_directory_has_what_its_contract_names(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        *("recipe.yaml", "manifest.json", "metrics.json", "report.html", "space.json"),
        *("base", "supernet", "baselines", "search", "subnets", "predictions"),
    }
    assert {path.name for path in (run / "subnets").iterdir()} == set(ROWS[4:])
    assert (run / "search" / "study.journal").exists()
    assert "</html>" in (run / "report.html").read_text()
    stages = read_json(run / "manifest.json")["stages"]
    assert {row["status"] for row in stages.values()} == {"done"}


@pytest.mark.parametrize("name", ROWS[4:])
def test_the_card_of_a_sub_adapter_tells_its_figures(name: str, run: Path) -> None:
    text = (run / "subnets" / name / "README.md").read_text()
    figures = text.partition("## Figures")[2]
    assert f"| {name} |" in figures


def test_costs_are_those_of_the_saved_weights(run: Path) -> None:
    rows = {row["name"]: row for row in metrics(run)}
    base = load_file(run / "base" / "model.safetensors")
    params = sum(t.numel() for t in base.values())
    nonzero = sum(int(torch.count_nonzero(t)) for t in base.values())
    assert (rows["sparse"]["params"], rows["sparse"]["nonzero"]) == (params, nonzero)
    assert rows["dense"]["params"] == params
    for name in ROWS[4:]:
        adapter = load_file(run / "subnets" / name / "adapter_model.safetensors")
        extra = sum(t.numel() for t in adapter.values())
        assert rows[name]["params"] == params + extra
        assert rows[name]["nonzero"] == nonzero + extra
    assert rows["largest"]["macs"] > rows["heuristic"]["macs"] > rows["smallest"]["macs"]
    assert rows["sparse+lora"]["params"] == rows["largest"]["params"]


def test_everything_trained_saw_the_same_batches_for_the_same_steps(run: Path) -> None:
    folders = [
        run / "supernet",
        run / "baselines" / "dense-lora",
        run / "baselines" / "sparse-lora",
    ]
    tokens = [[row["tokens"] for row in steps(folder)] for folder in folders]
    assert len(tokens[0]) == STEPS
    assert tokens[0] == tokens[1] == tokens[2]
    assert len(set(tokens[0])) > 1  # batches of different lengths, so that equality says something
    rates = [[row["lr"] for row in steps(folder)] for folder in folders]
    assert rates[0] == rates[1] == rates[2]


def test_the_supernet_trains_many_sub_networks_and_a_baseline_only_the_largest(run: Path) -> None:
    drawn = {tuple(config) for row in steps(run / "supernet") for config in row["configs"]}
    assert len(drawn) == STEPS
    for name in ("dense-lora", "sparse-lora"):
        drawn = {tuple(c) for row in steps(run / "baselines" / name) for c in row["configs"]}
        assert drawn == {(0, 0, 0, 0, 0, 0)}


def test_the_base_has_the_zeros_it_says_and_keeps_the_other_weights(
    run: Path, source: Path
) -> None:
    dense = load_file(source / "model" / "model.safetensors")
    base = load_file(run / "base" / "model.safetensors")
    report = read_json(run / "base" / "sparsity.json")
    assert set(base) == set(dense)
    assert len(report["tensors"]) == 14
    for name, tensor in base.items():
        if name in report["tensors"]:
            rows = (tensor == 0).sum(dim=1)
            assert rows.tolist() == [tensor.shape[1] // 2] * tensor.shape[0]
            assert report["tensors"][name]["zeros"] == int(rows.sum())
        kept = tensor != 0
        assert torch.equal(tensor[kept], dense[name][kept])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_stock_peft_loads_every_subnet(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "base")
    space = SearchSpace.from_dict(read_json(run / "space.json"))
    rows = {row["name"]: row for row in metrics(run)}
    ids = tokenizer("What is 3 + 12?", return_tensors="pt").input_ids
    logits = {}
    for name in ROWS[4:]:
        base = AutoModelForCausalLM.from_pretrained(run / "base")
        model = PeftModel.from_pretrained(base, str(run / "subnets" / name)).eval()
        config = SubnetConfig.from_json((run / "subnets" / name / "subnet.json").read_text())
        assert dict(config) == rows[name]["config"]
        assert config in space
        with torch.no_grad():
            logits[name] = model(ids).logits
        assert logits[name].isfinite().all()
    assert not torch.allclose(logits["largest"], logits["smallest"], atol=1e-3)
    same = rows["best"]["config"] == rows["largest"]["config"]
    assert torch.equal(logits["best"], logits["largest"]) == same


def test_the_best_is_the_trial_of_the_lowest_loss(run: Path) -> None:
    search = read_json(run / "search" / "trials.json")
    losses = [trial["values"]["loss"] for trial in search["trials"]]
    assert len(losses) == 5
    assert search["best"] == losses.index(min(losses))
    best = search["trials"][search["best"]]["config"]
    assert metrics(run)[-1]["config"] == best


def test_search_and_report_never_share_examples(run: Path, source: Path) -> None:
    from elastune.artifacts import RunDirectory
    from elastune.config import load_recipe
    from elastune.progress import Reporter
    from elastune.run import Run

    work = Run(RunDirectory(run), load_recipe(source / "tiny.yaml"), Reporter())
    splits = work.splits
    reported = {example.key for example in splits.report["train.jsonl"]}
    validated = {example.key for example in splits.validation}
    trained = {example.key for example in splits.train}
    assert (len(reported), len(validated), len(trained)) == (6, 8, 40)
    assert len(reported | validated | trained) == 6 + 8 + 40
    asked = (run / "predictions" / "largest.train.jsonl.jsonl").read_text().splitlines()
    prompts = "\n".join(json.loads(line)["prompt"] for line in asked)
    assert len(asked) == 6
    assert all(key in prompts for key in reported)
    assert not any(key in prompts for key in validated)


# --- going on -----------------------------------------------------------------------------------


def test_a_second_run_does_nothing_again(copy: Path) -> None:
    before = times(copy)
    cli("run", copy)
    after = times(copy)
    assert {name for name in after if after[name] != before.get(name)} == {"report.html"}


def test_more_trials_redo_the_search_and_the_best_alone(copy: Path) -> None:
    before, old = times(copy), metrics(copy)
    cli("run", copy, "--set", "search.trials=9", "--update")
    after = times(copy)
    changed = {name for name in after if after[name] != before.get(name)}
    may_change = {"recipe.yaml", "manifest.json", "metrics.json", "report.html"}
    may_change |= {"search/trials.json", "search/study.journal"}
    best = {name for name in changed if name.startswith(("subnets/best/", "predictions/best."))}
    assert changed - may_change - best == set()
    assert "search/trials.json" in changed
    assert metrics(copy)[:-1] == old[:-1]
    trials = read_json(copy / "search" / "trials.json")
    assert len(trials["trials"]) == 9
    assert metrics(copy)[-1]["config"] == trials["trials"][trials["best"]]["config"]
    subnet = (copy / "subnets" / "best" / "subnet.json").read_text()
    assert json.loads(subnet) == metrics(copy)[-1]["config"]
    assert not [name for name in before if name not in after]


def test_fewer_baselines_are_remembered_though_no_stage_runs(copy: Path) -> None:
    cli("run", copy, "--set", "baselines=dense", "--update")
    assert [row["name"] for row in metrics(copy)] == ["dense", *ROWS[4:]]
    cli("run", copy)


def test_changed_data_under_the_same_path_redoes_training(
    run: Path, source: Path, tmp_path: Path
) -> None:
    data = save_sums(tmp_path / "data")
    recipe = save_recipe(
        tmp_path / "r.yaml",
        tiny_recipe(source / "model", data, train={"max_steps": 2}, baselines=["dense"]),
    )
    cli("run", recipe, "--out", tmp_path / "out")
    first = times(tmp_path / "out")
    save_sums(tmp_path / "data", n_train=40)
    cli("run", recipe, "--out", tmp_path / "out")
    second = times(tmp_path / "out")
    for name in ("base/model.safetensors", "supernet/trained.safetensors", "search/trials.json"):
        assert first[name] != second[name]
    assert first["predictions/dense.train.jsonl.jsonl"] != second.get(
        "predictions/dense.train.jsonl.jsonl"
    )


def test_a_deleted_part_is_made_again(copy: Path) -> None:
    expected = outcome(copy)
    shutil.rmtree(copy / "base")
    shutil.rmtree(copy / "subnets" / "best")
    (copy / "search" / "trials.json").unlink()
    cli("run", copy)
    assert outcome(copy) == expected
    assert (copy / "subnets" / "best" / "adapter_config.json").exists()
    assert read_json(copy / "base" / "sparsity.json")["total"]["sparsity"] == 0.5


# --- kills --------------------------------------------------------------------------------------

_CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def _run_in_child(arguments: list[str], out: str, die_at: int, count: Any) -> None:
    """Run the command line; die at the ``die_at``-th change of a file or folder under ``out``."""
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Ignored in the children of a shell's background jobs, and then nobody could interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES and str(arguments[0]).startswith(out):
            if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
            count.value += 1
            if count.value == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    sys.argv = ["elastune", "run", *arguments, "--out", out]
    main()


@pytest.fixture(scope="module")
def children() -> Any:
    """Start processes by forking one that has imported everything, which takes no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["elastune.check", "elastune.methods", __name__])
    return context


def test_three_kills_at_random_moments_change_nothing_in_the_end(
    children: Any, run: Path, source: Path, tmp_path: Path
) -> None:
    def start(out: str, die_at: int = 0) -> tuple[int, int]:
        count = children.Value("i", 0)
        arguments = ([str(source / "tiny.yaml")], str(tmp_path / out), die_at, count)
        child = children.Process(target=_run_in_child, args=arguments)
        child.start()
        child.join()
        return child.exitcode, count.value

    code, n_changes = start("whole")
    assert code == 0
    assert n_changes > 100
    rng = random.Random(0)
    for _ in range(3):
        code, _ = start("killed", die_at=rng.randrange(1, n_changes // 4))
        assert code == -signal.SIGKILL
    assert start("killed")[0] == 0
    out = tmp_path / "killed"
    assert outcome(out) == outcome(tmp_path / "whole") == outcome(run)
    for part in ("supernet", "baselines/dense-lora", "baselines/sparse-lora"):
        mine, theirs = (load_file(f / part / "trained.safetensors") for f in (out, run))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert [r["loss"] for r in steps(out / part)] == [r["loss"] for r in steps(run / part)]
    left = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    assert left == {path.relative_to(run) for path in run.rglob("*") if path.is_file()}


def test_an_interrupted_run_says_how_to_go_on(children: Any, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = tiny_recipe(source / "model", source / "data", train={"max_steps": 2_000})
    save_recipe(tmp_path / "long.yaml", recipe)
    arguments = ([str(tmp_path / "long.yaml")], str(out), 0, children.Value("i", 0))
    child = children.Process(target=_run_in_child, args=arguments)
    child.start()
    while child.is_alive() and not any(out.glob("supernet/checkpoint-*/complete")):
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGINT)
    child.join()
    log = (tmp_path / "out.log").read_text()
    assert child.exitcode == 130, log
    assert "interrupted; run the same command again to go on" in log
    assert "Traceback" not in log
    assert {row["status"] for row in read_json(out / "manifest.json")["stages"].values()} == {
        "done",
        "started",
    }
    assert not (out / ".lock").exists()
