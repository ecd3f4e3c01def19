"""Prune a checkpoint with elastune or with llm-compressor: the timed part of llm_compressor.py.

    python benchmarks/pruned_by.py TASK.json

TASK.json: system, method (wanda or sparsegpt), pattern (0.5 or 2:4), checkpoint, rows (safetensors
with `input_ids`), answer (file to write), and saved (folder for the pruned weights, or null). Runs
in either environment: what it imports of the two is only the one that is asked for.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    prune = {"elastune": _elastune, "llm-compressor": _llm_compressor}[task["system"]]
    model = AutoModelForCausalLM.from_pretrained(task["checkpoint"], dtype=torch.float32)
    rows = load_file(task["rows"])["input_ids"]
    work = prune(model, task["method"], task["pattern"], rows)
    loaded_mb = _status_mb("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    answer = {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "loaded_mb": loaded_mb,
        "peak_mb": _status_mb("VmHWM"),
    }
    if task["saved"]:
        # Without copies that share memory (tied embeddings); what is pruned shares none.
        state = {n: w.contiguous() for n, w in model.state_dict().items() if ".layers." in n}
        save_file(state, str(Path(task["saved"]) / "blocks.safetensors"))
    Path(task["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def _elastune(model: Any, method: Any, pattern: str, rows: torch.Tensor) -> Any:
    from elastune.sparsify import Sparsity, sparsify_

    sparsity = Sparsity.parse(pattern=pattern) if ":" in pattern else Sparsity(float(pattern))
    return lambda: sparsify_(model, method, sparsity, rows)


def _llm_compressor(model: Any, method: str, pattern: str, rows: torch.Tensor) -> Any:
    import llmcompressor
    from datasets import Dataset
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    recipe = modifier(
        sparsity=0.5,
        mask_structure=pattern if ":" in pattern else "0:0",
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )
    ids = rows.tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    return lambda: llmcompressor.oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(ids),
        max_seq_length=rows.shape[1],
    )


def _status_mb(field: str) -> float:
    """Return a field of /proc/self/status in MB of 2**20 bytes; NaN where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


if __name__ == "__main__":
    main()
