"""``openvino``: one graph that keeps its cache inside; weights of 32, 8 or 4 bits.

transformers' own exporter (5.23) fails on a block without attention, and its graph has no attention
mask. OpenVINO reads the torch graph itself, rather than the ONNX one, because attention is one
operation there, which it runs faster.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from elastune.export.graph import Graph, trace
from elastune.export.reference import FLOAT32, Tolerance
from elastune.export.runtime_base import RuntimeFormat, generating_lines, plain_inputs

FILE = "openvino_model.xml"

#: So that what is computed is what was written: by itself, OpenVINO keeps its cache in 8 bits.
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}

TOLERANCES = {
    "float32": FLOAT32,
    # Of SmolLM2-135M, rounding alone moves the logits by 0.08 and 0.57 (the same done in torch).
    "int8": Tolerance(None, 0.15, False),
    "int4": Tolerance(None, 0.8, False),
}

#: Inputs that share a scale at 4 bits, and the least where that does not divide the width.
_GROUP, _LEAST_GROUP = 32, 16


def write_openvino(model: PreTrainedModel, graph: Graph, folder: Path, weights: str) -> None:
    """Write ``openvino_model.xml``, the graph, and ``openvino_model.bin``, the weights.

    Args:
        model: of the graph.
        graph: of the model.
        folder: where to.
        weights: ``"float32"``; ``"int8"``, of one scale and zero a row; or ``"int4"``, of
            one scale and zero a group of 32 or fewer, and embeddings and the head in int8.
    """
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = openvino.convert_model(trace(graph, model))
    _name(made, graph)
    if weights != "float32":
        made = _compress(made, weights)
    if graph.generates:
        _keep_cache_inside(made, graph)
    openvino.save_model(made, folder / FILE, compress_to_fp16=False)


def _name(made: Any, graph: Graph) -> None:
    """Name inputs and outputs, and say the sizes of the cache."""
    for port, name in zip(made.inputs, graph.inputs, strict=True):
        port.get_tensor().set_names({name})
    for port, name in zip(made.outputs, graph.outputs, strict=True):
        port.get_tensor().set_names({name})
    sizes = [size for size in graph.cache for _ in ("key", "value")]
    past = [n for n in graph.inputs if n.startswith("past_key_values.")]
    shapes = {n: [-1, s.kv_heads, -1, s.head_dim] for n, s in zip(past, sizes, strict=True)}
    if shapes:
        made.reshape({n: shapes.get(n, [-1, -1]) for n in graph.inputs})


def _compress(made: Any, weights: str) -> Any:
    """Round the weights of linear layers and embeddings; no data is needed."""
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    quiet = contextlib.redirect_stdout(io.StringIO())  # of a progress bar
    with quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if weights == "int8":
            return nncf.compress_weights(made, mode=nncf.CompressWeightsMode.INT8_ASYM)
        adjust = nncf.GroupSizeFallbackMode.ADJUST
        return nncf.compress_weights(
            made,
            mode=nncf.CompressWeightsMode.INT4_ASYM,
            group_size=_GROUP,
            ratio=1.0,
            advanced_parameters=nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=adjust, min_adjusted_group_size=_LEAST_GROUP
            ),
        )


def _keep_cache_inside(made: Any, graph: Graph) -> None:
    """Turn inputs and outputs of the cache into variables of the model.

    A new input ``beam_idx`` (rows,) says of which row each row goes on: 0, 1, 2, ... unless a beam
    search picks others. The cache starts empty, of as many rows as ``input_ids`` has.
    """
    import numpy as np
    import openvino.opset14 as ops
    from openvino import Type
    from openvino.passes import MakeStateful, Manager

    beam = ops.parameter([-1], Type.i32, name="beam_idx")
    beam.output(0).get_tensor().set_names({"beam_idx"})
    made.add_parameters([beam])
    past = [name for name in graph.inputs if name.startswith("past_key_values.")]
    for name in past:
        port = made.input(name)
        users = port.get_target_inputs()
        picked = ops.gather(port, beam, ops.constant(0, Type.i64))
        for user in users:
            user.replace_source_output(picked.output(0))
    made.validate_nodes_and_infer_types()
    pairs = dict(zip(past, [n for n in graph.outputs if n.startswith("present.")], strict=True))
    manager = Manager()
    manager.register_pass(MakeStateful(pairs))
    manager.run_passes(made)
    rows = ops.gather(
        ops.shape_of(made.input("input_ids"), output_type="i64"),
        ops.constant([0], Type.i64),
        ops.constant(0, Type.i64),
    )
    for op in made.get_ordered_ops():
        if op.get_type_name() == "ReadValue":
            _, heads, _, head_dim = op.output(0).get_partial_shape()
            rest = np.array([heads.get_length(), 0, head_dim.get_length()], np.int64)
            shape = ops.concat([rows, ops.constant(rest)], axis=0)
            op.set_arguments([ops.broadcast(ops.constant(0.0, Type.f32), shape)])
    made.validate_nodes_and_infer_types()


def _example(graph: Graph) -> str:
    start = "import numpy as np, openvino\n\n"
    options = f"options = {EXACT}  # {{}} lets OpenVINO round more, and be faster\n"
    load = f'model = openvino.compile_model("{FILE}", "CPU", options)\n'
    if not graph.generates:
        run = "outputs = model(feed)\n"
        return start + options + load + plain_inputs(graph) + run
    return (
        start
        + options
        + load
        + generating_lines(
            graph,
            cache="request = model.create_infer_request()  # keeps the cache until reset_state()\n",
            run='    feed["beam_idx"] = np.arange(1, dtype=np.int32)\n'
            '    logits = request.infer(feed)["logits"]\n',
        )
    )


OPENVINO = RuntimeFormat(
    "openvino",
    "openvino",
    FILE,
    write_openvino,
    _example,
    tolerances=TOLERANCES,
    packages=("openvino", "nncf"),
    runtime_options=EXACT,
)
