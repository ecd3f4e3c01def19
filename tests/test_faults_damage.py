"""Files of a run that were cut short or had a bit flipped: made again, or refused by name.

What is refused is refused with one message and exit code 2, and what the message says to do leads
to the outcome of the run that nobody damaged. Never is a damaged file read as if it were whole.
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import pytest
from faults import Fault, attempt, commands, differences, outcome, save_method
from typer.testing import CliRunner

from elastune.artifacts import RunDirectory
from elastune.cli import app
from elastune.errors import BadArtifact
from elastune.files import remove
from elastune.seals import seal, with_checksum, without_checksum

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform == "win32", reason="forks"),
]


def cut_short(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def bit_flipped(path: Path) -> None:
    """Flip the lowest bit of a byte behind the middle; of text, of a digit, so that it parses."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    is_text = path.suffix in (".json", ".jsonl", ".yaml", ".journal")
    places = [i for i in range(middle, len(content)) if not is_text or 48 <= content[i] < 58]
    content[places[0] if places else middle] ^= 1
    path.write_bytes(bytes(content))


DAMAGES: tuple[Callable[[Path], None], ...] = (cut_short, emptied, bit_flipped)

#: Files of a finished run, by method; the first of those that a pattern finds is damaged.
FINISHED = {
    "lonas": [
        "manifest.json",
        "base/model.safetensors",
        "base/config.json",
        "base/tokenizer.json",
        "base/sparsity.json",
        "space.json",
        "supernet/trained.safetensors",
        "supernet/train.jsonl",
        "baselines/dense-lora/trained.safetensors",
        "search/trials.json",
        "search/single_choices.jsonl",
        "search/budgets.json",
        "subnets/best/model.safetensors",
        "subnets/best/config.json",
        "predictions/best.train.jsonl.jsonl",
        "metrics.json",
    ],
    "eftnas": [
        "importance.safetensors",
        "generated.json",
        "baselines/dense-full/trained.safetensors",
        "baselines/alone-points-70/trained.safetensors",
        "search/full_costs.json",
    ],
    "shears": ["subnets/best/adapter_model.safetensors", "subnets/best/adapter_config.json"],
}
#: Files of a run that was killed, with the stage and the change of a file that it was killed at.
KILLED = [
    ("train", 26, "supernet/checkpoint-*/trained.safetensors"),
    ("train", 26, "supernet/checkpoint-*/optimizer.pt"),
    ("train", 26, "supernet/checkpoint-*/scheduler.pt"),
    ("train", 26, "supernet/checkpoint-*/trainer_state.json"),
    ("train", 26, "supernet/checkpoint-*/rng_state.pth"),
    ("train", 26, "supernet/checkpoint-*/complete"),
    ("train", 26, "supernet/train.jsonl"),
    ("search", 45, "search/study.journal"),
    ("budgets", 12, "search/single_choices.jsonl"),
    ("evaluate", 30, "predictions/.*.partial"),
]


@pytest.fixture(scope="module")
def context() -> Any:
    return faults.fork_server()


@pytest.fixture(scope="module")
def whole(context: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished run of a method, made when it is first asked for."""
    made: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            [command, _] = commands(save_method(folder, method), folder / "run", method)
            done = attempt(context, command, folder / "run")
            assert done.code == 0, done.err
            made[method] = folder / "run"
        return made[method]

    return run


def again(out: Path) -> tuple[int, str]:
    """Go on with a run in this process; return its exit code, what it told and warned of."""
    warned: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("elastune")
    logger.addHandler(listener)
    try:
        result = CliRunner().invoke(app, ["run", str(out)])
    finally:
        logger.removeHandler(listener)
    assert isinstance(result.exception, SystemExit | None), (result.exception, result.output)
    return result.exit_code, " ".join([*result.stderr.split(), *warned])


def settle(out: Path, wanted: dict[str, Any], damaged: Path) -> str:
    """Go on with a damaged run to its end, doing what it says; return how that went."""
    left = damaged.read_bytes()
    code, told = again(out)
    if code == 2:
        assert told.count("error:") == 1, told
        assert told.count("try:") == 1, told
        assert damaged.name in told or damaged.parent.name in told, told
        found = re.search(r"delete (\S+?)[;,]? ", f"{told} ")
        assert found, told
        target = damaged if found[1] in ("it", "it;") else Path(found[1])
        assert target.is_relative_to(out), told
        remove(target)
        code, told = again(out)
        assert_whole(out, wanted, damaged, code, told)
        return "refused"
    if damaged.exists() and damaged.read_bytes() == left:
        assert code == 0, told
        assert_refused_where_used(out, damaged)
        damaged.unlink()  # it may not be JSON any more
        assert differences(outcome(out), wanted) == [damaged.relative_to(out).as_posix()]
        return "not used, and refused by what would use it"
    assert_whole(out, wanted, damaged, code, told)
    return "made again"


def assert_refused_where_used(out: Path, damaged: Path) -> None:
    """The stage that wrote a file refuses it when it is asked for what it has done."""
    run = RunDirectory(out)
    name = damaged.relative_to(out).as_posix()
    [(stage, row)] = [
        (stage, row) for stage, row in run.manifest()["stages"].items() if name in row["seals"]
    ]
    with pytest.raises(BadArtifact, match=damaged.name):
        run.is_done(stage, row["input_hash"])


def assert_whole(out: Path, wanted: dict[str, Any], damaged: Path, code: int, told: str) -> None:
    """The run ended as if nothing had been; rows of a training's log may be gone, if it says so."""
    assert code == 0, told
    differ = differences(outcome(out), wanted)
    if differ and damaged.name == "train.jsonl":
        assert "train.jsonl has lost" in told, told
        differ.remove(damaged.relative_to(out).as_posix())
    assert differ == []


def check_finished(run: Path, pattern: str, damage: Callable[[Path], None]) -> str:
    wanted = outcome(run)
    with faults.set_aside(run):
        path = sorted(run.glob(pattern))[0]
        before = path.read_bytes()
        damage(path)
        assert path.read_bytes() != before
        return settle(run, wanted, path)


@pytest.mark.parametrize("name", ["supernet/trained.safetensors", "metrics.json"])
def test_a_flipped_bit_of_what_results_depend_on_never_passes_unnoticed(
    name: str, whole: Any
) -> None:
    assert check_finished(whole("lonas"), name, bit_flipped) == "refused"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method, names in FINISHED.items() for name in names]
)
def test_every_damaged_file_of_a_finished_run_is_refused_or_made_again(
    method: str, name: str, damage: Callable[[Path], None], whole: Any
) -> None:
    sys.stderr.write(f"{name} {damage.__name__}: {check_finished(whole(method), name, damage)}\n")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("stage", "nth", "pattern"), KILLED)
def test_every_damaged_file_of_a_killed_run_is_refused_or_made_again(
    stage: str, nth: int, pattern: str, context: Any, whole: Any, tmp_path: Path
) -> None:
    wanted = outcome(whole("lonas"))
    out = whole("lonas")
    with faults.set_aside(out):
        shutil.rmtree(out)
        [command, _] = commands(out.parent / "lonas.yaml", out, "lonas")
        died = attempt(context, command, out, Fault(stage, nth))
        assert died.struck is not None, died.err
        for damage in DAMAGES:
            with faults.set_aside(out):
                path = sorted(out.glob(pattern))[-1]
                if path.stat().st_size:
                    damage(path)
                    how = settle(out, wanted, path)
                    sys.stderr.write(f"{path.relative_to(out)} {damage.__name__}: {how}\n")


@pytest.mark.parametrize(
    "text", ["a: [", "method: shears", "- 1", "\x00", "model: [1]\ntask: gsm8k"]
)
def test_a_recipe_that_is_damaged_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    code, told = again(tmp_path)
    assert code == 2
    assert "recipe.yaml" in told
    assert told.count("error:") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


# --- seals ----------------------------------------------------------------------------------------


def test_a_file_that_changed_or_went_is_refused_with_what_made_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with run.stage("train", "a", run.supernet):
        run.supernet.mkdir()
        (run.supernet / "weights").write_bytes(bytes(100))
        (run.supernet / "README.md").write_text("card")
    assert run.is_done("train", "a")
    (run.supernet / "README.md").write_text("a better card")
    assert RunDirectory(tmp_path).is_done("train", "a")
    bit_flipped(run.supernet / "weights")
    for one in (run, RunDirectory(tmp_path)):  # it was read before it changed, or never
        with pytest.raises(
            BadArtifact, match=r"weights has changed since train wrote it"
        ) as caught:
            one.is_done("train", "a")
        assert f"delete {run.supernet} and run again" in str(caught.value)
    assert not run.is_done("train", "b")
    (run.supernet / "weights").unlink()
    with pytest.raises(BadArtifact, match="weights is gone since train"):
        run.is_done("train", "a")
    shutil.rmtree(run.supernet)
    assert not run.is_done("train", "a")


def test_seals_are_those_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert seal(tmp_path, [tmp_path / "a", tmp_path / "gone"]) == {"a": digest}


def test_a_line_is_read_with_its_own_checksum_alone() -> None:
    row = {"b": [0.1, None, float("inf")], "a": "ä"}
    kept = with_checksum(row)
    assert without_checksum(kept) == row == without_checksum(row)
    with pytest.raises(ValueError, match="checksum"):
        without_checksum(kept | {"a": "a"})
