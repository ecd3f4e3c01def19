"""nemotron-nas checkpoints: what the config says of each block is what the weights are."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import Sizes, cut
from tiny_llama import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from elastune.errors import BadArtifact, BadRecipe, ElastuneError, UnsupportedModel
from elastune.export import nemotron_nas_run, save_subnetwork, to_nemotron_nas
from elastune.export.saved import Saved
from elastune.export.to_nemotron_nas import check_nemotron_nas, export_nemotron_nas

#: Fewer heads; one block left out; no feed-forward; no attention; whole.
RAGGED: Sizes = ((2, 24), None, (4, 0), (0, 40), (4, 48))
ALIKE: Sizes = ((2, 24), (2, 24))
TOKENIZER = tiny_tokenizer()


def export(family: str, sizes: Sizes, out: Path, *, ffn_mult: Any = None, **changes: Any) -> Saved:
    sub = cut(family, "causal-lm", sizes, **changes)
    return export_nemotron_nas(sub, out, tokenizer=TOKENIZER, ffn_mult=ffn_mult)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reader run in this process, which takes no seconds to import transformers."""

    def logits(folder: Path) -> torch.Tensor:
        ids = load_file(folder / "reference.safetensors")["input_ids"]
        return nemotron_nas_run.logits_of(folder, ids)

    monkeypatch.setattr(to_nemotron_nas, "_fresh_logits", logits)


def config_of(folder: Path) -> Any:
    """Return the config as the file in the folder reads it."""
    spec = importlib.util.spec_from_file_location("decilm", folder / "configuration_decilm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DeciLMConfig.from_pretrained(folder)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return export("llama", RAGGED, tmp_path_factory.mktemp("nemotron") / "ragged")


@pytest.fixture
def copied(ragged: Saved, tmp_path: Path) -> Path:
    for name in ragged.files:
        (tmp_path / name).write_bytes((ragged.folder / name).read_bytes())
    return tmp_path


def test_blocks_built_from_the_config_alone_compute_what_the_model_does(ragged: Saved) -> None:
    assert ragged.largest_difference < 1e-5
    assert check_nemotron_nas(ragged.folder) == ragged.largest_difference
    blocks = config_of(ragged.folder).block_configs
    assert [block.attention.no_op for block in blocks] == [False, False, True, False]
    assert [block.ffn.no_op for block in blocks] == [False, True, False, False]
    # One key/value head for 2 of 4 query heads, the other 2 are zeros; then 2 of 2.
    assert [block.attention.n_heads_in_group for block in blocks] == [4, 2, None, 2]
    assert [block.ffn.intermediate_size for block in blocks] == [24, None, 40, 48]
    assert not hasattr(blocks[0].ffn, "ffn_mult")  # vLLM asks whether it is there
    config = json.loads((ragged.folder / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    names = set(load_file(ragged.folder / "model.safetensors"))
    assert "model.layers.1.post_attention_layernorm.weight" not in names
    assert "model.layers.2.input_layernorm.weight" not in names


@pytest.mark.usefixtures("in_process")
def test_of_equal_blocks_it_is_an_ordinary_llama(tmp_path: Path) -> None:
    sub = cut("llama", "causal-lm", ALIKE)
    made = export_nemotron_nas(sub, tmp_path / "out", tokenizer=TOKENIZER)
    read = config_of(made.folder)
    config = LlamaConfig.from_dict(
        {**read.to_dict(), "model_type": "llama", "num_key_value_heads": 1, "intermediate_size": 24}
    )
    stock = LlamaForCausalLM(config).eval()
    stock.load_state_dict(load_file(made.folder / "model.safetensors"))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, sub.model(ids).logits)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("family", "sizes", "changes"),
    [
        ("qwen2", ((2, 24), (4, 40)), {"tie_word_embeddings": True}),
        ("llama", ((2, 24), (3, 40)), {"num_key_value_heads": 1, "attention_bias": True}),
        ("llama", ((3, 24), (4, 40), (2, 0)), {"num_key_value_heads": 4, "mlp_bias": True}),
        ("mistral", ((0, 24), (4, 40)), {"sliding_window": None, "head_dim": 16}),
    ],
)
def test_biases_groups_and_a_first_block_without_attention(
    family: str, sizes: Sizes, changes: Any, tmp_path: Path
) -> None:
    assert export(family, sizes, tmp_path / "out", **changes).largest_difference < 1e-5


@pytest.mark.usefixtures("in_process")
def test_widths_as_multiples_are_padded_to_256(tmp_path: Path) -> None:
    made = export(
        "llama", ((2, 24), (4, 300)), tmp_path / "out", ffn_mult=True, intermediate_size=300
    )
    assert made.largest_difference < 1e-4
    for block, width in zip(config_of(made.folder).block_configs, (256, 512), strict=True):
        assert not hasattr(block.ffn, "intermediate_size")
        raw = int(2 * block.ffn.ffn_mult * 32 / 3)  # as vLLM computes it
        assert (raw if raw % 256 == 0 else raw + 256 - raw % 256) == width


@pytest.mark.usefixtures("in_process")
def test_a_saved_folder_is_exported(tmp_path: Path) -> None:
    sub = cut("llama", "causal-lm", ((2, 24), (4, 0)))
    save_subnetwork(sub, TOKENIZER, tmp_path / "saved", format="hf-hetero")
    assert export_nemotron_nas(tmp_path / "saved", tmp_path / "out").largest_difference < 1e-5


@pytest.mark.usefixtures("in_process")
def test_a_flipped_tensor_a_missing_layer_and_another_config_are_found(copied: Path) -> None:
    file = copied / "model.safetensors"
    state = load_file(file)
    name = "model.layers.3.mlp.up_proj.weight"

    save_file(state | {name: -state[name]}, file)
    with pytest.raises(ElastuneError, match="logits differ"):
        check_nemotron_nas(copied)
    save_file(state | {name: state[name] + 1e-9}, file)
    with pytest.raises(ElastuneError, match="changed since"):
        check_nemotron_nas(copied)
    # Other faults end the fresh process.
    ids = torch.arange(3, 20)[None]
    save_file(state | {name: state[name][:40].contiguous()}, file)
    with pytest.raises(SystemExit, match="the config says"):
        nemotron_nas_run.logits_of(copied, ids)
    save_file({n: w for n, w in state.items() if ".layers.3." not in n}, file)
    with pytest.raises(SystemExit, match=r"model\.layers\.3\..* is missing"):
        nemotron_nas_run.logits_of(copied, ids)
    save_file(state, file)
    config = json.loads((copied / "config.json").read_text())
    config["num_hidden_layers"], config["block_configs"] = 3, config["block_configs"][:3]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="no part of what the config says"):
        nemotron_nas_run.logits_of(copied, ids)
    file.unlink()
    with pytest.raises(BadArtifact, match=r"lacks model\.safetensors"):
        check_nemotron_nas(copied)


@pytest.mark.usefixtures("in_process")
def test_weights_in_the_wrong_places_are_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reversed_heads(model: Any, index: int, heads: int, kv_heads: int) -> Any:
        found = with_heads(model, index, heads, kv_heads)
        name = f"model.layers.{index}.self_attn.o_proj.weight"
        return replace(found, state={**found.state, name: found.state[name].flip(1)})

    with_heads = to_nemotron_nas.with_heads
    monkeypatch.setattr(to_nemotron_nas, "with_heads", reversed_heads)
    with pytest.raises(ElastuneError, match="logits differ"):
        export("llama", ((2, 24), (4, 40)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="known are llama, mistral, qwen2"):
        export("qwen3", ALIKE, tmp_path / "out")
    with pytest.raises(UnsupportedModel, match="looks back 16 tokens only"):
        export("mistral", ALIKE, tmp_path / "out", sliding_window=16)
    with pytest.raises(BadRecipe, match="no tokenizer"):
        export_nemotron_nas(cut("llama", "causal-lm", ALIKE), tmp_path / "out")
    assert not list(tmp_path.iterdir())
