"""What a format for a runtime other than transformers is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from elastune.export.graph import Graph
from elastune.export.reference import FLOAT32, Tolerance


@dataclass(frozen=True)
class RuntimeFormat:
    """One way to export a model as a graph.

    Attributes:
        name: as users write it.
        runtime: the package that runs it, without torch (but for torch itself) and transformers.
        file: the one that is loaded.
        write: (model, its graph, folder, weights) writes it.
        example: (graph) -> Python lines that load and run it.
        tolerances: how the weights are kept -> what is allowed; the first is the default.
        packages: what writing it needs besides torch.
        runtime_options: given to the runtime when it is checked.
        notes: what the user should know, a sentence each.
    """

    name: str
    runtime: str
    file: str
    write: Callable[[PreTrainedModel, Graph, Path, str], None]
    example: Callable[[Graph], str]
    tolerances: Mapping[str, Tolerance] = field(default_factory=lambda: {"float32": FLOAT32})
    packages: tuple[str, ...] = ()
    runtime_options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def generating_lines(graph: Graph, *, cache: str, run: str, types: str = "np") -> str:
    """Return Python lines that generate 20 tokens greedily.

    Args:
        graph: of a causal language model.
        cache: lines that make the empty cache.
        run: lines that set ``logits`` (and the cache) from ``feed``.
        types: not used by arrays of numpy.
    """
    positions = '\n        "position_ids": np.arange(n - new.shape[1], n)[None],'
    return (
        "ids = new = np.array([[1, 2, 3]])  # the prompt: tokenizer(text)\n"
        f"{cache}"
        "for _ in range(20):\n"
        "    n = ids.shape[1]\n"
        "    feed = {\n"
        '        "input_ids": new,\n'
        '        "attention_mask": np.ones_like(ids),'
        f"{positions if 'position_ids' in graph.inputs else ''}\n"
        "    }\n"
        f"{run}"
        "    new = logits[:, -1:].argmax(-1)\n"
        "    ids = np.concatenate([ids, new], axis=1)\n"
    )


def plain_inputs(graph: Graph) -> str:
    """Return Python lines that set ``feed`` for a model without a cache."""
    if "pixel_values" in graph.inputs:
        shape = tuple(graph.example[0].shape[1:])
        return f"feed = {{'pixel_values': np.zeros((1, *{shape}), np.float32)}}\n"
    rest = "".join(
        f', "{name}": np.{"ones" if name == "attention_mask" else "zeros"}_like(ids)'
        for name in graph.inputs[1:]
    )
    return (
        "ids = np.array([[1, 2, 3]])  # the text: tokenizer(text)\n"
        f'feed = {{"input_ids": ids{rest}}}\n'
    )
