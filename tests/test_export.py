"""Saving sub-networks: what each format holds, what is written, what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_models import word_tokenizer
from tiny_models import VARIANTS, fill_adapters, heads_of, logits_of, tiny_model, tiny_variant
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from elastune.autoload import MODEL_TYPES
from elastune.build_space import lora_space
from elastune.build_structure import structure_space
from elastune.errors import BadRecipe, ElastuneError, InvalidSubnet, UnsupportedModel
from elastune.export import FORMATS, save_subnetwork, snap_to_uniform
from elastune.export.verify import example_inputs
from elastune.models import load_model, save_model
from elastune.models.blocks import blocks
from elastune.models.families import known_model_types
from elastune.models.registration import family_classes
from elastune.space import SubnetConfig
from elastune.subnetwork import Subnetwork, extract_model
from elastune.supernet import SuperNetwork

Sizes = Sequence[tuple[int, int] | None]
"""For each block its heads and channels; None leaves it out."""

UNEVEN: Sizes = ((2, 16), (4, 40))
HALVES: Sizes = ((0, 24), (4, 0))
ALL_HEADS: Sizes = ((4, 16), (4, 40))

#: name, head, sizes, format: loaded in a fresh process (test_export_fresh.py).
FORMAT_CASES: list[tuple[str, str, Sizes, str]] = [
    ("llama", "causal-lm", ((2, 16), None, (2, 16)), "hf"),
    ("llama", "causal-lm", UNEVEN, "hf-padded"),
    ("llama", "causal-lm", UNEVEN, "hf-hetero"),
    ("qwen3", "causal-lm", ((2, 24), (4, 0)), "hf-hetero"),
    ("gemma3_text", "classifier", UNEVEN, "hf-hetero"),
    ("phi3", "causal-lm", ((2, 16), (0, 48)), "hf-hetero"),
    ("gpt2", "causal-lm", UNEVEN, "hf-hetero"),
    ("opt", "causal-lm", UNEVEN, "hf-hetero"),
    ("falcon", "causal-lm", UNEVEN, "hf-hetero"),
    ("bloom", "causal-lm", ((0, 16), (4, 40)), "hf-hetero"),
    ("bert", "classifier", HALVES, "hf-padded"),
    ("bert", "reader", UNEVEN, "hf-hetero"),
    ("deberta-v2", "classifier", UNEVEN, "hf-hetero"),
    ("vit", "image-classifier", UNEVEN, "hf-hetero"),
]


def elastic(name: str, head: str, sizes: Sizes, **changes: Any) -> tuple[SuperNetwork, Any]:
    """Return a tiny super-network over structure, and the configuration of these sizes."""
    depth = {} if len(sizes) == 2 else {"num_hidden_layers": len(sizes)}
    model = tiny_variant(name, head, **depth, **changes)
    full = blocks(model)[0].shape
    kept = [size for size in sizes if size is not None]
    space = structure_space(
        model,
        heads=sorted({full.heads, *(heads for heads, _ in kept)}),
        ffn=[full.ffn, *(ffn for _, ffn in kept)],
        depth=[number for number, size in enumerate(sizes) if size is None] or None,
    )
    choices = {}
    for number, size in enumerate(sizes):
        heads, ffn = size or (full.heads, full.ffn)
        wanted = {"heads": heads, "ffn": ffn, "block": int(size is not None)}
        choices |= {f"layers.{number}.{kind}": choice for kind, choice in wanted.items()}
    config = SubnetConfig({dim.name: choices[dim.name] for dim in space.dims})
    return SuperNetwork(model, space), config


def cut(name: str, head: str, sizes: Sizes, **changes: Any) -> Subnetwork:
    """Return a sub-network of a tiny model."""
    net, config = elastic(name, head, sizes, **changes)
    return extract_model(net, config)


def some_heads(name: str, head: str) -> int:
    """Return 2 of 4 heads, or all where heads cannot be cut (ALiBi)."""
    return 4 if blocks(tiny_variant(name, head))[0].fixed_heads else 2


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**example_inputs(model))[0]
    return found


def rebuilt(model: Any) -> Any:
    """Return a model made from its config and its weights alone, as `from_pretrained` does."""
    made = type(model)(model.config)
    made.load_state_dict(model.state_dict())
    return made


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


NAMES = [*known_model_types(), *VARIANTS]
PAIRS = [(n, head) for n in NAMES for head in heads_of(VARIANTS.get(n, (n, {}))[0])]

# --- every family and head ----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "head"), PAIRS)
def test_blocks_of_their_own_sizes_compute_what_the_subnetwork_does(name: str, head: str) -> None:
    sub = cut(name, head, ((some_heads(name, head), 16), (0, 40)))
    made = rebuilt(FORMATS["hf-hetero"].make(sub).model)
    torch.testing.assert_close(outputs(made), outputs(sub.model), rtol=1e-6, atol=1e-6)
    n_params = sum(p.numel() for p in sub.model.parameters())
    assert sum(p.numel() for p in made.parameters()) == n_params


@pytest.mark.parametrize("name", NAMES)
def test_blocks_padded_with_zeros_compute_what_the_subnetwork_does(name: str) -> None:
    head = heads_of(VARIANTS.get(name, (name, {}))[0])[0]
    for sizes in (((some_heads(name, head), 16), (4, 40)), HALVES):
        sub = cut(name, head, sizes)
        made = rebuilt(FORMATS["hf-padded"].make(sub).model)
        torch.testing.assert_close(outputs(made), outputs(sub.model), rtol=1e-5, atol=1e-5)
        assert type(made) is type(sub.model)


@pytest.mark.parametrize("name", sorted({*known_model_types()} - {c[0] for c in FORMAT_CASES}))
def test_families_not_loaded_in_a_fresh_process_are_saved_and_loaded_here(
    name: str, tmp_path: Path
) -> None:
    head = heads_of(name)[-1]
    sub = cut(name, head, ((some_heads(name, head), 16), (4, 40)))
    saved = save_subnetwork(sub, word_tokenizer(), tmp_path / "model")
    assert saved.format == "hf-hetero"
    assert saved.largest_difference < 1e-5
    assert saved.n_params == sum(p.numel() for p in sub.model.parameters())


def test_every_family_is_announced_to_transformers() -> None:
    assert set(MODEL_TYPES) == set(known_model_types()), "add the type to elastune/autoload.py, too"


# --- formats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "olmo2", "phi3", "vit"])
def test_uniform_heads_and_widths_are_plain_checkpoints_where_the_config_says_head_sizes(
    name: str, tmp_path: Path
) -> None:
    head = heads_of(name)[-1]
    sub = cut(name, head, ((2, 16), (2, 16)))
    saved = save_subnetwork(sub, word_tokenizer(), tmp_path / "model")
    assert saved.format == "hf"
    assert saved.loads_with == "loads with plain transformers"
    config = read(tmp_path / "model" / "config.json")
    assert config["model_type"] == name
    assert (config["num_attention_heads"], config["intermediate_size"]) == (2, 16)
    assert "auto_map" not in config


def test_a_left_out_block_is_gone_from_a_plain_checkpoint(tmp_path: Path) -> None:
    sub = cut("gemma3_text", "causal-lm", ((4, 48), None, (4, 48)))
    assert save_subnetwork(sub, word_tokenizer(), tmp_path / "model").format == "hf"
    config = read(tmp_path / "model" / "config.json")
    assert config["num_hidden_layers"] == len(config["layer_types"]) == 2
    names = load_file(tmp_path / "model" / "model.safetensors")
    assert {n.split(".")[2] for n in names if ".layers." in n} == {"0", "1"}


@pytest.mark.parametrize(
    ("name", "head", "sizes", "reason"),
    [
        ("llama", "causal-lm", ((2, 16), (4, 16)), "the blocks have 2 or 4 heads"),
        ("llama", "causal-lm", ((2, 16), (2, 24)), "the blocks have 16 or 24 channels"),
        ("llama", "causal-lm", ((2, 16), (0, 16)), "block 1 has no attention"),
        ("llama", "causal-lm", ((2, 0), (2, 16)), "block 0 has no feed-forward"),
        ("bert", "base", ((2, 16), (2, 16)), "the config of bert models cannot say 2 heads"),
        ("bloom", "causal-lm", ((4, 16), (4, 16)), "cannot say 16 channels"),
    ],
)
def test_what_a_plain_checkpoint_cannot_hold_is_refused_with_the_reason(
    name: str, head: str, sizes: Sizes, reason: str, tmp_path: Path
) -> None:
    sub = cut(name, head, sizes)
    with pytest.raises(BadRecipe, match=re.escape(reason)) as caught:
        save_subnetwork(sub, word_tokenizer(), tmp_path / "model", format="hf")
    assert "hf-hetero" in str(caught.value.try_)
    assert list(tmp_path.iterdir()) == []


def test_padding_keeps_to_the_widest_block_and_is_zero_beyond_each(tmp_path: Path) -> None:
    sub = cut("llama-biases", "causal-lm", ((2, 16), (2, 40)))
    saved = save_subnetwork(sub, word_tokenizer(), tmp_path / "model", format="hf-padded")
    config = read(tmp_path / "model" / "config.json")
    assert (config["num_attention_heads"], config["intermediate_size"]) == (2, 40)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    gate = weights["model.layers.0.mlp.gate_proj.weight"]
    assert gate[:16].abs().min() > 0
    assert gate[16:].abs().max() == 0
    assert weights["model.layers.0.mlp.up_proj.bias"][16:].abs().max() == 0
    assert weights["model.layers.0.mlp.down_proj.weight"][:, 16:].abs().max() == 0
    needed = sum(p.numel() for p in sub.model.parameters())
    assert saved.n_params > needed
    assert f"{saved.n_params:,}" in saved.notes[0]
    assert f"{needed:,}" in saved.notes[0]


def test_an_absent_half_is_padded_with_zero_biases_too(tmp_path: Path) -> None:
    save_subnetwork(
        cut("gpt2", "causal-lm", HALVES), word_tokenizer(), tmp_path / "m", format="hf-padded"
    )
    weights = load_file(tmp_path / "m" / "model.safetensors")
    for name in ("h.0.attn.c_proj", "h.1.mlp.c_proj"):
        assert weights[f"transformer.{name}.weight"].abs().max() == 0
        assert weights[f"transformer.{name}.bias"].abs().max() == 0


def test_heads_are_padded_to_what_the_config_can_say(tmp_path: Path) -> None:
    sub = cut("bert", "base", UNEVEN)
    save_subnetwork(sub, word_tokenizer(), tmp_path / "model", format="hf-padded")
    config = read(tmp_path / "model" / "config.json")
    assert (config["num_attention_heads"], config["intermediate_size"]) == (4, 40)


def test_only_what_differs_is_written_for_single_layers(tmp_path: Path) -> None:
    sub = cut("llama", "causal-lm", ((4, 48), (2, 16), (0, 48)))
    save_subnetwork(sub, word_tokenizer(), tmp_path / "model")
    config = read(tmp_path / "model" / "config.json")
    assert config["per_layer_config"] == {
        "1": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16},
        "2": {"skip": ["attention"]},
    }
    assert config["model_type"] == "elastune_llama"
    assert config["auto_map"]["AutoConfig"] == "modeling_elastune_llama.ElastuneLlamaConfig"
    assert (tmp_path / "model" / "modeling_elastune_llama.py").is_file()


def test_the_modelling_file_names_elastune_nowhere_in_its_imports() -> None:
    for name in known_model_types():
        source = family_classes(name).source()
        compile(source, name, "exec")
        imports = re.findall(r"^\s*(?:from|import)\s+(\S+)", source, re.MULTILINE)
        assert {line.split(".")[0] for line in imports} <= {
            *("__future__", "collections", "copy", "dataclasses", "typing"),
            *("torch", "transformers"),
        }


# --- loading with elastune ----------------------------------------------------------------------


def test_a_folder_loads_without_remote_code_and_with_other_heads(tmp_path: Path) -> None:
    sub = cut("llama", "causal-lm", UNEVEN)
    save_subnetwork(sub, word_tokenizer(), tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert isinstance(plain, LlamaForCausalLM)
    assert torch.equal(outputs(plain), outputs(sub.model))
    model, tokenizer = load_model(tmp_path / "model")
    assert torch.equal(outputs(model), outputs(sub.model))
    assert tokenizer("the cat").input_ids == word_tokenizer()("the cat").input_ids
    classifier, _ = load_model(tmp_path / "model", head="sequence-classification", num_labels=3)
    assert outputs(classifier).shape == (1, 3)
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert found.config.model_type == "elastune_llama"


@pytest.mark.parametrize("first", ["elastune", "transformers"])
def test_import_order_does_not_matter_and_elastune_stays_light(first: str, tmp_path: Path) -> None:
    save_subnetwork(cut("llama", "causal-lm", UNEVEN), word_tokenizer(), tmp_path / "model")
    before = "import elastune, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    code = {"elastune": before, "transformers": "from transformers import AutoConfig"}[first]
    code += (
        "\nimport elastune\nfrom transformers import AutoModelForCausalLM as Auto\n"
        f"print(type(Auto.from_pretrained({str(tmp_path / 'model')!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("ElastuneLlamaForCausalLM"), done.stderr[-2000:]


def test_a_loaded_model_saved_again_still_carries_its_code(tmp_path: Path) -> None:
    sub = cut("qwen2", "causal-lm", UNEVEN)
    save_subnetwork(sub, word_tokenizer(), tmp_path / "first")
    model, tokenizer = load_model(tmp_path / "first")
    save_model(model, tokenizer, tmp_path / "second")
    assert (tmp_path / "second" / "modeling_elastune_qwen2.py").read_text() == (
        tmp_path / "first" / "modeling_elastune_qwen2.py"
    ).read_text()
    again, _ = load_model(tmp_path / "second")
    assert torch.equal(outputs(again), outputs(sub.model))


def test_the_attention_of_every_layer_follows_the_model(tmp_path: Path) -> None:
    save_subnetwork(cut("phi3", "causal-lm", UNEVEN), word_tokenizer(), tmp_path / "model")
    model, _ = load_model(tmp_path / "model")
    expected = outputs(model)
    model.set_attn_implementation("eager")
    seen = {layer.self_attn.config._attn_implementation for layer in model.model.layers}
    assert seen == {"eager"}
    torch.testing.assert_close(outputs(model), expected)


def test_a_size_that_differs_by_layer_is_never_read_from_the_whole_config(tmp_path: Path) -> None:
    save_subnetwork(cut("phi3", "causal-lm", UNEVEN), word_tokenizer(), tmp_path / "model")
    model, _ = load_model(tmp_path / "model")
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        _ = model.config.num_attention_heads
    assert [layer.num_attention_heads for layer in model.config.per_layer_config] == [2, 4]
    assert [layer.self_attn.config.num_attention_heads for layer in model.model.layers] == [2, 4]


def test_gradients_are_the_same_with_checkpointing(tmp_path: Path) -> None:
    save_subnetwork(cut("qwen3", "causal-lm", HALVES), word_tokenizer(), tmp_path / "model")
    found = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", dtype=torch.float32
        ).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        ids = torch.tensor([[5, 6, 7, 8]])
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_a_config_that_skips_what_is_unknown_is_refused() -> None:
    config = family_classes("llama").config
    with pytest.raises(ValueError, match=r"layer 1 skips \['norm'\]"):
        config(per_layer_config={"1": {"skip": ["norm"]}})


def test_a_subnetwork_of_an_uneven_model_can_be_cut_again(tmp_path: Path) -> None:
    save_subnetwork(cut("llama", "causal-lm", UNEVEN), word_tokenizer(), tmp_path / "first")
    model, tokenizer = load_model(tmp_path / "first")
    assert [tuple(block.shape) for block in blocks(model)] == [(2, 1, 16), (4, 2, 40)]
    space = structure_space(model, ffn={"layers.1.ffn": [40, 24]})
    sub = extract_model(SuperNetwork(model, space), space.smallest())
    save_subnetwork(sub, tokenizer, tmp_path / "second")
    again, _ = load_model(tmp_path / "second")
    assert [tuple(block.shape) for block in blocks(again)] == [(2, 1, 16), (4, 2, 24)]
    assert torch.equal(outputs(again), outputs(sub.model))


# --- what is written ----------------------------------------------------------------------------


def test_the_card_says_how_to_load_and_every_blocks_sizes(tmp_path: Path) -> None:
    sub = cut("llama", "causal-lm", ((2, 16), None, (0, 40)))
    save_subnetwork(sub, word_tokenizer(), tmp_path / "small", origin="example/tiny-llama")
    card = (tmp_path / "small" / "README.md").read_text()
    assert "example/tiny-llama" in card
    assert 'AutoModelForCausalLM.from_pretrained("small", trust_remote_code=True)' in card
    assert "import elastune" in card
    assert "5.15" in card
    assert "| 0 | 0 | 2 | 1 | 16 |" in card
    assert "| 1 | 2 | 0 | 0 | 40 |" in card


def test_the_card_of_a_plain_checkpoint_asks_for_no_remote_code(tmp_path: Path) -> None:
    save_subnetwork(
        cut("llama", "causal-lm", ((2, 16), (2, 16))), word_tokenizer(), tmp_path / "small"
    )
    assert "trust_remote_code" not in (tmp_path / "small" / "README.md").read_text()


def test_what_was_written_is_listed_with_its_size(tmp_path: Path) -> None:
    sub = cut("llama", "causal-lm", UNEVEN)
    saved = save_subnetwork(sub, word_tokenizer(), tmp_path / "model")
    found = {p.name: p.stat().st_size for p in (tmp_path / "model").iterdir()}
    assert set(saved.files) == set(found)
    assert saved.n_bytes == sum(found.values())
    text = (tmp_path / "model" / "subnet.json").read_text()
    assert SubnetConfig.from_json(text) == sub.config


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("format", list(FORMATS))
def test_an_unmerged_adapter_comes_as_stock_peft_beside_the_model(
    format: str, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    space = lora_space(model, [4, 2]) + structure_space(model, ffn=[48, 16], heads=[4, 2])
    net = SuperNetwork(model, space, alpha=16)
    fill_adapters(net)
    config = space.smallest() if format == "hf" else space.sample(np.random.default_rng(2))
    sub = extract_model(net, config, merge=False)
    saved = save_subnetwork(sub, word_tokenizer(), tmp_path / "m", format=format)
    assert "adapter/adapter_model.safetensors" in saved.files
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(tmp_path / "m" / "adapter")).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with net.active(config):
        torch.testing.assert_close(logits_of(tuned, ids), logits_of(net, ids), rtol=1e-5, atol=1e-5)


def test_a_bfloat16_model_stays_one(tmp_path: Path) -> None:
    sub = cut("llama", "causal-lm", UNEVEN)
    sub.model.to(torch.bfloat16)
    saved = save_subnetwork(sub, word_tokenizer(), tmp_path / "model")
    assert saved.largest_difference < 1e-5
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert sub.model.dtype == torch.bfloat16


# --- refused ------------------------------------------------------------------------------------


def test_a_misspelt_format_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="did you mean 'hf-hetero'"):
        save_subnetwork(
            cut("llama", "causal-lm", UNEVEN), word_tokenizer(), tmp_path / "m", format="hetero"
        )


def test_a_head_without_an_auto_class_is_refused(tmp_path: Path) -> None:
    from transformers import BertForMultipleChoice

    sub = cut("bert", "base", UNEVEN)
    config = tiny_variant("bert", "base").config
    other = BertForMultipleChoice(config)
    other.bert = sub.model
    changed = Subnetwork(sub.config, other, sub.shapes, sub.kept_blocks)
    with pytest.raises(UnsupportedModel, match="BertForMultipleChoice"):
        save_subnetwork(changed, word_tokenizer(), tmp_path / "m", format="hf-hetero")


def test_a_model_that_computes_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sub = cut("llama", "causal-lm", UNEVEN)
    save_subnetwork(sub, word_tokenizer(), tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    import elastune.export.saved as saved

    real = saved.write_model

    def damaging(model: Any, *others: Any) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(1.01)
        real(model, *others)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.div_(1.01)

    monkeypatch.setattr(saved, "write_model", damaging)
    with pytest.raises(ElastuneError, match="does not compute what the sub-network does"):
        save_subnetwork(sub, word_tokenizer(), tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_killed_halfway_it_leaves_no_folder(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nsys.path.insert(0, {tests!r})\n"
        "import elastune.export.saved as saved\nfrom test_export import *\n"
        "saved.verify = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        "save_subnetwork(cut('llama', 'causal-lm', UNEVEN), word_tokenizer(), {folder!r})\n"
    ).format(tests=str(Path(__file__).parent), folder=str(tmp_path / "model"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    save_subnetwork(cut("llama", "causal-lm", UNEVEN), word_tokenizer(), tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# --- snap to uniform ----------------------------------------------------------------------------


def test_snapping_takes_the_common_size_nearest_to_the_mean_of_the_blocks_left() -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    space = structure_space(model, ffn=[48, 32, 24, 16], heads=[4, 2, 0], depth=[3])
    sizes = {"layers.0.ffn": 48, "layers.1.ffn": 24, "layers.2.ffn": 24, "layers.3.ffn": 16}
    sizes |= {f"layers.{i}.heads": heads for i, heads in enumerate((2, 0, 2, 4))}
    config = SubnetConfig({d.name: {**sizes, "layers.3.block": 0}[d.name] for d in space.dims})
    snapped = snap_to_uniform(space, config, model)
    assert {snapped[f"layers.{i}.ffn"] for i in range(4)} == {32}  # the mean of 48, 24, 24
    assert {snapped[f"layers.{i}.heads"] for i in range(4)} == {2}
    assert snapped["layers.3.block"] == 0


def test_a_snapped_subnetwork_is_a_plain_checkpoint(tmp_path: Path) -> None:
    net, config = elastic("llama", "causal-lm", ((2, 16), (4, 16)))
    snapped = snap_to_uniform(net.space, config, net.model)
    saved = save_subnetwork(extract_model(net, snapped), word_tokenizer(), tmp_path / "model")
    assert saved.format == "hf"


def test_blocks_without_a_common_size_cannot_be_snapped() -> None:
    model = tiny_model("llama")
    space = structure_space(model, ffn={"layers.0.ffn": [32, 16], "layers.1.ffn": [48, 24]})
    with pytest.raises(InvalidSubnet, match="no size of ffn is a choice of every block"):
        snap_to_uniform(space, space.largest(), model)
