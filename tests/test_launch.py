"""The files of recipes/launch: read by accelerate, and run as a batch system would run them."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from postgres_server import NoServer, postgres
from test_processes import KINDS, ROUNDING, check_same, recipe
from tiny_run import cli

from elastune.files import read_json

LAUNCH = Path(__file__).resolve().parent.parent / "recipes" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sbatch"))

SRUN = """#!{python}
# What srun does: the same command on every node, all ended when one fails.
import os, subprocess, sys, time
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
nodes = [
    subprocess.Popen(words, env=os.environ | {{"SLURM_NODEID": str(i)}}, start_new_session=True)
    for i in range(int(os.environ["SLURM_NNODES"]))
]
while None in (codes := [node.poll() for node in nodes]):
    if any(codes):
        [os.killpg(node.pid, 15) for node, code in zip(nodes, codes) if code is None]
        break
    time.sleep(0.05)
sys.exit(max(abs(node.wait()) for node in nodes))
"""


def submit(folder: Path, script: str, *words: str | Path, gpus: int = 1) -> None:
    """Run a batch script as on two nodes that are both this machine."""
    programs = folder / "bin"
    programs.mkdir()
    python = sys.executable
    for name, text in {
        "srun": SRUN.format(python=python),
        "scontrol": "#!/bin/sh\necho 127.0.0.1\necho 127.0.0.1\n",
        "accelerate": f'#!/bin/sh\nexec {python} -m accelerate.commands.accelerate_cli "$@"\n',
        "elastune": f'#!/bin/sh\nexec {python} -m elastune "$@"\n',
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    slurm = {
        "SLURM_JOB_ID": str((port - 20000) % 20000 + 20000 * (port >= 40000)),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": str(gpus),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "TMPDIR": str(folder),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", LAUNCH / script, *words],
        env=os.environ | slurm,
        text=True,
        capture_output=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp", DistributedType.MULTI_GPU),
        ("fsdp2", DistributedType.FSDP),
        ("zero2", DistributedType.DEEPSPEED),
    ],
)
def test_accelerate_reads_its_files(name: str, kind: DistributedType) -> None:
    path = LAUNCH / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert config.distributed_type == kind
    assert config.mixed_precision == "no"
    assert f"--config_file recipes/launch/{name}.yaml" in path.read_text()
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name == "zero2":
        assert config.deepspeed_config["zero_stage"] == 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_batch_scripts_are_bash_and_say_how_they_are_used(script: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    subprocess.run([bash, "-n", script], check=True)
    alone = subprocess.run([bash, script], text=True, capture_output=True, check=False)
    assert alone.returncode == 2
    assert alone.stderr.startswith("usage: sbatch ")
    if checker := shutil.which("shellcheck"):
        subprocess.run([checker, script], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("ddp", "structure"), ("fsdp2", "ranks")])
def test_two_nodes_train_the_weights_of_one_process(name: str, kind: str, tmp_path: Path) -> None:
    file = recipe(tmp_path, **KINDS[kind])
    submit(tmp_path, "train.sbatch", LAUNCH / f"{name}.yaml", file, tmp_path / "two")
    cli("run", file, "--out", tmp_path / "one")
    check_same(tmp_path / "two", tmp_path / "one", ROUNDING[kind])


@pytest.mark.slow
def test_two_nodes_search_together_through_a_server(tmp_path: Path) -> None:
    file = recipe(tmp_path, baselines=[])
    cli("run", file, "--out", tmp_path / "run")
    try:
        with postgres() as url:
            submit(tmp_path, "search.sbatch", tmp_path / "run", url, "--trials", "12", gpus=2)
            trials = read_json(tmp_path / "run" / "search" / "trials.json")
            found = [tuple(sorted(trial["config"].items())) for trial in trials["trials"]]
            assert len(found) == len(set(found)) == 12
            assert not list(tmp_path.glob("elastune-*"))  # copies are gone
            assert workers_of(url) >= 2
    except NoServer as error:
        pytest.skip(f"no PostgreSQL server can be started: {error}")


def workers_of(url: str) -> int:
    """Return how many processes took part in the largest search of a database."""
    import optuna

    storage = optuna.storages.RDBStorage(url.replace("postgresql:", "postgresql+psycopg:"))
    studies = optuna.get_all_study_summaries(storage)
    name = max(studies, key=lambda study: study.n_trials).study_name
    trials = optuna.load_study(study_name=name, storage=storage).trials
    storage.remove_session()
    return len({trial.user_attrs["worker"]["pid"] for trial in trials})
