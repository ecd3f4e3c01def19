"""Compare what llama.cpp computes from a GGUF file with what the torch model does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from elastune.errors import ElastuneError
from elastune.export import gguf_run
from elastune.export.reference import Agreement, Tolerance

#: Of log-probabilities against the torch model with weights rounded as in the file. llama.cpp
#: rounds activations, too, to the kind of the weights that they are multiplied with: SmolLM2-135M
#: then differs by 0.4 % (float16), 4 % (bfloat16) and 14 to 22 % (q8_0, q4_0) of their spread.
TOLERANCES: Mapping[str, Tolerance] = {
    "float32": Tolerance(2e-3, 1e-3, True),
    "float16": Tolerance(0.5, 0.02, True),
    "bfloat16": Tolerance(1.0, 0.15, True),
    "q8_0": Tolerance(4.0, 0.5, True),
    "q4_0": Tolerance(4.0, 0.5, True),
}

#: Texts that must give the same tokens.
TEXTS = (
    "The quick brown fox, 42 years old, paid $3.14159 on 2024-05-17 at 7:30.",
    "  two  spaces, a\ttab,\n\nlines \n and \r\n more   ",
    "don't I'll we've it's O'Neil HELLO Hello DON'T",
    "def f(x):\n    return {'k': [1, 2], \"z\": x**2}  # 0x1F\n",
    "naïve café Привет 你好 こんにちは مرحبا 한국어 ½ x² 🙂 👩‍👩‍👧 e\u0301 ß",
    "!? ... — “quoted” (a) a/b user@host.org C++ \\n _x_ </div> 1,000,000 a\u00a0b",
    "x",
)


@dataclass(frozen=True)
class Found:
    """What a fresh process found.

    Attributes:
        arrays: of each prompt ``ids`` and ``logprobs``, ``(steps, n)``.
        tokens: ids of each text.
        chat: the chat template, filled in.
    """

    arrays: Mapping[str, np.ndarray]
    tokens: list[list[int]]
    chat: str | None


def run_fresh(folder: Path) -> Found:
    """Read and run an export in a fresh process.

    Raises:
        ElastuneError: a tensor is not as it was written, or llama.cpp refused the file or died.
    """
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        command = [sys.executable, "-I", gguf_run.__file__, str(folder), str(out)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=dict(os.environ)
        )
        if done.returncode != 0 or not (out / "found.json").is_file():
            lines = done.stderr.strip().splitlines()
            said = lines[-1] if lines and done.returncode == 1 else f"exit code {done.returncode}"
            raise ElastuneError(
                f"llama.cpp cannot run what was exported: {said}",
                try_="a newer llama.cpp or xllamacpp; format onnx or hf-padded loads elsewhere",
            )
        found = json.loads((out / "found.json").read_text(encoding="utf-8"))
        chat = found.get("chat")
        arrays = load_file(out / "found.safetensors")
        return Found(arrays, found["tokens"], None if chat is None else chat["prompt"])


def agreement(stored: Mapping[str, Any], found: Found) -> Agreement:
    """Compare with the torch model as it is, before weights were rounded."""
    kind = "own." if "prompt0.own.ids" in stored else ""
    largest = relative = 0.0
    n_same = n_prefix = n_steps = 0
    for key in _prompts(stored):
        wanted, got = _pair(stored, found, key, kind)
        largest = max(largest, float(np.abs(wanted - got).max()))
        relative = max(relative, _relative(wanted, got))
        same = stored[f"{key}{kind}ids"][:, 0] == found.arrays[f"{key}ids"][:, 0]
        n_same, n_steps = n_same + int(same.sum()), n_steps + len(same)
        n_prefix += len(same) if same.all() else int(same.argmin())
    return Agreement(largest, relative, n_same / n_steps, n_prefix / n_steps)


def complaint(about: Any, stored: Mapping[str, Any], found: Found) -> str | None:
    """Return what llama.cpp does that the model does not, or None."""
    for text, ids, theirs in zip(about["texts"], about["token_ids"], found.tokens, strict=True):
        if ids != theirs:
            return f"{text!r} gives the tokens {theirs}, not {ids}"
    tolerance = Tolerance(**about["tolerance"])
    allowed = float(tolerance.largest or 0.0)
    for key in _prompts(stored):
        wanted, got = _pair(stored, found, key, "")
        gap = float(np.abs(wanted - got).max())
        if not gap <= allowed:  # NaN, too
            return f"log-probabilities differ by up to {gap:.1e}, {allowed:.0e} is allowed"
        error = _relative(wanted, got)
        if not error <= tolerance.relative:
            return (
                f"log-probabilities differ by {error:.1%} of their spread, "
                f"{tolerance.relative:.1%} is allowed"
            )
        expected, tokens = stored[f"{key}new_ids"], found.arrays[f"{key}ids"][:, 0]
        best = stored[f"{key}logprobs"]
        for step in np.flatnonzero(expected != tokens):
            # At a tie of the model's own rounding decides.
            if best[step, 0] - best[step, 1] > allowed:
                return f"the token likeliest after {step} others is another"
    return None


def _prompts(stored: Mapping[str, Any]) -> list[str]:
    return [name.removesuffix("new_ids") for name in sorted(stored) if name.endswith("new_ids")]


def _pair(
    stored: Mapping[str, Any], found: Found, key: str, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probabilities of the torch model and of llama.cpp, of the latter's tokens."""
    ids, values = found.arrays[f"{key}ids"], found.arrays[f"{key}logprobs"].astype(np.float64)
    wanted = np.empty_like(values)
    for step, row in enumerate(ids):
        known = {token: place for place, token in enumerate(stored[f"{key}{kind}ids"][step])}
        own = stored[f"{key}{kind}logprobs"][step]
        # A token that is not among those stored is no likelier than the last of them.
        wanted[step] = [own[known.get(token, -1)] for token in row]
    return wanted, values


def _relative(wanted: np.ndarray, got: np.ndarray) -> float:
    """Return the length of the difference over that of the log-probabilities less their mean."""
    spread = float(np.linalg.norm(wanted - wanted.mean(-1, keepdims=True)))
    gap = float(np.linalg.norm(wanted - got))
    return gap / spread if spread else gap
