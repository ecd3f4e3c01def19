"""Load one export in a process of its own, time it, and write down what was found as JSON.

Run as a script: ``python profile_run.py EXPORT OPTIONS OUT``, the options as JSON:
``prompt_tokens``, ``new_tokens``, ``threads``, ``repeats``, ``runs_code`` (whether the checkpoint's
own Python may run). Times are wall time; memory is the process's own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[int, int], tuple[float, float | None]]
"""(prompt tokens, new tokens) -> seconds of the prompt; of the new tokens, where it generates."""
Opened = tuple[Run, float]
"""With the seconds that loading took; importing the runtime is not part of it."""


def open_graph(folder: Path, options: Any) -> Opened:
    """Load an export for onnxruntime, openvino or torch.export, which `fresh_run` knows to run."""
    os.environ["OMP_NUM_THREADS"] = str(options["threads"])
    sys.path.insert(0, str(Path(__file__).parent))
    import fresh_run  # type: ignore[import-not-found]

    about = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    importlib.import_module(about["runtime"])
    started = time.perf_counter()
    step = fresh_run.RUNTIMES[about["runtime"]](folder, about)
    load_s = time.perf_counter() - started
    generates = bool(about["cache"])

    def feed(n_new: int, n_past: int) -> dict[str, Any]:
        if "pixel_values" in about["inputs"]:
            return {"pixel_values": np.zeros((1, *_image(folder)), np.float32)}
        inputs: dict[str, Any] = {
            "input_ids": _ids(n_new),
            "attention_mask": np.ones((1, n_past + n_new), np.int64),
        }
        if "position_ids" in about["inputs"]:
            inputs["position_ids"] = np.arange(n_past, n_past + n_new)[None]
        if "token_type_ids" in about["inputs"]:
            inputs["token_type_ids"] = np.zeros((1, n_new), np.int64)
        return inputs

    def run(n_prompt: int, n_new: int) -> tuple[float, float | None]:
        started = time.perf_counter()
        _, cache = step(feed(n_prompt, 0), None)
        read = time.perf_counter()
        if not generates:
            return read - started, None
        for past in range(n_prompt, n_prompt + n_new):
            _, cache = step(feed(1, past), cache)
        return read - started, time.perf_counter() - read

    return run, load_s


def open_checkpoint(folder: Path, options: Any) -> Opened:
    """Load a Hugging Face checkpoint with transformers, and its adapter if one lies beside it."""
    import torch
    import transformers

    torch.set_num_threads(options["threads"])
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    adapter = folder / "adapter"
    if (folder / "adapter_config.json").is_file():  # an adapter alone: its base lies elsewhere
        named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        adapter, folder = folder, Path(named["base_model_name_or_path"])
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (wanted,) = about["architectures"]
    heads = ("ForCausalLM", "ForSequenceClassification", "ForQuestionAnswering")
    head = next((h for h in heads if wanted.endswith(h)), "")
    auto = getattr(transformers, f"AutoModel{head}")
    stock = about["model_type"].removeprefix("elastune_").replace("-", "_")
    with contextlib.suppress(ImportError):  # code that from_pretrained would else read first
        importlib.import_module(f"transformers.models.{stock}.modeling_{stock}")
    started = time.perf_counter()
    model = auto.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=options["runs_code"]
    )
    if (adapter / "adapter_config.json").is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    load_s = time.perf_counter() - started
    generates = head == "ForCausalLM"

    @torch.no_grad()
    def run(n_prompt: int, n_new: int) -> tuple[float, float | None]:
        started = time.perf_counter()
        ids = torch.from_numpy(_ids(n_prompt))
        if not generates:
            model(input_ids=ids)
            return time.perf_counter() - started, None
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        read = time.perf_counter()
        for _ in range(n_new):
            new = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=new, past_key_values=out.past_key_values, use_cache=True)
        return read - started, time.perf_counter() - read

    return run, load_s


def open_gguf(folder: Path, options: Any) -> Opened:
    """Load a GGUF file with llama.cpp, whose own timings are taken."""
    import xllamacpp

    (file,) = sorted(folder.glob("*.gguf")) if folder.is_dir() else [folder]
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = options["prompt_tokens"] + options["new_tokens"] + 8
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = options["threads"]
    parameters.cpuparams_batch.n_threads = options["threads"]
    started = time.perf_counter()
    server = xllamacpp.Server(parameters)
    load_s = time.perf_counter() - started

    def run(n_prompt: int, n_new: int) -> tuple[float, float | None]:
        found = server.handle_completions(
            {
                "prompt": _ids(n_prompt)[0].tolist(),
                "n_predict": n_new + 1,  # the first comes out of the prompt
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        timings = found["timings"]
        per_token = timings["predicted_per_token_ms"] / 1000
        return timings["prompt_ms"] / 1000, per_token * n_new

    return run, load_s


def _image(folder: Path) -> tuple[int, ...]:
    """Return the shape of the images that an export was proven with."""
    from safetensors.numpy import load_file

    return tuple(load_file(folder / "reference.safetensors")["case0.pixel_values"].shape[1:])


def _ids(n: int) -> Any:
    # Any tokens take the same time; these are in every vocabulary.
    return np.random.default_rng(n).integers(3, 16, (1, n))


def opener(folder: Path) -> Callable[[Path, Any], Opened]:
    """Return what opens a folder or file."""
    if folder.suffix == ".gguf" or any(folder.glob("*.gguf")):
        return open_gguf
    record = folder / "export.json"
    if not record.is_file():
        return open_checkpoint
    runtime = json.loads(record.read_text(encoding="utf-8"))["runtime"]
    return open_checkpoint if runtime == "transformers" else open_graph


def peak_mb() -> float:
    """Return the most memory that this process has held, in MB of 2**20 bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # What getrusage says on Linux begins at what the parent held when it started this process.
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 if sys.platform != "darwin" else 2**20)


def main() -> None:
    """Load, warm up, time, and write the answer."""
    folder, options, out = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    run, load_s = opener(folder)(folder, options)
    n_prompt, n_new = options["prompt_tokens"], options["new_tokens"]
    run(n_prompt, min(n_new, 2))
    rounds = [run(n_prompt, n_new) for _ in range(options["repeats"])]
    answer = {
        "load_s": load_s,
        "prefill_s": [prefill for prefill, _ in rounds],
        "decode_s": [decode for _, decode in rounds if decode is not None],
        "peak_mb": peak_mb(),
    }
    out.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
