"""``torch-export``: a .pt2 file that torch loads by itself, without the model's Python code."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from transformers import PreTrainedModel

from elastune.export.fresh_run import refuse_pickles
from elastune.export.graph import Graph, trace
from elastune.export.runtime_base import RuntimeFormat, generating_lines, plain_inputs

FILE = "model.pt2"


def write_torch_export(model: PreTrainedModel, graph: Graph, folder: Path, weights: str) -> None:
    """Write ``model.pt2``: weights as raw bytes, the graph as JSON, nothing pickled."""
    program = trace(graph, model)
    program.example_inputs = None  # would be pickled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, folder / FILE)
    refuse_pickles(folder / FILE)


def _example(graph: Graph) -> str:
    start = (
        "import numpy as np, torch\n\n"
        'model = torch.export.load("model.pt2").module()\n'
        "torch.set_grad_enabled(False)\n"
    )
    if not graph.generates:
        run = "outputs = model(*(torch.from_numpy(v) for v in feed.values()))\n"
        return start + plain_inputs(graph) + run
    sizes = [(size.kv_heads, size.head_dim) for size in graph.cache]
    return start + generating_lines(
        graph,
        cache=f"sizes = {sizes}\n"
        "cache = [(torch.zeros(1, h, 0, d), torch.zeros(1, h, 0, d)) for h, d in sizes]\n",
        run="    given = (torch.from_numpy(v) for v in feed.values())\n"
        "    logits, cache = model(*given, cache)\n"
        "    logits = logits.numpy()\n",
    )


TORCH_EXPORT = RuntimeFormat(
    "torch-export",
    "torch",
    FILE,
    write_torch_export,
    _example,
    notes=(
        "The archive holds raw weights and JSON, nothing pickled. torch.export.load would unpickle "
        "what a changed archive holds: load files of people you trust.",
    ),
)
