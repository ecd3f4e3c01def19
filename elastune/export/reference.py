"""What an exported graph must compute: inputs and the torch model's outputs, kept beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.errors import ElastuneError
from elastune.export import fresh_run
from elastune.export.graph import Graph

Arrays = dict[str, Any]

N_NEW = 16
"""Tokens generated after each prompt."""

PROMPTS = ("The capital of France is", "Once upon a time, there was a small")


class Tolerance(NamedTuple):
    """How far the outputs of an export may be from those of the torch model.

    Both hold for all outputs of one name in one case; those at padding are left out.
    """

    largest: float | None
    """Largest difference, for outputs up to 10 in size; in proportion beyond. None: no limit."""
    relative: float
    """Length of the difference over the length of the outputs, as vectors; of logits over a
    vocabulary less their mean at each place, which no probability depends on."""
    same_text: bool
    """Greedy text must be the same, token by token."""


#: A cut SmolLM2-135M amplifies rounding: at single places OpenVINO was 3.3e-3 from float64, torch's
#: own float32 8e-4, with logits of 35. The relative bound is the one that finds small faults.
FLOAT32 = Tolerance(3e-3, 1e-4, True)


@dataclass(frozen=True)
class Agreement:
    """How an export compares with the torch model.

    Attributes:
        largest_difference: of an output.
        relative_error: see `Tolerance`; the largest over the cases.
        same_argmax: share of places whose largest logit is the same token or class.
        same_tokens: greedy tokens equal to the model's before the first that differs, over all.
            None for models that generate nothing.
    """

    largest_difference: float
    relative_error: float
    same_argmax: float
    same_tokens: float | None


@torch.no_grad()
def reference(
    model: PreTrainedModel, graph: Graph, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[dict[str, Any], Arrays]:
    """Run the torch model on some inputs, without a cache, and generate greedily.

    Returns: ``cases`` and ``prompts`` for the record, and the arrays that belong to them.
    """
    cases, arrays = [], {}
    for number, (inputs, ends) in enumerate(_cases(model, graph)):
        options = dict(inputs)
        if graph.generates and "position_ids" not in graph.inputs:
            options.pop("position_ids", None)
        out = model(**options)
        cases.append({"ends": ends} if graph.generates else {})
        given = {name: value for name, value in inputs.items() if name in graph.inputs}
        found = {name: out[name] for name in graph.outputs if not name.startswith("present.")}
        for name, value in (given | found).items():
            arrays[f"case{number}.{name}"] = value.numpy()
    prompts = []
    if graph.generates:
        for number, prompt in enumerate(_prompts(model, tokenizer)):
            new, margins = _greedy(model, prompt)
            prompts.append(len(new))
            arrays[f"prompt{number}.input_ids"] = prompt.numpy()
            arrays[f"prompt{number}.new_ids"] = np.array([new])
            arrays[f"prompt{number}.margins"] = np.array(margins, np.float32)
    return {"cases": cases, "prompts": prompts}, arrays


def run_fresh(folder: Path) -> Arrays:
    """Run an export's cases in a fresh process and return what it computed.

    Raises:
        ElastuneError: the runtime refused the file, or died.
    """
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "found.safetensors"
        command = [sys.executable, "-I", fresh_run.__file__, str(folder), str(out)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=dict(os.environ)
        )
        if done.returncode != 0 or not out.is_file():
            lines = done.stderr.strip().splitlines()
            said = lines[-1] if lines else f"exit code {done.returncode}"
            raise ElastuneError(
                f"the runtime cannot run what was exported: {said}",
                try_="a newer version of the runtime, or another format",
            )
        return load_file(out)


def agreement(about: Any, expected: Mapping[str, Any], found: Mapping[str, Any]) -> Agreement:
    """Compare a fresh process's outputs with the recorded ones.

    Args:
        about: the record of the export.
        expected: of the torch model.
        found: of `run_fresh`.
    """
    largest = relative = 0.0
    same: list[np.ndarray] = []
    for name, (wanted, got) in _pairs(about, expected, found).items():
        gap = np.abs(wanted - got)
        largest = max(largest, _worst(gap))
        relative = max(relative, _relative(name, wanted, got, bool(about["generates"])))
        if name.endswith("logits"):
            same.append((wanted.argmax(-1) == got.argmax(-1)).ravel())
    n_same = n_tokens = 0
    for number in range(len(about["prompts"])):
        n_equal, length, _ = _prefix(number, expected, found)
        n_same, n_tokens = n_same + n_equal, n_tokens + length
    return Agreement(
        largest,
        relative,
        float(np.concatenate(same).mean()) if same else 1.0,
        n_same / n_tokens if n_tokens else None,
    )


def complaint(
    about: Any, expected: Mapping[str, Any], found: Mapping[str, Any], tolerance: Tolerance
) -> str | None:
    """Return what an export computes wrongly, or None."""
    for name, (wanted, got) in _pairs(about, expected, found).items():
        case, _, output = name.partition(".")
        gap = _worst(np.abs(wanted - got))
        allowed = tolerance.largest
        if allowed is not None:
            allowed *= max(1.0, float(np.abs(wanted).max()) / 10)
            if not gap <= allowed:  # NaN, too
                return f"{output} differ by up to {gap:.1e}, {allowed:.0e} is allowed ({case})"
        error = _relative(name, wanted, got, bool(about["generates"]))
        if not error <= tolerance.relative:
            return (
                f"{output} differ by {error:.1%} of their size, {tolerance.relative:.2%} is "
                f"allowed ({case})"
            )
    for number in range(len(about["prompts"]) if tolerance.same_text else 0):
        n_equal, length, margin = _prefix(number, expected, found)
        # At a tie of the model's own logits rounding decides.
        if n_equal < length and not margin <= (tolerance.largest or 0.0):
            return f"greedy text differs after {n_equal} of {length} tokens (prompt {number})"
    return None


def _cases(model: PreTrainedModel, graph: Graph) -> list[tuple[dict[str, Tensor], list[int]]]:
    """Return inputs, and where they are cut: one row; three padded rows; one token."""
    generator = torch.Generator().manual_seed(0)
    if "pixel_values" in graph.inputs:
        shape = graph.example[0].shape[1:]
        images = [torch.randn(n, *shape, generator=generator) for n in (1, 3)]
        return [({"pixel_values": pixels}, []) for pixels in images]
    limit = int(getattr(model.config, "max_position_embeddings", 24) or 24)
    length = max(min(24, limit - 4), 4)
    third = length // 3
    found = []
    for rows, size, pads, ends in (
        (1, length, (0,), [length]),
        (3, length, (third, 0, 1), [2 * third, length - 2, length - 1, length]),
        (1, 1, (0,), [1]),
    ):
        ids = torch.randint(3, model.config.vocab_size, (rows, size), generator=generator)
        mask = torch.ones_like(ids)
        for row, n_pad in enumerate(pads):
            # Decoders are padded before the text, encoders after it.
            where = slice(0, n_pad) if graph.generates else slice(size - n_pad, size)
            mask[row, where] = 0
            ids[row, where] = _pad_id(model)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if graph.generates:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        elif "token_type_ids" in graph.inputs:
            inputs["token_type_ids"] = (torch.arange(size) >= size // 2).long().repeat(rows, 1)
        found.append((inputs, ends))
    return found


def _pad_id(model: PreTrainedModel) -> int:
    found = getattr(model.config, "pad_token_id", None)
    return int(found) if isinstance(found, int) and found >= 0 else 0


def _prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[Tensor]:
    if tokenizer is None:
        generator = torch.Generator().manual_seed(1)
        size = model.config.vocab_size
        return [torch.randint(3, size, (1, n), generator=generator) for n in (5, 8)]
    return [torch.tensor([tokenizer(text)["input_ids"]]) for text in PROMPTS]


def _greedy(model: PreTrainedModel, prompt: Tensor) -> tuple[list[int], list[float]]:
    """Return greedy tokens, computed without a cache, and by how much each logit was largest."""
    limit = int(getattr(model.config, "max_position_embeddings", 0) or 0)
    n_new = N_NEW if not limit else max(1, min(N_NEW, limit - prompt.shape[1]))
    ids, margins = prompt, []
    for _ in range(n_new):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
        first, second = logits.topk(2).values[0].tolist()
        margins.append(first - second)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[0, prompt.shape[1] :].tolist(), margins


def _pairs(
    about: Any, expected: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return the outputs to compare, places of padding left out, as float64."""
    pairs = {}
    for number in range(len(about["cases"])):
        mask = expected.get(f"case{number}.attention_mask")
        for output in about["outputs"]:
            name = f"case{number}.{output}"
            wanted, got = expected[name], found[name]
            if wanted.shape != got.shape:
                raise ElastuneError(
                    f"{output} have shape {got.shape} in place of {wanted.shape}",
                    try_="export it again with the installed versions",
                )
            is_per_token = mask is not None and wanted.shape[:2] == mask.shape
            if is_per_token and (about["generates"] or wanted.ndim == 3 or "_" in output):
                wanted, got = wanted[mask == 1], got[mask == 1]
            pairs[name] = wanted.astype(np.float64), got.astype(np.float64)
    return pairs


def _relative(name: str, wanted: Any, got: Any, over_vocabulary: bool) -> float:
    if over_vocabulary and name.endswith("logits"):
        wanted = wanted - wanted.mean(-1, keepdims=True)
        got = got - got.mean(-1, keepdims=True)
    size = float(np.linalg.norm(wanted))
    gap = float(np.linalg.norm(wanted - got))
    return gap / size if size else gap


def _worst(gap: Any) -> float:
    return float("nan") if np.isnan(gap).any() else float(gap.max(initial=0.0))


def _prefix(
    number: int, expected: Mapping[str, Any], found: Mapping[str, Any]
) -> tuple[int, int, float]:
    """Return how many tokens are equal, of how many, and the margin of the first that is not."""
    wanted: Sequence[int] = expected[f"prompt{number}.new_ids"][0].tolist()
    got: Sequence[int] = found[f"prompt{number}.new_ids"][0].tolist()
    n_equal = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=True)) if a != b), None)
    if n_equal is None:
        return len(wanted), len(wanted), 0.0
    return n_equal, len(wanted), float(expected[f"prompt{number}.margins"][n_equal])
