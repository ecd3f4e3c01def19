"""A frozen base in shards: each process keeps a part of every block, and joins one at a time.

What trains stays whole in every process, so that optimizer, checkpoints and averaged gradients know
nothing of it; a block's weights are whole while it runs, so that sub-networks are cut as ever.
Embeddings and the head, which are read outside of blocks, stay whole, too.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from elastune import processes
from elastune.models import architecture


def shard_frozen_(model: PreTrainedModel) -> None:
    """Leave this process its part of the blocks' frozen weights (FSDP2); all processes call it.

    Args:
        model: of a known architecture. Its blocks run only in all processes at once from here on.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (processes.count(),))
    for block in architecture(model).blocks_of(model):
        trained = {p for p in block.parameters() if p.requires_grad}
        if len(trained) < len(list(block.parameters())):
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
