"""``onnx``: one graph for onnxruntime, and what else reads ONNX.

Of transformers' own exporter (5.23) the graph has no attention mask, so that rows of different
lengths cannot be batched, and generation takes two graphs with all weights each.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from transformers import PreTrainedModel

from elastune.export.graph import Graph, trace
from elastune.export.runtime_base import RuntimeFormat, generating_lines, plain_inputs

FILE = "model.onnx"


def write_onnx(model: PreTrainedModel, graph: Graph, folder: Path, weights: str) -> None:
    """Write ``model.onnx`` and its weights, ``model.onnx.data``."""
    program = trace(graph, model)
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)  # of operators that no model here has
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                program,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamo=True,
                verbose=False,
            )
            assert made is not None
            made.save(folder / FILE, external_data=True)
    finally:
        noisy.setLevel(level)


def _example(graph: Graph) -> str:
    start = (
        'import numpy as np, onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")\n'
    )
    if not graph.generates:
        return start + plain_inputs(graph) + "outputs = session.run(None, feed)\n"
    return start + generating_lines(
        graph,
        cache="cache = {\n"
        "    i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)\n"
        "    for i in session.get_inputs() if i.name.startswith('past')\n"
        "}\n",
        run="    logits, *present = session.run(None, feed | cache)\n"
        "    cache = dict(zip(cache, present))\n",
    )


ONNX = RuntimeFormat(
    "onnx",
    "onnxruntime",
    FILE,
    write_onnx,
    _example,
    packages=("onnx", "onnxscript", "onnxruntime"),
)
