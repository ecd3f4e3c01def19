"""Uploads, against a hub of our own in a thread: nothing leaves the machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from test_models import word_tokenizer
from tiny_models import tiny_model, tiny_net

from elastune.build_structure import structure_space
from elastune.errors import BadArtifact, BadRecipe, ElastuneError
from elastune.export import save_subnetwork
from elastune.files import write_json
from elastune.push import complete_export, push
from elastune.subnetwork import extract_model
from elastune.supernet import SuperNetwork

pytestmark = [  # of PEFT, and of the hub's own library
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

TOKEN = "hf_test_token"


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload needs: repositories of one user, files small and large."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos: dict[str, dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}
        self.commits: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = None) -> None:
        text = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self) -> None:
        data = self.read()
        self.server.large[self.path.rpartition("/")[2]] = data
        self.answer(200)

    def do_POST(self) -> None:
        body = self.read()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
            return
        if self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            card = ModelCard(json.loads(body)["content"])  # raises for what is no card
            self.answer(200, {"errors": [] if card.data else ["empty"], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in files
            ]
            self.answer(200, {"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/large/{o['oid']}"}}}
                for o in objects
            ]
            self.answer(200, {"transfer": "basic", "objects": actions})
        elif "/commit/" in self.path:
            self.commit(body.decode())
        else:
            self.answer(404, {"error": self.path})

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.server.url}/{name}"}
        if wanted["organization"] != "user":
            self.answer(403, {"error": "You don't have the rights to create a model there"})
        elif name in self.server.repos:
            self.answer(409, {"error": "You already created this model repo", **url})
        else:
            self.server.repos[name] = {"visibility": wanted.get("visibility"), "files": {}}
            self.answer(200, url)

    def commit(self, text: str) -> None:
        name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
        files = self.server.repos[name]["files"]
        for line in map(json.loads, text.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                data = self.server.large[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                files[value["path"]] = data
        url = f"{self.server.url}/{name}/commit/{'0' * 40}"
        self.answer(200, {"commitUrl": url, "commitOid": "0" * 40})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sub-network as a model of its own, and one as an adapter."""
    root = tmp_path_factory.mktemp("exports")
    model = tiny_model("llama")
    net = SuperNetwork(model, structure_space(model, ffn=[48, 16]))
    sub = extract_model(net, net.space.smallest())
    save_subnetwork(sub, word_tokenizer(), root / "small", origin="example/tiny-llama")
    net = tiny_net(tiny_model("llama"))
    sub = extract_model(net, net.space.heuristic(), merge=False)
    save_subnetwork(sub, word_tokenizer(), root / "with-adapter", origin="example/tiny-llama")
    return root


def test_a_file_that_cannot_be_sent_is_named_and_nothing_is_committed(
    hub: Hub, exports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "do_PUT", lambda self: (self.read(), self.answer(400)))
    with pytest.raises(
        ElastuneError, match=r"model\.safetensors.*Bad request.*nothing was committed"
    ):
        push(exports / "small", "user/a", endpoint=hub.url)
    assert hub.commits == []


@pytest.mark.parametrize("name", ["small", "with-adapter"])
def test_an_upload_is_the_folder_byte_for_byte(hub: Hub, exports: Path, name: str) -> None:
    folder = exports / name
    (folder / ".cache").mkdir(exist_ok=True)
    (folder / ".cache" / "left.lock").write_text("left over")
    done = push(folder, "user/mine", endpoint=hub.url)
    there = hub.repos["user/mine"]["files"]
    here = {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and ".cache" not in p.parts
    }
    assert there == here
    assert set(done.files) == set(here)
    assert "model.safetensors" in here
    assert ("adapter/adapter_model.safetensors" in here) == (name == "with-adapter")
    assert done.n_bytes == sum(map(len, here.values()))
    assert done.url.startswith(hub.url)
    assert hub.commits == [f"Upload {name}"]


def test_repositories_are_private_unless_asked_otherwise(hub: Hub, exports: Path) -> None:
    push(exports / "small", "user/a", endpoint=hub.url)
    push(exports / "small", "user/b", endpoint=hub.url, private=False, message="first")
    push(exports / "small", "user/b", endpoint=hub.url, private=False)
    assert hub.repos["user/a"]["visibility"] == "private"
    assert hub.repos["user/b"]["visibility"] == "public"
    assert hub.commits[1:] == ["first", "Upload small"]


def test_without_a_token_nothing_is_sent(
    hub: Hub, exports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(BadRecipe, match="no token") as caught:
        push(exports / "small", "user/a", endpoint=hub.url)
    assert "HF_TOKEN" in str(caught.value.try_)
    assert hub.repos == {}


def test_a_hub_that_refuses_is_quoted(hub: Hub, exports: Path) -> None:
    with pytest.raises(ElastuneError, match="does not let this token write to user/a") as caught:
        push(exports / "small", "user/a", endpoint=hub.url, token="hf_wrong")
    assert "HF_TOKEN" in str(caught.value.try_)
    with pytest.raises(ElastuneError, match="someone-else/a"):
        push(exports / "small", "someone-else/a", endpoint=hub.url)
    with pytest.raises(BadRecipe, match="owner/name"):
        push(exports / "small", "no-owner", endpoint=hub.url)
    assert hub.repos == {}


def test_a_hub_out_of_reach_is_told_in_one_line(hub: Hub, exports: Path) -> None:
    with pytest.raises(ElastuneError, match="cannot be reached"):
        push(exports / "small", "user/a", endpoint="http://127.0.0.1:9")


def test_what_is_no_complete_export_is_refused_before_anything_is_sent(
    hub: Hub, tmp_path: Path
) -> None:
    folder = tmp_path / "export"

    def refused(words: str) -> None:
        with pytest.raises(BadArtifact, match=words):
            push(folder, "user/a", endpoint=hub.url)

    refused("no folder")
    folder.mkdir()
    refused("no export")
    write_json(folder / "config.json", {"model_type": "llama"})
    refused(r"no model\.safetensors")
    save_file({"weight": torch.zeros(100)}, folder / "model.safetensors")
    refused("README")
    (folder / "README.md").write_text("a card")
    assert complete_export(folder) == ("README.md", "config.json", "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    refused("truncated or corrupt")
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "adapter").mkdir()
    write_json(folder / "adapter" / "adapter_config.json", {})
    refused("adapter_model")
    (folder / "adapter" / "adapter_config.json").unlink()
    write_json(folder / "export.json", {"file": "model.onnx", "sha256": {"model.onnx.data": ""}})
    refused(r"model\.onnx\.data, model\.onnx")
    (folder / "export.json").unlink()
    (folder / "recipe.yaml").write_text("method: shears")
    write_json(folder / "manifest.json", {})
    refused("run directory")
    assert hub.repos == {}
