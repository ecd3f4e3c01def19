"""Loading and saving models: what is kept, and what a user is told when it cannot be done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from elastune.errors import BadArtifact, BadRecipe, UnsupportedModel
from elastune.files import whole_folder
from elastune.models import load_model, save_model

WORDS = ["<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "mat", "a", "dog"]
SMALL: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = special or {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def load(folder: Path, **options: Any) -> Any:
    """Return the model alone, typed loosely, since its class depends on the folder."""
    return load_model(folder, **options)[0]


def small_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SMALL | {"num_key_value_heads": 1} | changes)))


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    save_model(small_llama(), word_tokenizer(), tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_model(BertModel(BertConfig(**SMALL)), word_tokenizer(), tmp_path / "bert")
    return tmp_path / "bert"


# --- loading ------------------------------------------------------------------------------------


def test_a_decoder_folder_loads_with_a_language_model_head_in_eval_mode(llama_folder: Path) -> None:
    model, tokenizer = load_model(llama_folder)
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer("the cat").input_ids == [3, 4]


def test_an_encoder_folder_loads_without_a_head(bert_folder: Path) -> None:
    assert isinstance(load_model(str(bert_folder))[0], BertModel)


def test_dtype_is_the_one_asked_for(llama_folder: Path) -> None:
    assert load_model(llama_folder, dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_missing_pad_token_becomes_eos_in_tokenizer_and_model(llama_folder: Path) -> None:
    model, tokenizer = load_model(llama_folder)
    assert tokenizer.pad_token == "</s>"
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 2


def test_a_tokenizer_without_eos_pads_with_unk(tmp_path: Path) -> None:
    save_model(small_llama(), word_tokenizer(unk_token="<unk>"), tmp_path / "m")
    assert load_model(tmp_path / "m")[1].pad_token == "<unk>"


def test_a_new_classification_head_is_no_error_and_has_the_labels_asked_for(
    bert_folder: Path,
) -> None:
    model = load(bert_folder, head="sequence-classification", num_labels=3)
    assert model.config.num_labels == 3
    assert model.classifier.out_features == 3


def test_a_head_with_another_number_of_labels_is_replaced(bert_folder: Path) -> None:
    model = load(bert_folder, head="sequence-classification", num_labels=3)
    save_model(model, word_tokenizer(), bert_folder)
    kept = load(bert_folder, head="sequence-classification")
    assert torch.equal(kept.classifier.weight, model.classifier.weight)
    other = load(bert_folder, head="sequence-classification", num_labels=5)
    assert other.classifier.out_features == 5
    assert torch.equal(other.bert.pooler.dense.weight, model.bert.pooler.dense.weight)


def test_a_question_answering_head_is_no_error(bert_folder: Path) -> None:
    model = load(bert_folder, head="question-answering")
    assert model.qa_outputs.out_features == 2


def test_a_masked_language_model_without_pooler_loads_as_base(tmp_path: Path) -> None:
    save_model(BertForMaskedLM(BertConfig(**SMALL)), word_tokenizer(), tmp_path / "mlm")
    assert isinstance(load_model(tmp_path / "mlm")[0], BertModel)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float23"}, "did you mean 'float32'.*allowed: float32, bfloat16, float16"),
        ({"head": "casual-lm"}, "did you mean 'causal-lm'"),
        ({"device": "no-such-device"}, "no-such-device"),
        ({"num_labels": 2}, "only a sequence-classification head"),
        ({"num_labels": 0, "head": "sequence-classification"}, "at least 1"),
    ],
)
def test_an_option_that_is_not_allowed_is_refused_before_loading(options: dict, said: str) -> None:
    with pytest.raises(BadRecipe, match=said):
        load_model("/nowhere/at/all", **options)


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "~/nowhere", "x.gguf", "a/b/c"])
def test_a_missing_path_is_named_along_with_the_built_in_models(name: str) -> None:
    with pytest.raises(BadArtifact) as caught:
        load_model(name)
    text = str(caught.value)
    assert repr(name) in text
    assert "looked for" in text
    assert "smollm2-135m, minilm-l6" in text


def test_a_path_object_is_never_taken_for_a_name(tmp_path: Path) -> None:
    with pytest.raises(BadArtifact, match="no such file or folder"):
        load_model(Path("smollm2-135m"))


def test_a_hub_id_out_of_reach_says_so_and_suggests_a_built_in_name() -> None:
    with pytest.raises(BadArtifact) as caught:
        load_model("smolm2-135m")
    text = str(caught.value)
    assert "did you mean 'smollm2-135m'" in text
    assert "network" in text


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArtifact, match=r"no config\.json"):
        load_model(tmp_path)


def test_an_adapter_folder_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BadArtifact, match="PEFT adapter"):
        load_model(tmp_path)


def test_pickled_weights_are_refused(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").rename(llama_folder / "pytorch_model.bin")
    with pytest.raises(BadArtifact, match="pickled"):
        load_model(llama_folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_weight_file_is_named(llama_folder: Path, keep: int) -> None:
    file = llama_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BadArtifact, match=r"model\.safetensors' is truncated or corrupt"):
        load_model(llama_folder)


def test_a_missing_shard_is_named(llama_folder: Path) -> None:
    shard = "model-00001-of-00002.safetensors"
    (llama_folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": shard}}
    (llama_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadArtifact, match=shard):
        load_model(llama_folder)


def test_a_checkpoint_that_lacks_tensors_is_refused_by_their_names(llama_folder: Path) -> None:
    file = llama_folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BadArtifact, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj\.weight"):
        load_model(llama_folder)


def test_weights_of_another_shape_than_the_config_are_refused(llama_folder: Path) -> None:
    file = llama_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 25}))
    with pytest.raises(BadArtifact, match="another shape"):
        load_model(llama_folder)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_damaged_config_is_named(llama_folder: Path, text: str) -> None:
    (llama_folder / "config.json").write_text(text)
    with pytest.raises(BadArtifact, match=r"config\.json"):
        load_model(llama_folder)


@pytest.mark.parametrize("model_type", ["no_such_type", "t5"])
def test_a_model_type_without_a_record_is_refused(llama_folder: Path, model_type: str) -> None:
    (llama_folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UnsupportedModel, match=model_type):
        load_model(llama_folder)


def test_a_folder_without_tokenizer_is_refused(llama_folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama_folder / name).unlink()
    with pytest.raises(BadArtifact, match="tokenizer"):
        load_model(llama_folder)


def test_code_that_comes_with_a_checkpoint_is_not_run(llama_folder: Path) -> None:
    file = llama_folder / "config.json"
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}}
    file.write_text(json.dumps(config))
    (llama_folder / "mine.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(UnsupportedModel, match="trust_remote_code"):
        load_model(llama_folder)


# --- saving -------------------------------------------------------------------------------------


def test_exact_zeros_survive_saving_and_loading(tmp_path: Path) -> None:
    model = small_llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[torch.rand_like(weight) < 0.5] = 0.0
    zeros = weight == 0
    save_model(model, word_tokenizer(), tmp_path / "m")
    loaded = load(tmp_path / "m").model.layers[0].mlp.up_proj.weight
    assert torch.equal(loaded == 0, zeros)
    assert torch.equal(loaded, weight)


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 12345.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("rope", ROPES)
def test_rope_settings_are_written_for_old_and_new_readers(tmp_path: Path, rope: str) -> None:
    model = small_llama(rope_parameters=ROPES[rope]).eval()
    save_model(model, word_tokenizer(), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["rope_theta"] == ROPES[rope]["rope_theta"]
    assert config["rope_parameters"] == ROPES[rope]
    assert ("rope_scaling" in config) == (rope != "default")
    _assert_same_logits(model, load_model(tmp_path / "m")[0])


def test_the_two_rope_settings_of_gemma3_are_written_for_old_and_new_readers(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SMALL, num_key_value_heads=1, head_dim=8, pad_token_id=0)
    model = Gemma3ForCausalLM(config).eval()
    save_model(model, word_tokenizer(), tmp_path / "m")
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (1e6, 1e4)
    _assert_same_logits(model, load_model(tmp_path / "m")[0])


def _assert_same_logits(one: PreTrainedModel, two: PreTrainedModel) -> None:
    ids = torch.arange(3, 10).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(one(ids).logits, two(ids).logits)


def test_saving_over_a_folder_replaces_all_of_it(llama_folder: Path) -> None:
    (llama_folder / "stale.txt").write_text("old")
    save_model(small_llama(), word_tokenizer(), llama_folder)
    assert not (llama_folder / "stale.txt").exists()
    assert sorted(p.name for p in llama_folder.parent.iterdir()) == ["llama"]


def test_a_model_can_be_saved_over_the_folder_it_was_loaded_from(llama_folder: Path) -> None:
    model, tokenizer = load_model(llama_folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_model(model, tokenizer, llama_folder)
    after = load_model(llama_folder)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_failed_save_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "old").write_text("old")

    def fail_halfway() -> None:
        with whole_folder(tmp_path / "m") as temporary:
            (temporary / "new").write_text("new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_halfway()
    assert [p.name for p in tmp_path.rglob("*")] == ["m", "old"]


def test_a_killed_save_leaves_the_old_folder(llama_folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in llama_folder.iterdir()}
    program = (
        "import os, sys\n"
        "from elastune.files import whole_folder\n"
        "with whole_folder(sys.argv[1]) as new:\n"
        "    (new / 'config.json').write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(llama_folder)], check=False)
    assert done.returncode == -9
    assert {p.name: p.read_bytes() for p in llama_folder.iterdir()} == before
