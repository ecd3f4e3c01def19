"""Read a GGUF file back and run it with llama.cpp, in a process of its own, and save what it says.

Run as a script: ``python -I gguf_run.py FOLDER OUT``. It imports nothing of elastune, and hides
elastune, torch and transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import urllib.error
import urllib.request
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import numpy as np

N_TOP = 20
"""Most likely tokens whose log-probabilities are asked for."""


class _Hidden(MetaPathFinder):
    """Lets some packages look as if they were not installed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name.partition(".")[0] in ("elastune", "transformers", "torch"):
            raise ImportError(f"{name} is hidden")


def digests_of(file: Path) -> dict[str, str]:
    """Return tensor -> SHA-256 of its kind, shape and bytes."""
    from gguf import GGUFReader

    found = {}
    for tensor in GGUFReader(file).tensors:
        stored = np.ascontiguousarray(tensor.data)
        made = hashlib.sha256(f"{tensor.tensor_type.name} {list(stored.shape)}".encode())
        made.update(stored.view(np.uint8).data)
        found[tensor.name] = made.hexdigest()
    return found


def served(file: Path, n_ctx: int) -> Any:
    """Return llama.cpp's server on a file: keys and values in float32, one request at a time."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = n_ctx
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.warmup = False
    parameters.verbosity = 0
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count() or 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(parameters)


def ask(server: Any, path: str, question: Any) -> Any:
    """Send JSON to the server, return what it answers."""
    request = urllib.request.Request(
        server.listening_address + path,
        json.dumps(question).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise SystemExit(f"llama.cpp answers {error.read().decode(errors='replace')}") from error


def continued(
    server: Any, prompt: list[int], expected: list[int], plain_id: int
) -> tuple[Any, Any]:
    """Return ids and log-probabilities ``(steps, n)`` of the likeliest tokens at each step.

    At each step the expected tokens before it are given, so that all steps can be compared; the
    cache holds them from the step before.

    Args:
        plain_id: a token that is ASCII text.
    """
    ids, values = [], []
    for step in range(len(expected)):
        answer = ask(
            server,
            "/completion",
            {
                "prompt": prompt + expected[:step],
                "n_predict": 1,
                "n_probs": N_TOP,
                "temperature": 0.0,
                # What is generated does not matter, but must be a whole character.
                "logit_bias": [[plain_id, 1e9]],
                "cache_prompt": True,
            },
        )
        top = answer["completion_probabilities"][0]["top_logprobs"]
        ids.append([entry["id"] for entry in top])
        values.append([entry["logprob"] for entry in top])
    return np.array(ids), np.array(values, np.float32)


def complaint(about: Any, found: dict[str, str]) -> str | None:
    """Return what is wrong with the tensors of a file, or None."""
    wanted: dict[str, str] = about["tensors"]
    missing = [name for name in wanted if name not in found]
    if missing:
        return f"the file lacks {', '.join(missing[:4])}"
    added = [name for name in found if name not in wanted]
    if added:
        return f"the file has tensors that were not written: {', '.join(added[:4])}"
    changed = [name for name, value in found.items() if wanted[name] != value]
    return f"{', '.join(changed[:4])} is not what was written" if changed else None


def main() -> None:
    """Read the folder's record, read the file, run all prompts, write what was found."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    about = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    sys.meta_path.insert(0, _Hidden())
    from safetensors.numpy import load_file, save_file

    file = folder / about["file"]
    why = complaint(about, digests_of(file))
    if why is not None:
        raise SystemExit(why)
    stored = load_file(folder / "reference.safetensors")
    server = served(file, about["n_ctx"])
    arrays = {}
    for number in range(about["n_prompts"]):
        prompt = stored[f"prompt{number}.input_ids"].tolist()
        expected = stored[f"prompt{number}.new_ids"].tolist()
        ids, values = continued(server, prompt, expected, about["plain_id"])
        arrays[f"prompt{number}.ids"], arrays[f"prompt{number}.logprobs"] = ids, values
    save_file(arrays, out / "found.safetensors")
    tokens = [
        ask(server, "/tokenize", {"content": t, "add_special": True, "parse_special": True})
        for t in about["texts"]
    ]
    found: dict[str, Any] = {"tokens": [answer["tokens"] for answer in tokens]}
    if about["chat"] is not None:
        found["chat"] = ask(server, "/apply-template", {"messages": about["chat"]["messages"]})
    (out / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
