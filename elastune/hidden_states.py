"""The hidden states between two blocks of a model, batch by batch: in memory, or a file for each.

Shapes: `R` rows of a batch, `L` tokens a row, `D` model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from safetensors.torch import load, save_file
from torch import Tensor


class States(Protocol):
    """What `elastune.calibrate` asks of the hidden states of all batches; a list can do it."""

    def append(self, value: Tensor, /) -> None:
        """Add a batch, ``(R, L, D)``."""

    def __getitem__(self, position: int, /) -> Tensor: ...

    def __setitem__(self, position: int, value: Tensor, /) -> None: ...

    def __len__(self) -> int: ...


class StatesOnDisk:
    """Hidden states in a folder, one file a batch; in memory is only the batch asked for.

    Files are read and written rather than mapped: pages of a mapping would count as memory in use.

    Args:
        folder: an existing one; whoever made it deletes it.
        name: what file names begin with.
    """

    def __init__(self, folder: Path, name: str = "hidden") -> None:
        self._folder = folder
        self._name = name
        self._devices: list[str] = []

    def append(self, value: Tensor, /) -> None:
        """Add a batch, ``(R, L, D)``."""
        self._devices.append(str(value.device))
        self[len(self) - 1] = value

    def __getitem__(self, position: int, /) -> Tensor:
        # Not `load_file`, which maps.
        found = load(self._file(position).read_bytes())["hidden"]
        return found.to(self._devices[position])

    def __setitem__(self, position: int, value: Tensor, /) -> None:
        save_file({"hidden": value.contiguous()}, self._file(position))

    def __len__(self) -> int:
        return len(self._devices)

    def _file(self, position: int) -> Path:
        return self._folder / f"{self._name}-{position}.safetensors"
