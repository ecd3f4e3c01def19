"""Exports served by existing servers: `transformers serve`, and llama.cpp's own."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import tiny_llama, tiny_tokenizer

from elastune.build_structure import structure_space
from elastune.export import export_model
from elastune.space import SubnetConfig
from elastune.subnetwork import Subnetwork, extract_model
from elastune.supernet import SuperNetwork

PROMPT, N_NEW = "How many apples", 8
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def small() -> tuple[Subnetwork, Any]:
    """A decoder whose blocks differ in size, and a tokenizer that can chat."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = tiny_llama(tokenizer)
    space = structure_space(model, ffn=[1.0, 0.5], heads=[1.0, 0.5], round_to=8)
    first = {dim.name: dim.choices[-1] for dim in space.dims if dim.name.startswith("layers.0.")}
    config = SubnetConfig({**space.largest(), **first})
    sub = extract_model(SuperNetwork(model, space), config)
    assert len(set(sub.shapes)) == 2
    return sub, tokenizer


def greedy_text(model: Any, tokenizer: Any) -> str:
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=N_NEW, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def post(address: str, path: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


@pytest.fixture
def transformers_server(small: tuple[Subnetwork, Any], tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The address of a running `transformers serve`, and the name of the model it serves."""
    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")):
        pytest.skip("transformers serve needs transformers[serving]")
    made = export_model(small[0], "hf-padded", tmp_path / "served", tokenizer=small[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command = Path(sys.executable).parent / "transformers"
    process = subprocess.Popen(
        [command, "serve", str(made.folder), *place],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, "the server ended"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", str(made.folder)
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_transformers_serve_says_what_the_subnetwork_says(
    small: tuple[Subnetwork, Any], transformers_server: tuple[str, str]
) -> None:
    address, name = transformers_server
    wanted = greedy_text(small[0].model, small[1])
    asked = {"model": name, "max_tokens": N_NEW, "temperature": 0, "stream": False}
    chat = post(
        address,
        "/v1/chat/completions",
        asked | {"messages": [{"role": "user", "content": PROMPT}]},
    )
    assert chat["choices"][0]["message"]["content"] == wanted


def test_llama_cpps_server_says_what_the_subnetwork_says(
    small: tuple[Subnetwork, Any], tmp_path: Path
) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    made = export_model(small[0], "gguf", tmp_path / "gguf", tokenizer=small[1])
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(made.folder / "model.gguf")
    parameters.n_ctx, parameters.n_gpu_layers, parameters.verbosity = 128, 0, 0
    server = xllamacpp.Server(parameters)
    wanted = greedy_text(small[0].model, small[1])
    asked = {"prompt": PROMPT, "max_tokens": N_NEW, "temperature": 0}
    found = post(server.listening_address, "/v1/completions", asked)
    assert found["choices"][0]["text"] == wanted
