"""Run an exported graph in a process of its own and save what it computes.

Run as a script: ``python -I fresh_run.py FOLDER OUT``. It imports nothing of elastune, and hides
elastune and transformers from the runtime, and torch from those that are not torch, so that a
graph that needs one of them fails here.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, Any]
Step = Callable[[Arrays, Any], tuple[list[Any], Any]]
"""Inputs by name, and a cache (None: empty) -> outputs without the cache, and the new cache."""

_CODE = ("/constants/custom_obj", "/constants/opaque_obj", "/aotinductor/", "serialized_")
"""Parts of names in an archive whose content is unpickled, or is machine code."""
_THREADS = int(os.environ.get("OMP_NUM_THREADS", "0"))


class _Hidden(MetaPathFinder):
    """Lets some packages look as if they were not installed."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is hidden")


def _onnxruntime(folder: Path, about: Any) -> Step:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _THREADS
    file = str(folder / about["file"])
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    past = [name for name in names if name.startswith("past_key_values.")]

    def step(inputs: Arrays, cache: Any) -> tuple[list[Any], Any]:
        rows = next(iter(inputs.values())).shape[0]
        cache = cache or _empty(about, rows)
        given = {name: value for name, value in inputs.items() if name in names}
        found = session.run(None, given | dict(zip(past, cache, strict=True)))
        n_plain = len(found) - len(past)
        return found[:n_plain], found[n_plain:]

    return step


def _openvino(folder: Path, about: Any) -> Step:
    import openvino

    options = dict(about["runtime_options"])
    if _THREADS:
        options["INFERENCE_NUM_THREADS"] = _THREADS
    model = openvino.Core().compile_model(folder / about["file"], "CPU", options)
    names = {name for port in model.inputs for name in port.get_names()}
    request = model.create_infer_request()

    def step(inputs: Arrays, cache: Any) -> tuple[list[Any], Any]:
        rows = next(iter(inputs.values())).shape[0]
        if cache is None and about["cache"]:
            request.reset_state()
        given = {name: value for name, value in inputs.items() if name in names}
        if "beam_idx" in names:
            given["beam_idx"] = np.arange(rows, dtype=np.int32)
        found = request.infer(given)
        return [found[name].copy() for name in about["outputs"]], True

    return step


def _torch(folder: Path, about: Any) -> Step:
    file = folder / about["file"]
    refuse_pickles(file)
    import torch

    torch.set_num_threads(_THREADS or torch.get_num_threads())
    module = torch.export.load(file).module()

    @torch.no_grad()
    def step(inputs: Arrays, cache: Any) -> tuple[list[Any], Any]:
        rows = next(iter(inputs.values())).shape[0]
        given = [torch.from_numpy(np.ascontiguousarray(v)) for v in inputs.values()]
        if not about["cache"]:
            return [out.numpy() for out in module(*given)], None
        if cache is None:
            flat = [torch.from_numpy(a) for a in _empty(about, rows)]
            cache = list(zip(flat[::2], flat[1::2], strict=True))
        logits, cache = module(*given, cache)
        return [logits.numpy()], cache

    return step


def refuse_pickles(file: Path) -> None:
    """Make sure that loading a .pt2 file runs no pickled code.

    `torch.export.load` unpickles what is stored that way, and it is meant for files one trusts.
    """
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            is_config = name.endswith("_config.json")
            pickled = is_config and re.search(rb'"use_pickle"\s*:\s*true', archive.read(name))
            examples = "/sample_inputs/" in name and archive.getinfo(name).file_size > 0
            if pickled or examples or any(part in name for part in _CODE):
                raise ValueError(f"{file.name} holds pickled data ({name}): not loaded")


def _empty(about: Any, rows: int) -> list[Any]:
    sizes = [size for size in about["cache"] for _ in ("key", "value")]
    return [np.zeros((rows, heads, 0, head_dim), np.float32) for _, heads, head_dim in sizes]


RUNTIMES = {"onnxruntime": _onnxruntime, "openvino": _openvino, "torch": _torch}


def run_case(step: Step, about: Any, case: Any, inputs: Arrays) -> Arrays:
    """Return a case's outputs; of a case in pieces each goes on from the cache of those before."""
    if not about["cache"]:
        found, _ = step(inputs, None)
        return dict(zip(about["outputs"], found, strict=True))
    pieces, cache, start = [], None, 0
    for end in case["ends"]:
        part = {name: value[:, start:end] for name, value in inputs.items()}
        part["attention_mask"] = inputs["attention_mask"][:, :end]
        (logits,), cache = step(part, cache)
        pieces.append(logits)
        start = end
    return {"logits": np.concatenate(pieces, axis=1)}


def greedy(step: Step, about: Any, prompt: Any, n_new: int) -> Any:
    """Return the tokens that the largest logits choose after a prompt, one by one."""
    ids, new, cache = prompt, prompt, None
    for _ in range(n_new):
        length = ids.shape[1]
        inputs = {"input_ids": new, "attention_mask": np.ones_like(ids)}
        if "position_ids" in about["inputs"]:
            inputs["position_ids"] = np.arange(length - new.shape[1], length)[None]
        (logits,), cache = step(inputs, cache)
        new = logits[:, -1:].argmax(-1)
        ids = np.concatenate([ids, new], axis=1)
    return ids[:, prompt.shape[1] :]


def main() -> None:
    """Read the folder's record, run all of its cases and prompts, write the outputs."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    about = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    hidden = ["elastune", "transformers"] + (["torch"] if about["runtime"] != "torch" else [])
    sys.meta_path.insert(0, _Hidden(*hidden))
    from safetensors.numpy import load_file, save_file

    stored = load_file(folder / "reference.safetensors")
    step = RUNTIMES[about["runtime"]](folder, about)
    found: Arrays = {}
    names = [name for name in about["inputs"] if not name.startswith("past_key_values.")]
    for number, case in enumerate(about["cases"]):
        inputs = {name: stored[f"case{number}.{name}"] for name in names}
        for name, value in run_case(step, about, case, inputs).items():
            found[f"case{number}.{name}"] = value
    for number, n_new in enumerate(about["prompts"]):
        prompt = stored[f"prompt{number}.input_ids"]
        found[f"prompt{number}.new_ids"] = greedy(step, about, prompt, n_new)
    save_file({name: np.ascontiguousarray(value) for name, value in found.items()}, out)


if __name__ == "__main__":
    main()
