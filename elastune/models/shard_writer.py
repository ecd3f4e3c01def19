"""Write a checkpoint shard by shard, so that no more than a shard is in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from elastune.files import write_json


class ShardWriter:
    """Writes the weights of a checkpoint in the layout that transformers reads.

    Args:
        folder: an existing one; whoever made it sees to it that it appears whole.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: list[list[str]] = []
        self._bytes = 0

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as the next shard; of none at all there is no shard."""
        if not tensors:
            return
        self._shards.append(list(tensors))
        self._bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        # Tensors that share memory would be written twice, and are refused by the format.
        own = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(own, self._file(len(self._shards)), metadata={"format": "pt"})

    def finish(self) -> None:
        """Give the shards their final names, and write the index."""
        total = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{total:05d}.safetensors"
            self._file(number).rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
        write_json(self._folder / "model.safetensors.index.json", index)

    def _file(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.safetensors"
