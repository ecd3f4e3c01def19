"""A checkpoint larger than memory: its model on the meta device, and one block's weights at a time.

What lies outside of the blocks and is needed to run them (embeddings, norms) is read once and
stays; the head is read where a loss is wanted; each block is read when its turn comes, and
forgotten afterwards. Names in the files are those that transformers would give them.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from elastune.errors import BadArtifact, UnsupportedModel
from elastune.models.checkpoint import weight_files
from elastune.models.families import architecture
from elastune.models.load import DTYPES, checkpoint_folder, load_model

if TYPE_CHECKING:
    from elastune.models.shard_writer import ShardWriter


class StreamedModel:
    """A model of which only what is asked for is in memory.

    Args:
        source: a built-in name, a folder, or a ``.gguf`` file; hub ids once they are downloaded.
        dtype: as `load_model` takes it; what is read is cast to it.
        device: where weights are put; the CPU by default.
        head: as `load_model` takes it.
        num_labels: likewise.
        whole_head: read the weights of the head, too, so that a loss can be computed.

    Attributes:
        model: in evaluation mode; weights that are not in memory are on the meta device.
        tokenizer: with a pad token.

    Raises:
        BadArtifact: the checkpoint is missing, damaged, or lacks weights of the model, a new head's
            included: those are drawn at random, which only the model in memory can do alike.
        UnsupportedModel: unknown family, or a checkpoint whose tensors transformers would put
            together differently rather than rename.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        dtype: str = "float32",
        device: str | None = None,
        head: Any = None,
        num_labels: int | None = None,
        whole_head: bool = False,
    ) -> None:
        self.model: PreTrainedModel
        self.tokenizer: PreTrainedTokenizerBase
        self.folder = checkpoint_folder(source)
        self.model, self.tokenizer = load_model(
            source, dtype=dtype, device="meta", head=head, num_labels=num_labels
        )
        self._dtype = DTYPES[dtype]
        self._device = device or "cpu"
        self._places = _places(self.folder, self.model)
        record = architecture(self.model)
        self.block_names = record.block_names(self.model)
        base = f"{self.model.base_model_prefix}." if self.model.base_model is not self.model else ""
        blocks = tuple(f"{name}." for name in self.block_names)
        outside = [name for name in self._places if not name.startswith(blocks)]
        self._kept = [n for n in outside if whole_head or n.startswith(base)]
        """What is in memory all the time."""
        self._left = [name for name in outside if name not in set(self._kept)]
        """What is only copied from file to file."""
        self._pool: dict[tuple[str, torch.Size], Tensor] = {}
        """Memory of one block, used by all in turn: allocators do not give back what blocks of
        their own would leave between what is still in use."""
        self._map_kept()
        self.model.eval()

    @contextmanager
    def resident(self, index: int, writer: ShardWriter | None = None) -> Iterator[None]:
        """Have a block's weights in memory; write them in the end, as they are then.

        Nothing is written where the context ends with an exception.
        """
        names = self._of_block(index)
        if index == 0:
            self._map_kept()  # embeddings were looked up: the pages of their file are let go
        for name in names:
            self._put(name, self._pooled(name, index))
        try:
            yield
            if writer is not None:
                writer.write(self._stored(names))
        finally:
            for name in names:
                set_module_tensor_to_device(self.model, name, "meta", clear_cache=False)
            _trim()

    def write_rest(self, writer: ShardWriter) -> None:
        """Write what lies outside of the blocks: what is in memory, then the others one by one."""
        writer.write(self._stored(self._kept))
        for name in self._left:
            writer.write({self._places[name][1]: self._read(name)})

    def _of_block(self, index: int) -> list[str]:
        prefix = f"{self.block_names[index]}."
        return [name for name in self._places if name.startswith(prefix)]

    def _stored(self, names: list[str]) -> dict[str, Tensor]:
        """Return tensors of the model by the names they have in the checkpoint."""
        return {self._places[n][1]: self.model.get_parameter_or_buffer(n).detach() for n in names}

    def _map_kept(self) -> None:
        """Read what lies outside of the blocks: where nothing is cast, its file is only mapped."""
        for name in self._kept:
            self._put(name, self._read(name))
        self.model.tie_weights()
        self.model.requires_grad_(False)

    def _put(self, name: str, value: Tensor) -> None:
        set_module_tensor_to_device(self.model, name, self._device, value=value, clear_cache=False)

    def _pooled(self, name: str, index: int) -> Tensor:
        """Read a weight of a block into the memory that this weight has in every block."""
        value = self._read(name)
        key = (name.removeprefix(self.block_names[index]), value.shape)
        if key not in self._pool:
            self._pool[key] = torch.empty_like(value, device=self._device)
        return self._pool[key].copy_(value)

    def _read(self, name: str) -> Tensor:
        file, key = self._places[name]
        with safe_open(file, "pt") as tensors:
            value: Tensor = tensors.get_tensor(key)
        return value.to(self._dtype) if value.is_floating_point() else value


def weight_bytes(model: PreTrainedModel) -> int:
    """Return how many bytes a model's weights take, or would take if they were in memory."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _trim() -> None:
    """Have the C library give back what activations and scores left; elsewhere do nothing."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _places(folder: Path, model: PreTrainedModel) -> Mapping[str, tuple[Path, str]]:
    """Return name in the model -> file and name there, of all that the model needs."""
    wanted = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters: list[Any] = [e for e in transforms if not isinstance(e, WeightRenaming)]
    found: dict[str, tuple[Path, str]] = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                name, is_converted = rename_source_key(
                    key, renamings, converters, model.base_model_prefix, wanted
                )
                if is_converted is not None:
                    raise UnsupportedModel(
                        f"the tensor {key!r} of {str(folder)!r} has to be taken apart or put "
                        "together with others, which is not done block by block",
                        try_="load it and save it again with transformers, or do without streaming",
                    )
                if name in wanted:
                    found[name] = (file, key)
    tied: Mapping[str, str] = model.all_tied_weights_keys
    for name, other in tied.items():
        if name in found and other not in found:
            found[other] = found[name]
    found = {name: place for name, place in found.items() if name not in tied}
    missing = [name for name in wanted if name not in found and name not in tied]
    if missing:
        raise BadArtifact(
            f"the checkpoint {str(folder)!r} lacks {len(missing)} tensors of a "
            f"{type(model).__name__}, such as {missing[0]}, so that it cannot be streamed",
            try_="a checkpoint that has them; or without streaming, where they are a new head's",
        )
    return found
