"""Training in several processes, as ``accelerate launch`` or torchrun start them.

Process 0 runs the command; the others wait for it. Whenever it trains, they are told which training
it is, take part, and wait again: everything else happens once. Gradients are averaged once per
optimizer step (`average_gradients`), whatever sub-networks were drawn in it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from elastune.errors import BadRecipe, ElastuneError, TrainingDiverged

T = TypeVar("T")

_OWNER = "ELASTUNE_LAUNCHED_PID"
"""Which process was launched; what it starts itself has inherited the launcher's variables."""

_PATIENCE = timedelta(days=14)
"""The others wait while process 0 sparsifies and searches, which may take long."""

_BUCKET_BYTES = 64 * 2**20


@dataclass
class _Group:
    """What this process knows of the others."""

    joined: bool = False
    training: bool = False
    shards: bool = False
    zero_stage: int = 0


_group = _Group()


def count() -> int:
    """Return how many processes train together."""
    owner = os.environ.get(_OWNER)
    if owner is not None and owner != str(os.getpid()):
        return 1
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process; 0 is the one that reads, writes and reports."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_main() -> bool:
    """Tell whether this process is the one that reads, writes and reports."""
    return rank() == 0


def join() -> None:
    """Meet the other processes; called by all of them, once.

    Raises:
        BadRecipe: only one process of those asked for was started; a stage of ZeRO was asked for
            from whose shards sub-networks cannot be cut.
    """
    _refuse_lonely()
    if _group.joined:
        return
    _group.zero_stage = _asked_zero_stage()
    _group.shards = _is_set("ACCELERATE_USE_FSDP")
    # Else the Trainer would hand over model and optimizer, adapters and all.
    os.environ["ACCELERATE_USE_FSDP"] = os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    if count() == 1:  # shards would be whole
        _group.zero_stage, _group.shards = 0, False
        return
    os.environ[_OWNER] = str(os.getpid())
    import torch
    from accelerate import PartialState

    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else it takes each process for the only one
    PartialState(cpu=_is_set("ACCELERATE_USE_CPU"), timeout=_PATIENCE)
    _group.joined = True
    if is_main():
        signal.signal(signal.SIGTERM, _on_end)


def shards_base() -> bool:
    """Tell whether a training is on whose frozen base is in shards (``--use_fsdp``)."""
    return _group.shards and _group.training


def zero_stage() -> int:
    """Return the stage of DeepSpeed's ZeRO that trains (``--use_deepspeed``): 1, 2, or 0: none."""
    return _group.zero_stage if _group.training else 0


def wait() -> None:
    """Return when all processes have come here."""
    if count() > 1:
        import torch.distributed as dist

        join()
        dist.barrier()


def from_main(make: Callable[[], T]) -> T:
    """Let process 0 make something, and return it in all of them."""
    if count() == 1:
        return make()
    return _said(make() if is_main() else None)  # type: ignore[no-any-return]


@contextmanager
def main_first() -> Iterator[None]:
    """Let process 0 through, and the others once it is done: they find what it left on disk."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def together(function: Callable[..., T], run: Any, *args: Any) -> T:
    """Call ``function(run, *args)`` in all processes; process 0 gets what its own call returns.

    Args:
        function: of a module of this package, at its top level.
        run: an `elastune.run.Run`; the others open the same run directory.
        args: JSON-like.

    Raises:
        ElastuneError: another process was lost.
    """
    if count() == 1 or _group.training:
        return function(run, *args)
    job = {
        "function": (function.__module__, function.__qualname__),
        "root": str(run.dir.root.absolute()),
        "recipe": run.recipe.model_dump(mode="json"),
        "args": args,
    }
    _said(job)
    _group.training = True  # and stays so if this fails: then there is nobody to talk to
    found = _unless_lost(lambda: function(run, *args))
    _group.training = False
    return found


def release() -> None:
    """Let the others end; called by process 0 when it has done all it had to."""
    if count() > 1 and not _group.training:
        _said(None)
        _leave()


def follow(open_run: Callable[[Mapping[str, Any]], Any]) -> None:
    """Take part in every training of process 0, until it has done all it had to.

    Args:
        open_run: job -> the run of its ``root`` and ``recipe``; to read from, never to write.

    Raises:
        ElastuneError: a training failed; process 0 is lost with this one.
    """
    while (job := _said(None)) is not None:
        module, name = job["function"]
        function = getattr(importlib.import_module(module), name)
        _group.training = True
        try:
            _unless_lost(lambda: function(open_run(job), *job["args"]))  # noqa: B023
        except (BadRecipe, TrainingDiverged):
            raise SystemExit(2) from None  # of all processes at once: process 0 says it
        _group.training = False
    _leave()


def average_gradients(parameters: Iterable[Any]) -> None:
    """Replace gradients by their means over all processes.

    All processes must hold gradients of the same parameters, as they do where they drew the same
    sub-networks; what no draw used has none anywhere, and keeps none.
    """
    if count() == 1:
        return
    import torch
    import torch.distributed as dist
    from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

    gradients = [p.grad for p in parameters if p.grad is not None]
    for dtype in sorted({g.dtype for g in gradients}, key=str):
        for bucket in _buckets([g for g in gradients if g.dtype == dtype]):
            flat = _flatten_dense_tensors(bucket)
            dist.all_reduce(flat)
            flat /= count()
            with torch.no_grad():
                for old, new in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                    old.copy_(new)


def total(*values: float) -> list[float]:
    """Return the sums of numbers over all processes."""
    if count() == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    summed = torch.tensor(values, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        summed = summed.to(torch.cuda.current_device())
    dist.all_reduce(summed)
    return [float(value) for value in summed]


def _buckets(tensors: list[Any]) -> Iterator[list[Any]]:
    """Yield tensors in groups of some size: messages neither many nor huge."""
    bucket: list[Any] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
        if size >= _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _said(what: Any) -> Any:
    """Return what process 0 says; the others' argument is ignored."""
    import torch.distributed as dist

    join()
    box = [what]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _unless_lost(call: Callable[[], T]) -> T:
    """Call something that talks to the other processes.

    Raises:
        ElastuneError: one of them does not answer any more.
    """
    import torch.distributed as dist

    try:
        return call()
    except ElastuneError:
        raise
    except (dist.DistError, RuntimeError) as error:
        lost = isinstance(error, dist.DistError) or any(
            sign in str(error) for sign in ("gloo", "Connection", "NCCL", "Broken pipe")
        )
        if not lost:
            raise
        raise _lost(str(error).strip().splitlines()[0].partition(". ")[0]) from error


def _lost(reason: str) -> ElastuneError:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this is being said already
    return ElastuneError(
        f"another process of this training was lost ({reason})",
        try_="run the same command again: it goes on from the last checkpoint",
    )


def _on_end(*_: Any) -> None:
    raise _lost("the launcher ends them all")


def _refuse_lonely() -> None:
    """Refuse to be the one process that was started where several were asked for."""
    alone = "WORLD_SIZE" not in os.environ and _OWNER not in os.environ
    # It tells a single process where to meet the others, and starts none.
    if alone and _is_set("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ:
        raise BadRecipe(
            "accelerate launch --cpu starts one process, whatever --num_processes says",
            try_="torchrun --nproc_per_node 2 -m elastune ..., or accelerate launch --multi_gpu, "
            "which takes CPUs where there are no GPUs; without --num_processes for one process",
        )


def _asked_zero_stage() -> int:
    """Return the stage of ZeRO that accelerate was launched with; 0: DeepSpeed was not asked for.

    Raises:
        BadRecipe: a stage that shards the weights, or none.
    """
    if not _is_set("ACCELERATE_USE_DEEPSPEED"):
        return 0
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        try:
            settings = json.loads(Path(file).read_text(encoding="utf-8"))
            stage = str(settings["zero_optimization"]["stage"])
        except (OSError, ValueError, LookupError, TypeError):
            raise BadRecipe(
                f"no ZeRO stage can be read from {file}",
                try_='a JSON file with {"zero_optimization": {"stage": 2}}, or --zero_stage 2',
            ) from None
    if stage not in ("1", "2"):
        raise BadRecipe(
            f"ZeRO stage {stage} was asked for, from whose shards no sub-networks can be cut",
            try_="--zero_stage 2, which shards what the optimizer keeps, or accelerate launch "
            "--use_fsdp for a frozen base in shards",
        )
    return int(stage)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
