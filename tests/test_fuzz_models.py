"""Fuzz: checkpoint folders, adapters, GGUF files. Nothing is run, and nothing huge is allocated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import Outcomes, changed, damaged, json_bytes, snapshot, texts_near, tiers
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_gguf import SMALL, write_gguf
from tiny_llama import tiny_llama, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from elastune.adapters import cut_adapter
from elastune.adapters.peft_folder import read_adapter
from elastune.errors import ElastuneError
from elastune.models import load_model
from elastune.models.gguf import convert_gguf

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and PEFT's, about odd settings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(tiny_llama(tiny_tokenizer()), settings)
    for name, value in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    wrapped.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(model)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(LlamaForCausalLM(LlamaConfig(**SMALL)), file)
    return file.read_bytes()


def safetensors_near(valid: bytes) -> Any:
    """Return safetensors files whose header lies, or whose bytes are damaged."""
    size = int.from_bytes(valid[:8], "little")
    header, rest = json.loads(valid[8 : 8 + size]), valid[8 + size :]

    def packed(data: Any) -> bytes:
        text = json_bytes(data)
        return len(text).to_bytes(8, "little") + text + rest

    immense = {
        **header,
        next(iter(header)): {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
    }
    return st.one_of(
        changed(header).map(packed),
        damaged(valid),
        st.sampled_from([packed(immense), (2**62).to_bytes(8, "little") + rest, b"", valid[:8]]),
    )


def put(home: Path, name: str, content: bytes) -> None:
    (home / name).write_bytes(content)


MODEL_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json")


@tiers(16, 0.15)
def test_any_checkpoint_folder_is_loaded_or_refused(model: Path, tmp_path: Path, tier: Any) -> None:
    outcomes, folder = Outcomes(), tmp_path / "model"
    strategies = [
        st.tuples(st.just(name), texts_near((model / name).read_text(encoding="utf-8")))
        for name in MODEL_FILES
    ]
    weights = safetensors_near((model / "model.safetensors").read_bytes())
    strategies += [strategies[0], st.tuples(st.just("model.safetensors"), weights)]
    shutil.copytree(model, folder)
    before = snapshot(tmp_path, folder)

    @tier
    @given(st.one_of(*strategies))
    def check(change: tuple[str, bytes]) -> None:
        name, content = change
        put(folder, name, content)
        try:
            outcomes.of(lambda: load_model(folder))
        finally:
            shutil.copy(model / name, folder / name)
        assert snapshot(tmp_path, folder) == before

    check()
    outcomes.both()


@tiers(20, 0.3)
def test_any_index_of_shards_is_read_or_refused(model: Path, tmp_path: Path, tier: Any) -> None:
    outcomes, folder = Outcomes(), tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = list(tiny_llama(tiny_tokenizer()).state_dict())
    index = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors"),
    }

    @tier
    @given(texts_near(json.dumps(index)))
    def check(text: bytes) -> None:
        put(folder, "model.safetensors.index.json", text)
        outcomes.of(lambda: load_model(folder))

    check()
    outcomes.both()


@tiers(40, 1.0)
def test_any_adapter_is_read_or_refused(model: Path, lora: Path, tmp_path: Path, tier: Any) -> None:
    outcomes, folder = Outcomes(), tmp_path / "lora"
    base, _ = load_model(model)
    shutil.copytree(lora, folder)
    configs = texts_near((lora / "adapter_config.json").read_text())
    weights = safetensors_near((lora / "adapter_model.safetensors").read_bytes())

    @tier
    @given(
        st.one_of(
            st.tuples(st.just("adapter_config.json"), configs),
            st.tuples(st.just("adapter_model.safetensors"), weights),
        )
    )
    def check(change: tuple[str, bytes]) -> None:
        name, content = change
        put(folder, name, content)
        try:
            outcomes.of(lambda: read_adapter(folder, base))
        finally:
            shutil.copy(lora / name, folder / name)

    check()
    outcomes.both()


@tiers(6, 0.1)
def test_any_adapter_is_cut_or_refused_and_writes_its_folder_alone(
    model: Path, lora: Path, tmp_path: Path, tier: Any
) -> None:
    outcomes, folder, out = Outcomes(), tmp_path / "lora", tmp_path / "out"
    shutil.copytree(lora, folder)
    text = (lora / "adapter_config.json").read_text()
    before = snapshot(tmp_path, folder, out)
    targets = st.sampled_from([{}, {"energy": 0.5}, {"rank": 2}, {"target": "params<=0.5x"}])

    @tier
    @given(changed(json.loads(text)).map(json_bytes), targets)
    def check(config: bytes, how: dict[str, Any]) -> None:
        put(folder, "adapter_config.json", config)
        outcomes.of(lambda: cut_adapter(folder, out, **how))
        assert snapshot(tmp_path, folder, out) == before
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]

    check()
    outcomes.both()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTUNE_CACHE", str(tmp_path / "cache"))


@tiers(25, 1.0)
def test_any_gguf_file_is_converted_or_refused(
    gguf_bytes: bytes, tmp_path: Path, tier: Any
) -> None:
    outcomes, file, out = Outcomes(), tmp_path / "m.gguf", tmp_path / "out"
    header = gguf_bytes[: gguf_bytes.index(b"output_norm") + 64]
    near = damaged(header).map(lambda head: head + gguf_bytes[len(header) :])

    @tier
    @given(st.one_of(near, near, damaged(gguf_bytes)))
    def check(content: bytes) -> None:
        file.write_bytes(content)
        outcomes.of(lambda: convert_gguf(file, out))

    check()
    outcomes.both()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(("num_hidden_layers", 10**9), ("num_hidden_layers", 30), ("vocab_size", 10**9)),
        *(("hidden_size", 10**7), ("intermediate_size", 2**40), ("num_labels", 10**9)),
        *(("max_position_embeddings", 2**40), ("head_dim", 2**34), ("num_attention_heads", 2**31)),
    ],
)
def test_a_config_of_immense_sizes_is_refused_before_memory_is_taken(
    model: Path, tmp_path: Path, name: str, count: int
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    config = json.loads((model / "config.json").read_text()) | {name: count}
    (folder / "config.json").write_text(json.dumps(config))
    found = Outcomes().of(lambda: load_model(folder))
    # More positions than are used cost nothing in a model that rotates.
    assert isinstance(found, ElastuneError) or name == "max_position_embeddings"


@pytest.mark.parametrize(
    ("before", "kind", "bytes_of_kind"),
    [(b"tokenizer.ggml.token_type", 9, 4 + 8), (b"tokenizer.ggml.pre", 8, 8)],
)
def test_a_gguf_length_of_a_trillion_is_refused_at_once(
    gguf_bytes: bytes, tmp_path: Path, before: bytes, kind: int, bytes_of_kind: int
) -> None:
    end = gguf_bytes.index(before) + len(before) + 4 + bytes_of_kind
    for length in (10**12, 2**63, 2**64 - 1):
        file = tmp_path / "m.gguf"
        file.write_bytes(gguf_bytes[: end - 8] + length.to_bytes(8, "little") + gguf_bytes[end:])
        found = Outcomes().of(lambda: convert_gguf(tmp_path / "m.gguf", tmp_path / "out"))
        assert isinstance(found, ElastuneError)


@pytest.mark.parametrize("at", [8, 16])
def test_a_gguf_file_of_a_trillion_tensors_or_fields_is_refused_at_once(
    gguf_bytes: bytes, tmp_path: Path, at: int
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf_bytes[:at] + (2**60).to_bytes(8, "little") + gguf_bytes[at + 8 :])
    assert isinstance(Outcomes().of(lambda: convert_gguf(file, tmp_path / "out")), ElastuneError)


def test_a_pattern_that_would_take_for_ever_is_refused(
    model: Path, lora: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "lora"
    shutil.copytree(lora, folder)
    config = json.loads((lora / "adapter_config.json").read_text())
    base, _ = load_model(model)
    for changes in (
        {"target_modules": r"(.*)*!"},
        {"rank_pattern": {r"(\w+\.?)+!": 4}},
        {"alpha_pattern": {"(": 4}},
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        assert isinstance(Outcomes().of(lambda: read_adapter(folder, base)), ElastuneError)
