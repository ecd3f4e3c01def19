"""What a training leaves on disk: weights, and checkpoints to go on from."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_pt_utils import safe_globals

from elastune.errors import BadArtifact
from elastune.files import read_json, whole_file
from elastune.seals import broken
from elastune.space import SearchSpace, SubnetConfig
from elastune.step_log import COMPLETE

_WEIGHTS = "trained.safetensors"
_LOG = logging.getLogger(__name__)


class Trainee(Protocol):
    """What can be trained: a `SuperNetwork`, or a `WholeModel` that has nothing to choose."""

    model: PreTrainedModel

    @property
    def space(self) -> SearchSpace | None:
        """What configurations are drawn from."""

    def activate(self, config: SubnetConfig) -> None:
        """Make ``config`` the network that runs."""

    def trained_state(self) -> dict[str, Tensor]:
        """Return what training changes, by name."""

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Copy in what `trained_state` returned."""


def save_trained(net: Trainee, folder: Path) -> None:
    """Write what training changed, whole or not at all."""
    state = {name: tensor.contiguous().cpu() for name, tensor in net.trained_state().items()}
    with whole_file(folder / _WEIGHTS) as partial:
        save_file(state, partial)


def load_trained(net: Trainee, folder: Path) -> None:
    """Read back what `save_trained` wrote.

    Raises:
        BadArtifact: missing, corrupt, or of another super-network; or a checkpoint whose other
            files are, or hold more than numbers.
    """
    _check_states(folder)
    path = folder / _WEIGHTS
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadArtifact(
            f"the trained weights {path} cannot be read: {error}",
            try_=f"delete {folder} and run again to train anew",
        ) from error
    net.load_trained_state(state)


def _check_states(folder: Path) -> None:
    """See that what the trainer goes on from can be read, and pickles nothing but numbers.

    The trainer itself reads them so, but what it raises then says little.
    """
    state = folder / "trainer_state.json"
    try:
        if state.is_file():
            TrainerState.load_from_json(str(state))
        with safe_globals():  # numpy's, in the state of its generator
            for path in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of JSON, zip and the unpickler
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadArtifact(
            f"the checkpoint {folder} cannot be gone on from: {said}",
            try_=f"delete {folder} and run again, to go on from what is before it",
        ) from error


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that was written to its end, and is as it was written.

    All others that are newer are deleted: a run would only meet them again.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for checkpoint in reversed(found):
        if (checkpoint / COMPLETE).is_file():
            if _is_whole(checkpoint):
                return str(checkpoint)
            _LOG.warning("%s is damaged, and left out", checkpoint)
            (checkpoint / COMPLETE).unlink()  # half deleted it must not be resumed from
        shutil.rmtree(checkpoint)
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Tell whether the files of a checkpoint are as its mark says; an empty one says nothing."""
    mark = checkpoint / COMPLETE
    if mark.stat().st_size == 0:  # of an earlier version
        return True
    try:
        return not broken(checkpoint, read_json(mark))
    except (BadArtifact, AttributeError, TypeError):
        return False


def forget_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a training that is done."""
    for checkpoint in folder.glob("checkpoint-*"):
        # Unmarked first: one that is half deleted must not be resumed from.
        (checkpoint / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)
