"""Peak memory of some work, measured in a process of its own.

A process's high-water mark never goes down, so that two things measured in one process would share
it: each gets a fresh interpreter. On the CPU the figure is the resident set, which counts shared
libraries and what the allocator keeps; on a GPU it is what torch allocated.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from elastune.errors import BadRecipe

Work = Callable[[], object]

_CHILD = "from elastune.memory import report_peak; report_peak()"
_MB = 2**20


@dataclass(frozen=True)
class PeakMemory:
    """Memory of one piece of work, in MB of 2**20 bytes.

    Attributes:
        peak_mb: the most that was in use at once while it ran, what was there before it included.
        start_mb: what was in use before it: interpreter, libraries, the model. Weights that are
            mapped from a file are in use once they were read.
        device: ``"cpu"`` (resident memory of the process) or ``"cuda"`` (allocated by torch).
    """

    peak_mb: float
    start_mb: float
    device: str


def peak_memory(
    prepare: str, options: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
) -> PeakMemory:
    """Measure the peak memory of some work in a fresh interpreter.

    Args:
        prepare: ``"module:function"``, importable with this process's ``sys.path``. The function
            gets ``options``, loads what is needed and returns the work: a function without
            arguments, which alone is measured.
        options: anything that JSON can say.
        timeout_s: after which the process is killed.

    Raises:
        BadRecipe: a name that cannot be imported, or work that failed; with its last words.
    """
    if prepare.count(":") != 1:
        raise BadRecipe(
            f"work is named 'module:function', got {prepare!r}",
            try_="prepare='package.module:function'",
        )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "peak.json"
        task = {"prepare": prepare, "options": dict(options or {}), "answer": str(answer)}
        try:
            done = subprocess.run(
                [sys.executable, "-c", _CHILD],
                input=json.dumps(task),
                capture_output=True,
                text=True,
                env=environment,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise BadRecipe(f"{prepare} did not end within {timeout_s} s") from None
        if done.returncode or not answer.exists():
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise BadRecipe(
                f"{prepare} failed in a process of its own: {lines[-1]}",
                try_="call the function in a process of your own to see why it fails",
            )
        return PeakMemory(**json.loads(answer.read_text(encoding="utf-8")))


def prepare_forward(model: str, batch: int = 1, tokens: int = 256, new_tokens: int = 0) -> Work:
    """Load a model and return its prefill, and ``new_tokens`` steps of decoding, as work.

    Args:
        model: a built-in name, a folder or a hub id.
        batch: sequences at once.
        tokens: of the prompt.
        new_tokens: at most; 0 for no decoding.
    """
    from elastune.models import load_model

    loaded, _ = load_model(model)
    vocabulary = int(loaded.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch, tokens), generator=generator).to(loaded.device)

    @torch.inference_mode()
    def work() -> None:
        if new_tokens == 0:
            loaded(input_ids=ids)
            return
        loaded.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )

    return work


def report_peak() -> None:
    """Do the work that standard input names and write what it took: the child's side."""
    task = json.load(sys.stdin)
    module, _, function = task["prepare"].partition(":")
    work: Work = getattr(importlib.import_module(module), function)(**task["options"])
    peak = _peak_on_gpu(work) if torch.cuda.is_initialized() else _peak_resident(work)
    Path(task["answer"]).write_text(json.dumps(asdict(peak)), encoding="utf-8")


def _peak_on_gpu(work: Work) -> PeakMemory:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return PeakMemory(torch.cuda.max_memory_allocated() / _MB, start / _MB, "cuda")


def _peak_resident(work: Work) -> PeakMemory:
    start = _resident_mb("VmRSS")
    # Loading may need more than the work: forget its high-water mark where the system can.
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        start = min(start, _resident_mb("VmHWM"))
    work()
    return PeakMemory(_resident_mb("VmHWM"), start, "cpu")


def _resident_mb(field: str) -> float:
    """Return what is resident now (VmRSS) or was at most (VmHWM)."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
    except (OSError, StopIteration):
        import resource

        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest / (_MB if sys.platform == "darwin" else 1024)
