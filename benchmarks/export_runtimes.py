"""SmolLM2-135M, whole and cut unevenly, in torch, onnxruntime and OpenVINO: size and speed.

- <model>_<runtime>_prefill, <..>_decode: tokens a second, best of three; <..>_mb: size on disk.

    python benchmarks/export_runtimes.py [--quick] [--models uneven] [--formats openvino/int8]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elastune.build_structure import structure_space
from elastune.drop_blocks import drop_blocks_
from elastune.export.fresh_run import RUNTIMES
from elastune.export.runtimes import export_graph
from elastune.models import load_model
from elastune.space import SubnetConfig
from elastune.subnetwork import extract_model
from elastune.supernet import SuperNetwork

EXPORTS = (
    *(("onnx", "float32"), ("openvino", "float32")),
    *(("openvino", "int8"), ("openvino", "int4")),
)


def uneven(model: Any) -> Any:
    """Cut a model: widths of a half to all, some heads, one block and one half left out."""
    n_blocks = model.config.num_hidden_layers
    space = structure_space(model, ffn=[1.0, 0.75, 0.5], heads=[1.0, 0.67, 0], depth=[n_blocks - 3])
    rng = np.random.default_rng(0)
    choices = {d.name: int(rng.choice([c for c in d.choices if c])) for d in space.dims}
    for dim in space.dims:
        if dim.name == f"layers.{n_blocks - 5}.heads" or dim.name.endswith(".block"):
            choices[dim.name] = 0
    return extract_model(SuperNetwork(model, space), SubnetConfig(choices))


def speeds(step: Any, about: Any, n_prompt: int, n_new: int) -> tuple[float, float]:
    """Return tokens a second of reading a prompt, and of generating after it."""
    ids = np.random.default_rng(0).integers(3, 40000, (1, n_prompt))
    best = [0.0, 0.0]
    for _ in range(3):
        cache, new, length = None, ids, 0
        times = []
        for _ in range(n_new + 1):
            length += new.shape[1]
            inputs = {"input_ids": new, "attention_mask": np.ones((1, length), np.int64)}
            if "position_ids" in about["inputs"]:
                inputs["position_ids"] = np.arange(length - new.shape[1], length)[None]
            start = time.perf_counter()
            (logits,), cache = step(inputs, cache)
            new = logits[:, -1:].argmax(-1)
            times.append(time.perf_counter() - start)
        best[0] = max(best[0], n_prompt / times[0])
        best[1] = max(best[1], n_new / sum(times[1:]))
    return best[0], best[1]


def torch_step(model: Any) -> Any:
    @torch.no_grad()
    def step(inputs: Any, cache: Any) -> Any:
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        out = model(**given, past_key_values=cache, use_cache=True)
        return [out.logits.numpy()], out.past_key_values

    return step


def main() -> None:
    """Print one line for each model and runtime."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick", action="store_true", help="a short prompt, float32, 8 blocks of the cut model"
    )
    parser.add_argument("--models", nargs="+", default=None)
    parser.add_argument("--formats", nargs="+", default=["/".join(e) for e in EXPORTS])
    options = parser.parse_args()
    options.models = options.models or (["uneven"] if options.quick else ["whole", "uneven"])
    n_prompt, n_new = (32, 8) if options.quick else (128, 32)
    model, tokenizer = load_model("smollm2-135m")
    if options.quick:
        drop_blocks_(model, range(8, model.config.num_hidden_layers))
    print(f"threads {os.environ.get('OMP_NUM_THREADS', 'all')}, prompt {n_prompt}, new {n_new}")
    print("model  | runtime          | MB   | export s | rel. error | same text | prefill | decode")
    figures: dict[str, float] = {}
    for name in options.models:
        source = model if name == "whole" else uneven(model)
        plain: Any = getattr(source, "model", source) if name == "uneven" else source
        n_bytes = sum(p.numel() * 4 for p in plain.parameters())
        rates = speeds(torch_step(plain), {"inputs": ["position_ids"]}, n_prompt, n_new)
        figures |= {f"{name}_torch_prefill": rates[0], f"{name}_torch_decode": rates[1]}
        print(
            f"{name:6} | {'torch':16} | {n_bytes / 1e6:4.0f} |        - |          - |         - "
            f"| {rates[0]:7.1f} | {rates[1]:6.1f}",
            flush=True,
        )
        for format, weights in (e for e in EXPORTS if "/".join(e) in options.formats):
            if options.quick and weights != "float32":
                continue
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                made = export_graph(source, format, out, weights=weights, tokenizer=tokenizer)
                about = json.loads((out / "export.json").read_text())
                step = RUNTIMES[made.runtime](out, about)
                rates = speeds(step, about, n_prompt, n_new)
                found = made.agreement
                label = f"{format} {weights}"
                key = f"{name}_{format}_{weights}"
                figures |= {f"{key}_prefill": rates[0], f"{key}_decode": rates[1]}
                figures[f"{key}_mb"] = made.n_bytes / 1e6
                print(
                    f"{name:6} | {label:16} | {made.n_bytes / 1e6:4.0f} | {made.seconds:8.1f} "
                    f"| {found.relative_error:10.1e} | {found.same_tokens:9.0%} "
                    f"| {rates[0]:7.1f} | {rates[1]:6.1f}",
                    flush=True,
                )
                del step
    print(json.dumps({"benchmark": "export_runtimes", "figures": figures}))


if __name__ == "__main__":
    main()
