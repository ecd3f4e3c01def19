"""GGUF files: llama.cpp computes from them what the model does, and says so if it does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_export import Sizes, cut, word_tokenizer
from tiny_llama import tiny_tokenizer
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from elastune.build_structure import structure_space
from elastune.elastic.factorised import FactorisedEmbedding
from elastune.errors import BadArtifact, BadRecipe, ElastuneError, UnsupportedModel
from elastune.export import gguf_file, save_subnetwork
from elastune.export.runtimes import RuntimeExport
from elastune.export.to_gguf import check_gguf, export_gguf
from elastune.models import load_model
from elastune.models.gguf import convert_gguf
from elastune.space import SubnetConfig
from elastune.subnetwork import Subnetwork, extract_model
from elastune.supernet import SuperNetwork

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

#: No attention in the first block; one block left out; one without a feed-forward, one whole.
RAGGED: Sizes = ((0, 24), None, (4, 0), (2, 40))
ALIKE: Sizes = ((2, 32), (2, 32))
TOKENIZER = tiny_tokenizer()
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


def cut_for(family: str, sizes: Sizes, **changes: Any) -> Subnetwork:
    """Return a sub-network whose vocabulary is that of the tokenizer."""
    return cut(family, "causal-lm", sizes, **({"vocab_size": len(TOKENIZER)} | changes))


def export(sub: Any, out: Path, **options: Any) -> RuntimeExport:
    return export_gguf(sub, out, **({"tokenizer": TOKENIZER} | options))


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found = gguf.GGUFReader(folder / "model.gguf").tensors
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in found}


def field(folder: Path, name: str) -> Any:
    return gguf.GGUFReader(folder / "model.gguf").get_field(name).contents()


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> RuntimeExport:
    return export(cut_for("llama", RAGGED), tmp_path_factory.mktemp("gguf") / "ragged")


@pytest.fixture
def copied(ragged: RuntimeExport, tmp_path: Path) -> Path:
    for name in ragged.files:
        (tmp_path / name).write_bytes((ragged.folder / name).read_bytes())
    return tmp_path


# --- what llama.cpp computes --------------------------------------------------------------------


def test_blocks_of_any_size_give_the_same_probabilities_in_llama_cpp(
    ragged: RuntimeExport,
) -> None:
    assert ragged.largest_difference < 2e-5
    assert (ragged.agreement.same_argmax, ragged.agreement.same_tokens) == (1.0, 1.0)
    assert field(ragged.folder, "general.architecture") == "deci"
    assert field(ragged.folder, "deci.attention.head_count") == [2, 4, 2]
    assert field(ragged.folder, "deci.feed_forward_length") == [24, 32, 40]
    assert check_gguf(ragged.folder) == ragged.agreement


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("family", "sizes", "changes", "architecture"),
    [
        ("qwen2", ((2, 24), (0, 40), (4, 40)), {}, "deci"),
        ("qwen3", ALIKE, {"tie_word_embeddings": True}, "qwen3"),
        ("mistral", ((2, 24), None, (2, 24)), {"sliding_window": 32}, "llama"),
        (
            "llama",
            ALIKE,
            {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA3},
            "llama",
        ),
    ],
)
def test_every_family_agrees_in_its_architecture(
    family: str, sizes: Sizes, changes: Any, architecture: str, tmp_path: Path
) -> None:
    made = export(cut_for(family, sizes, **changes), tmp_path / "out")
    assert made.largest_difference < 2e-5
    assert field(made.folder, "general.architecture") == architecture
    names = tensors(made.folder)
    assert ("output.weight" in names) == ("tie_word_embeddings" not in changes)
    assert ("rope_freqs.weight" in names) == ("rope_parameters" in changes)
    if family == "mistral":  # beyond its window llama.cpp would see more than the model does
        assert field(made.folder, "llama.context_length") == 32
        assert any("32" in note for note in made.notes)


def test_only_deci_reads_blocks_of_different_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastune.export.gguf_file.for_llama_cpp", lambda model: (model, "llama"))
    with pytest.raises(ElastuneError, match="cannot run what was exported"):
        export(cut_for("llama", ((2, 24), (4, 40))), tmp_path / "out")


# --- what the file holds ------------------------------------------------------------------------


def test_a_file_of_equal_blocks_reads_back_in_transformers(tmp_path: Path) -> None:
    sub = cut_for("llama", ALIKE)
    folder = export(sub, tmp_path / "out").folder
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf")
    convert_gguf(folder / "model.gguf", tmp_path / "converted")
    ours, tokenizer = load_model(tmp_path / "converted")[:2]
    for model in (read, ours):
        state = model.state_dict()
        assert all(torch.equal(state[n], w) for n, w in sub.model.state_dict().items())
    text = "There are 48 apples, and 7 more."
    assert tokenizer(text).input_ids == TOKENIZER(text).input_ids


def test_q8_0_is_rounded_in_groups_of_32_and_probabilities_are_of_the_rounded_model(
    tmp_path: Path,
) -> None:
    sub = cut_for("llama", ((4, 64), (2, 40)), intermediate_size=64)
    made = export(sub, tmp_path / "q8", weights="q8_0")
    found = tensors(made.folder)
    weight = sub.model.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    groups = weight.reshape(-1, 32)
    scale = np.abs(groups).max(1, keepdims=True) / 127
    error = np.abs(found["blk.0.ffn_up.weight"].reshape(-1, 32) - groups)
    assert error.max() > 0
    assert (error <= scale * 0.55).all()
    # 40 inputs, and 2 heads of 8, are no whole number of groups.
    assert made.notes[-1].startswith("2 of ")
    half = sub.model.state_dict()["model.layers.1.mlp.down_proj.weight"].half().float().numpy()
    np.testing.assert_array_equal(found["blk.1.ffn_down.weight"], half)
    assert 1e-3 < made.largest_difference < 1.0


@pytest.mark.parametrize("weights", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_half_precision_agrees_within_its_own_rounding(weights: str, tmp_path: Path) -> None:
    made = export(cut_for("llama", ALIKE), tmp_path / "out", weights=weights)
    assert 1e-5 < made.agreement.relative_error < 0.05


def test_an_embedding_of_low_rank_is_multiplied_out(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=len(TOKENIZER))
    torch.manual_seed(0)
    table = FactorisedEmbedding(len(TOKENIZER), 8, 32)
    model.set_input_embeddings(table)
    made = export(model, tmp_path / "out", weights="float16")
    held = tensors(made.folder)["token_embd.weight"]
    np.testing.assert_array_equal(held, table.weight.detach().half().float().numpy())


@pytest.mark.parametrize("format", ["hf-hetero", "hf-padded"])
def test_a_saved_folder_is_exported_with_its_tokenizer(format: str, tmp_path: Path) -> None:
    sub = cut_for("qwen3" if format == "hf-padded" else "llama", ((2, 24), (4, 0)))
    save_subnetwork(sub, TOKENIZER, tmp_path / "saved", format=format)
    made = export_gguf(tmp_path / "saved", tmp_path / "out")
    assert made.largest_difference < 2e-5
    assert field(made.folder, "general.name") == "saved"


# --- tokenizers ---------------------------------------------------------------------------------


def sentencepiece() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=list("▁abcdehlortuw"),
        limit_alphabet=20,
        show_progress=False,
    )
    raw.train_from_iterator(["the cat was here", "the hat there"], trainer)
    data = json.loads(raw.to_str())
    # The bytes are ordinary tokens, as they are in SentencePiece's own files.
    rows = [row for row in data["added_tokens"] if not row["content"].startswith("<0x")]
    raw = Tokenizer.from_str(json.dumps(data | {"added_tokens": rows}))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_sentencepiece_gives_the_same_tokens_in_llama_cpp(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    sub = cut("llama", "causal-lm", ALIKE, vocab_size=len(tokenizer) + 3)
    made = export_gguf(sub, tmp_path / "out", tokenizer=tokenizer)
    assert field(made.folder, "tokenizer.ggml.model") == "llama"
    assert field(made.folder, "tokenizer.ggml.tokens")[-1] == f"[PAD{len(tokenizer) + 2}]"
    about = json.loads((made.folder / "export.json").read_text())
    assert about["token_ids"][0] == tokenizer(about["texts"][0]).input_ids


def test_the_chat_template_renders_alike_and_a_wrong_split_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    made = export(cut_for("llama", ALIKE), tmp_path / "out", tokenizer=tokenizer)
    assert field(made.folder, "tokenizer.chat_template") == TEMPLATE
    assert not any("template" in note for note in made.notes)
    with pytest.raises(ElastuneError, match="gives the tokens"):
        export(cut_for("llama", ALIKE), tmp_path / "other", pre="llama-bpe")
    assert not (tmp_path / "other").exists()


# --- broken files -------------------------------------------------------------------------------


def rewrite(file: Path, *, without: str = "", blocks: int | None = None) -> None:
    """Write a file anew, without some tensors."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(file.with_suffix(".new"), "deci")
    for name, item in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = item.contents()
        if name == "deci.block_count":
            value = blocks or value
        sub_type = item.types[-1] if len(item.types) > 1 else None
        writer.add_key_value(name, value, item.types[0], sub_type)
    for tensor in reader.tensors:
        if not (without and tensor.name.startswith(without)):
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_suffix(".new").replace(file)


def flip(file: Path, name: str) -> None:
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == name)
    with file.open("r+b") as stream:
        stream.seek(tensor.data_offset + 4 * 7 + 2)  # the exponent of the seventh float32
        (byte,) = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))


def test_a_flipped_tensor_and_a_missing_layer_are_named(copied: Path) -> None:
    whole = (copied / "model.gguf").read_bytes()
    flip(copied / "model.gguf", "blk.1.attn_v.weight")
    with pytest.raises(ElastuneError, match=r"blk\.1\.attn_v\.weight is not what was written"):
        check_gguf(copied)
    (copied / "model.gguf").write_bytes(whole)
    rewrite(copied / "model.gguf", without="blk.2.", blocks=2)
    with pytest.raises(ElastuneError, match=r"the file lacks blk\.2\."):
        check_gguf(copied)
    (copied / "model.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ElastuneError, match="cannot run"):
        check_gguf(copied)
    (copied / "model.gguf").unlink()
    with pytest.raises(BadArtifact, match=r"lacks model\.gguf"):
        check_gguf(copied)


def test_other_settings_are_found_by_what_llama_cpp_computes(copied: Path) -> None:
    file = copied / "model.gguf"
    data = file.read_bytes()
    theta = np.float32(10000.0).tobytes()
    assert data.count(theta) >= 1
    file.write_bytes(data.replace(theta, np.float32(100.0).tobytes(), 1))
    with pytest.raises(ElastuneError, match="log-probabilities differ"):
        check_gguf(copied)
    file.write_bytes(data.replace(b"ragged", b"RAGGED").replace(b"Llama", b"LLAMA"))
    with pytest.raises(ElastuneError, match="changed since the export"):
        check_gguf(copied)


def test_a_wrong_layout_is_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sub = cut_for("llama", ((2, 24), (4, 0), (4, 24)))
    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "_interleaved", lambda name, stored, head_dim: stored)
        with pytest.raises(ElastuneError, match="log-probabilities differ"):
            export(sub, tmp_path / "out")
    # llama.cpp reads a block without a feed-forward and forgets its attention.
    monkeypatch.setattr(gguf_file, "for_llama_cpp", lambda model: (model, "deci"))
    with pytest.raises(ElastuneError, match="log-probabilities differ"):
        export(sub, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- what is refused ----------------------------------------------------------------------------


def test_what_llama_cpp_cannot_hold_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sub = cut_for("llama", ALIKE)
    with pytest.raises(UnsupportedModel, match="known are llama, mistral, qwen2, qwen3"):
        export(cut("gemma2", "causal-lm", ALIKE), out)
    with pytest.raises(UnsupportedModel, match="is no causal language model"):
        export(cut("llama", "classifier", ALIKE), out)
    with pytest.raises(UnsupportedModel, match="only with blocks of one size"):
        export(cut_for("qwen3", ((2, 24), (4, 40))), out)
    with pytest.raises(UnsupportedModel, match="WordLevel"):
        export(sub, out, tokenizer=word_tokenizer())
    with pytest.raises(UnsupportedModel, match="the tokenizer has ids up to 299"):
        export(cut("llama", "causal-lm", ALIKE), out)
    rope = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 2.0}
    with pytest.raises(UnsupportedModel, match="'yarn'"):
        export(cut_for("llama", ALIKE, rope_parameters=rope), out)
    with pytest.raises(BadRecipe, match="no weights 'q8'"):
        export(sub, out, weights="q8")
    with pytest.raises(BadRecipe, match="no tokenizer"):
        export(sub, out, tokenizer=None)
    with pytest.raises(BadRecipe, match=r"bfloat16 on cpu"):
        export(cut_for("llama", ALIKE).model.bfloat16(), out)
    with pytest.raises(BadRecipe, match="not merged"):
        export(replace(sub, adapter=object()), out)  # type: ignore[arg-type]
    assert not out.exists()


# --- the real model -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["float32", "q8_0"])
def test_a_cut_smollm2_runs_in_llama_cpp(weights: str, tmp_path: Path) -> None:
    model, tokenizer = load_model("smollm2-135m")[:2]
    space = structure_space(model, heads=[9, 6, 3], ffn=[1536, 768], depth=[20])
    middle = {"heads": 6, "ffn": 768, "block": 0}
    choices = {dim.name: dim.choices[0] for dim in space.dims}
    for name in choices:
        if name.startswith("layers.2"):
            choices[name] = middle[name.rpartition(".")[2]]
    config = SubnetConfig(choices)
    sub = extract_model(SuperNetwork(model, space), config)
    made = export_gguf(sub, tmp_path / "out", tokenizer=tokenizer, weights=weights)
    assert field(made.folder, "deci.block_count") == 29
    assert field(made.folder, "tokenizer.ggml.pre") == "smollm"
    if weights == "float32":
        assert made.largest_difference < 2e-3
        assert made.agreement.same_tokens == 1.0
