"""Wanda and SparseGPT beside llm-compressor's modifiers: time, peak memory, perplexity, zeros.

The same checkpoint, calibration rows and sparsity, 50 % of each row or 2:4. Both systems take
turns, each time in a process of its own; imports and loading are not timed, llm-compressor's
tracing of the model is: its users cannot do without. It runs in an environment of its own, with
other versions of transformers than ours, made under build/ with the versions pinned below.
Where that cannot be made the script says why and ends well.

For each method and pattern (<method>_<pattern>, such as wanda_unstructured or sparsegpt_2_4):

- <..>_seconds: CPU time, ours over theirs; median of rounds. <..>_wall: likewise.
- <..>_peak, <..>_added: the process's peak memory (VmHWM), ours over theirs, and what of it is
  above the loaded model.
- <..>_perplexity_<system>, zeros_<..>_<system>: of WikiText-2, and the part of zeros in the blocks.

    python benchmarks/llm_compressor.py [--quick] [--sequences 32] [--length 256] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch
from data_folder import add_data_option
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from elastune.calibration_text import calibration_texts
from elastune.data import calibration_rows
from elastune.evaluate import evaluate
from elastune.models import load_model, save_model
from elastune.tasks import get_task

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parent / "build" / "llm-compressor"
PINS = (
    "llmcompressor==0.14.0.1",
    "compressed-tensors==0.19.0",
    "transformers==5.17.0",
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "numpy==2.4.6",
    "safetensors==0.8.0",
)
SYSTEMS = ("elastune", "llm-compressor")
PATTERNS = {"unstructured": "0.5", "2_4": "2:4"}


class NotInstalled(Exception):
    """There is no environment with llm-compressor, and none can be made."""


def main() -> None:
    args = _arguments()
    try:
        theirs = environment(make=not args.quick)
        pythons = {"elastune": sys.executable, "llm-compressor": str(theirs)}
    except NotInstalled as error:
        print(f"skipped: {error}")
        print(json.dumps({"benchmark": "llm_compressor", "figures": {}, "skipped": str(error)}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, tokenizer = load_model(args.model)
        save_model(model, tokenizer, folder / "checkpoint")
        rows = calibration_rows(
            calibration_texts("c4", args.data),
            tokenizer,
            n_sequences=args.sequences,
            length=args.length,
            seed=0,
        )
        save_file({"input_ids": rows}, str(folder / "rows.safetensors"))
        del model
        found = {
            (method, pattern): _in_turns(pythons, method, pattern, folder, args.rounds)
            for pattern in args.patterns
            for method in args.methods
        }
        scores = _scores(args, folder, list(found))
    figures = _figures(found, scores)
    _show(found, scores, args)
    print(json.dumps({"benchmark": "llm_compressor", "figures": figures}))


def environment(*, make: bool) -> Path:
    """Return the interpreter that has llm-compressor.

    Args:
        make: make its environment where it is missing.

    Raises:
        NotInstalled: with the installer's last words.
    """
    python = ENVIRONMENT / "bin" / "python"
    complete = ENVIRONMENT / ".complete"
    wanted = "\n".join((f"torch=={_torch()}", *PINS))
    if complete.is_file() and complete.read_text(encoding="utf-8") == wanted:
        return python
    if not make:
        raise NotInstalled(
            "llm-compressor has no environment yet; `python benchmarks/llm_compressor.py` makes it"
        )
    print(f"making {ENVIRONMENT} (minutes, once)", flush=True)
    venv.create(ENVIRONMENT, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # By pip and first, as `make .venv` does: the same build of torch as ours.
    for packages in ((f"torch=={_torch()}",), PINS):
        done = subprocess.run([*pip, *packages], capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise NotInstalled(f"llm-compressor cannot be installed: {last}")
    complete.write_text(wanted, encoding="utf-8")
    return python


def _torch() -> str:
    return torch.__version__.partition("+")[0]


def _in_turns(
    pythons: dict[str, str], method: str, pattern: str, folder: Path, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Prune by both systems in each round; return their answers, round by round."""
    answers: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS}
    for number in range(rounds):
        for system in SYSTEMS if number % 2 == 0 else reversed(SYSTEMS):
            saved = _saved(folder, method, pattern, system)
            saved.mkdir(exist_ok=True)
            task = {
                "system": system,
                "method": method,
                "pattern": PATTERNS[pattern],
                "checkpoint": str(folder / "checkpoint"),
                "rows": str(folder / "rows.safetensors"),
                "answer": str(folder / "answer.json"),
                "saved": str(saved) if number == 0 else None,
            }
            (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
            done = subprocess.run(
                [pythons[system], str(HERE / "pruned_by.py"), str(folder / "task.json")],
                capture_output=True,
                text=True,
                check=False,
                cwd=folder,  # its logs go where the process runs
                env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""},
            )
            if done.returncode:
                raise SystemExit(f"{system}, {method} {pattern} failed:\n{done.stderr[-2000:]}")
            answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
            answers[system].append(answer)
            print(f"{method} {pattern}, {system}: {answer['cpu_s']:.1f} s CPU", flush=True)
    return answers


def _saved(folder: Path, method: str, pattern: str, system: str) -> Path:
    return folder / f"{method}-{pattern}-{system}"


def _scores(
    args: argparse.Namespace, folder: Path, cases: list[tuple[str, str]]
) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Return (method, pattern, system) -> perplexity and part of zeros, by the same evaluation."""
    model, tokenizer = load_model(args.model)
    task = get_task("wikitext2", data_dir=args.data, window=512)
    texts = task.report_examples()[: args.pieces]
    found = {}
    for method, pattern in cases:
        for system in SYSTEMS:
            state = load_file(_saved(folder, method, pattern, system) / "blocks.safetensors")
            missing = model.load_state_dict(state, strict=False).unexpected_keys
            assert not missing, missing
            pruned = [w for name, w in state.items() if name.endswith("_proj.weight")]
            zeros = sum(int((w == 0).sum()) for w in pruned) / sum(w.numel() for w in pruned)
            score = evaluate(model, tokenizer, task, texts)
            found[method, pattern, system] = (score.value, zeros)
    return found


def _figures(found: Any, scores: Any) -> dict[str, float]:
    figures: dict[str, float] = {}
    for (method, pattern), answers in found.items():
        pairs = list(zip(answers["elastune"], answers["llm-compressor"], strict=True))
        name = f"{method}_{pattern}"
        figures |= {
            f"{name}_seconds": statistics.median(a["cpu_s"] / b["cpu_s"] for a, b in pairs),
            f"{name}_wall": statistics.median(a["wall_s"] / b["wall_s"] for a, b in pairs),
            f"{name}_peak": statistics.median(a["peak_mb"] / b["peak_mb"] for a, b in pairs),
            f"{name}_added": statistics.median(_added(a) / _added(b) for a, b in pairs),
        }
        for system in SYSTEMS:
            key = f"{name}_{system.replace('-', '_')}"
            figures[f"{key}_perplexity"], figures[f"{key}_zeros"] = scores[method, pattern, system]
    return figures


def _added(answer: dict[str, float]) -> float:
    return answer["peak_mb"] - answer["loaded_mb"]


def _show(found: Any, scores: Any, args: argparse.Namespace) -> None:
    table = Table(title=f"{args.model}, {args.sequences} x {args.length} C4 tokens, medians")
    for column in ("pruning", "system", "CPU s", "wall s", "peak MB", "added MB", "ppl", "zeros %"):
        table.add_column(column, justify="left" if column in ("pruning", "system") else "right")
    for (method, pattern), answers in found.items():
        for system, rows in answers.items():
            value, zeros = scores[method, pattern, system]
            middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            table.add_row(
                f"{method} {pattern}", system, f"{middle['cpu_s']:.1f}", f"{middle['wall_s']:.1f}",
                f"{middle['peak_mb']:.0f}", f"{_added(middle):.0f}", f"{value:.2f}",
                f"{zeros:.3%}",
            )  # fmt: skip
    Console(width=110).print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pieces", type=int, default=12, help="pieces of test text")
    parser.add_argument("--rounds", type=int, default=3)
    kinds = list(PATTERNS)
    parser.add_argument("--patterns", nargs="+", choices=kinds, default=kinds)
    methods = ["wanda", "sparsegpt"]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--quick", action="store_true", help="8 x 128 tokens, Wanda 50 %%, once")
    args = parser.parse_args()
    if args.quick:
        args.sequences, args.length, args.pieces, args.rounds = 8, 128, 2, 1
        args.patterns, args.methods = ["unstructured"], ["wanda"]
    return args


if __name__ == "__main__":
    main()
