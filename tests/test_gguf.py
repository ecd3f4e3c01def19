"""GGUF files: the converted checkpoint has the weights, token ids and settings of the file."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from elastune.errors import BadArtifact, ElastuneError, UnsupportedModel
from elastune.models import load_model
from elastune.models.gguf import convert_gguf

SMALL: dict[str, Any] = {
    "vocab_size": 10,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ELASTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(model: PreTrainedModel, file: Path, *, pre: str = "smollm", **extra: bool) -> None:
    """Write a llama or qwen2 model as llama.cpp's own converter lays it out."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(str(file), arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokens = ["<|endoftext|>", "<s>", "</s>", "1", "2", "3", "4", "12", "Ġ", "a"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 7)
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    modules = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
    modules |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    modules |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    modules |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        path, suffix = name.rsplit(".", 1)
        if path in top:
            gguf_name = top[path]
        else:
            _, _, index, module = path.split(".", 3)
            gguf_name = f"blk.{index}.{modules[module]}"
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            half = value.shape[0] // heads // 2
            halves = value.reshape(heads, 2, half, -1)
            value = torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(value.shape)
        writer.add_tensor(f"{gguf_name}.{suffix}", value.float().numpy())
    for name in extra:
        writer.add_tensor(f"{name}.weight", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_for_gguf(arch: str, tied: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = SMALL | {"tie_word_embeddings": tied, "rope_parameters": {"rope_theta": 5e4}}
    if arch == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    model = Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
    for name, value in model.named_parameters():  # biases start at zero, which would prove nothing
        if name.endswith("bias"):
            torch.nn.init.normal_(value)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_gguf_file_gives_the_logits_of_the_model_it_was_written_from(
    tmp_path: Path, cache: Path, arch: str, tied: bool
) -> None:
    original = tiny_for_gguf(arch, tied)
    write_gguf(original, tmp_path / "m.gguf", pre="qwen2" if arch == "qwen2" else "smollm")
    model, _ = load_model(str(tmp_path / "m.gguf"))
    ids = torch.arange(3, 10).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-6)
    assert model.config.tie_word_embeddings == tied
    assert model.dtype == torch.float32


def test_the_direct_reader_gives_the_very_weights_that_transformers_reads(tmp_path: Path) -> None:
    write_gguf(tiny_for_gguf("llama", True), tmp_path / "m.gguf")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_other_architectures_go_through_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tiny_for_gguf("llama", False), tmp_path / "m.gguf")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "direct")
    monkeypatch.setattr("elastune.models.gguf._RENAMED_ONLY", ())
    convert_gguf(tmp_path / "m.gguf", tmp_path / "through")
    direct = load_file(tmp_path / "direct" / "model.safetensors")
    through = load_file(tmp_path / "through" / "model.safetensors")
    assert set(direct) == set(through)
    assert all(torch.equal(direct[name], through[name]) for name in direct)


def test_a_converted_folder_is_an_ordinary_one(tmp_path: Path) -> None:
    write_gguf(tiny_for_gguf("llama", True), tmp_path / "m.gguf")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rope_theta"] == 5e4
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert tokenizer["model"]["merges"] == ["1 2"]
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    _, loaded = load_model(tmp_path / "out")
    assert loaded.chat_template == "{{ messages[0]['content'] }}"
    assert (loaded.bos_token, loaded.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize(("pre", "ids"), [("smollm", [3, 4]), ("gpt-2", [7])])
def test_digits_are_split_only_where_the_file_says_so(
    tmp_path: Path, pre: str, ids: list[int]
) -> None:
    write_gguf(tiny_for_gguf("llama", True), tmp_path / "m.gguf", pre=pre)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert load_model(tmp_path / "out")[1]("12").input_ids == ids


def test_an_unverified_pre_tokenizer_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(tiny_for_gguf("llama", True), tmp_path / "m.gguf", pre="brand-new")
    with caplog.at_level(logging.WARNING, logger="elastune"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert "'brand-new'" in caplog.text


def test_a_tensor_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    write_gguf(tiny_for_gguf("llama", True), tmp_path / "m.gguf", rope_freqs=True)
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_is_converted_once_until_it_changes(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(tiny_for_gguf("llama", True), file)
    with caplog.at_level(logging.INFO, logger="elastune"):
        load_model(file)
        load_model(file)
        assert caplog.text.count("converting") == 1
        write_gguf(tiny_for_gguf("llama", False), file)
        load_model(file)
        assert caplog.text.count("converting") == 2


@pytest.mark.parametrize("keep", [0, 10, 200, 2000, -100])
def test_a_truncated_gguf_file_is_named_and_leaves_no_cache(
    tmp_path: Path, cache: Path, keep: int
) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(tiny_for_gguf("llama", True), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BadArtifact, match=r"m\.gguf' is truncated or not a GGUF file"):
        load_model(file)
    assert not [p for p in cache.rglob("*") if p.is_dir() and p.parent.name == "gguf"]


def test_a_missing_gguf_package_gives_the_install_line(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "gguf" else real(n, *a)
    )
    with pytest.raises(ElastuneError, match=r"pip install 'elastune\[gguf\]'"):
        load_model(tmp_path / "m.gguf")
