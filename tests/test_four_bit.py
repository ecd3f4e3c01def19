"""Elastic adapters on a base that bitsandbytes packs in 4 bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import tiny_tokenizer
from tiny_models import encoded, logits_of, tiny_net, tiny_variant, token_ids
from tiny_run import cli, save_recipe, save_sums, tiny_recipe

import elastune as et
from elastune.config import TrainConfig, load_recipe
from elastune.cost import model_cost
from elastune.errors import BadRecipe, InvalidSpace
from elastune.models import load_model, save_model
from elastune.models.four_bit import unpacked
from elastune.sparsify import Sparsity, sparsify_, sparsity_report

pytest.importorskip("bitsandbytes")
# From transformers itself, of its own names.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")

IDS = torch.tensor(token_ids(9, 9))
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}

#: A fresh process without elastune: what peft computes on the base that the adapter names.
STOCK = """
import sys
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
for module in model.modules():  # where the CPU has AVX512-BF16: no rounding of scales
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.tensor(eval(sys.argv[2]))).logits}, sys.argv[3])
assert "elastune" not in sys.modules
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A packed checkpoint of a half sparse model, and the model itself in float32."""
    model = tiny_variant("llama", "causal-lm", **SIZES)
    sparsify_(model, "magnitude", Sparsity.parse(0.5))
    save_model(model, tiny_tokenizer(), tmp_path / "float")
    packed, tokenizer = load_model(tmp_path / "float", load_in_4bit=True)
    save_model(packed, tokenizer, tmp_path / "packed")
    return tmp_path


def packed_layers(model: Any) -> dict[str, Any]:
    from bitsandbytes.nn import Linear4bit

    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}


def test_layers_of_blocks_are_packed_and_zeros_stay_zero(folder: Path) -> None:
    model, _ = load_model(folder / "float")
    packed, _ = load_model(folder / "packed")
    layers = packed_layers(packed)
    assert len(layers) == 2 * 7  # not the head
    for name, layer in layers.items():
        weight = model.get_submodule(name).weight
        numbers = unpacked(layer.weight)
        assert layer.weight.numel() * 2 == weight.numel()
        assert (numbers[weight == 0] == 0).all()
        error = (numbers - weight).norm() / weight.norm()
        assert 0.01 < error < 0.15
    expected = logits_of(model, IDS)
    for name, layer in layers.items():
        model.get_submodule(name).weight.data = unpacked(layer.weight)
    assert not torch.allclose(logits_of(model, IDS), expected)
    torch.testing.assert_close(logits_of(packed, IDS), logits_of(model, IDS))
    # What is counted are numbers, not bytes.
    half = Sparsity.parse(0.5)
    assert sparsity_report(packed, method="x", sparsity=half) == sparsity_report(
        model, method="x", sparsity=half
    )
    assert model_cost(packed, tokens=8) == model_cost(model, tokens=8)


def test_packed_active_extracted_and_reloaded_by_stock_peft_are_the_same(folder: Path) -> None:
    packed, _ = load_model(folder / "packed")
    net = tiny_net(packed)
    config = net.space.heuristic()
    net.activate(config)
    adapter, out = folder / "adapter", folder / "logits"
    et.extract(net, config).save(adapter, base=str(folder / "packed"))
    arguments = [str(adapter), str(IDS.tolist()), str(out)]
    subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, capture_output=True)
    assert torch.equal(load_file(out)["logits"], logits_of(net.model, IDS))


def trained(folder: Path, name: str, **settings: Any) -> dict[str, torch.Tensor]:
    packed, _ = load_model(folder / "packed")
    net = tiny_net(packed)
    before = logits_of(net.model, IDS)
    cfg = TrainConfig(max_steps=3, batch_size=4, learning_rate=1e-2, seed=0, **settings)
    sampler = et.RandomSampler(net.space, seed=0)
    et.train(net, encoded(9, 7, 8, 9, 5, 9, 7, 6), sampler, cfg, folder=folder / name)
    assert not torch.allclose(logits_of(net.model, IDS), before)
    return {key: value.clone() for key, value in net.trained_state().items()}


def test_gradient_checkpointing_trains_the_same_adapters(folder: Path) -> None:
    plain = trained(folder, "plain")
    checkpointed = trained(folder, "checkpointed", gradient_checkpointing=True)
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=0, atol=0)


def test_gradients_are_those_of_the_numbers_that_the_bits_stand_for(folder: Path) -> None:
    packed, _ = load_model(folder / "packed")
    model, _ = load_model(folder / "float")
    for name, layer in packed_layers(packed).items():
        model.get_submodule(name).weight.data = unpacked(layer.weight)
    nets = [tiny_net(packed), tiny_net(model)]
    for net in nets:
        net(input_ids=IDS, labels=IDS).loss.backward()
    for name, adapter in nets[0].adapters.items():
        other = nets[1].adapters[name]
        torch.testing.assert_close(adapter.lora_A.grad, other.lora_A.grad)
        torch.testing.assert_close(adapter.lora_B.grad, other.lora_B.grad)


def test_evaluation_leaves_the_weights_that_train(folder: Path) -> None:
    packed, _ = load_model(folder / "packed")
    before = {name: unpacked(m.weight).clone() for name, m in packed_layers(packed).items()}
    logits_of(packed, IDS)
    for name, module in packed_layers(packed).items():
        assert torch.equal(unpacked(module.weight), before[name])


def test_elastic_structure_of_a_packed_base_is_refused(folder: Path) -> None:
    packed, _ = load_model(folder / "packed")
    space = et.structure_space(packed, ffn=[1.0, 0.5], round_to=8)
    with pytest.raises(InvalidSpace, match="is a Linear4bit, whose weight cannot be cut"):
        et.SuperNetwork(packed, space)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": "lonas", "structure": {"ffn": [1.0, 0.5]}}, "nf4 packs the base's weights"),
        ({"method": "sqft"}, "nf4 packs the base's weights"),
        ({"sparsify": {"choices": [0.0, 0.5]}}, "packed weights cannot be masked"),
        ({"train": {"update": "full"}}, "packed weights cannot train"),
    ],
)
def test_recipes_that_would_change_packed_weights_are_refused(
    sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path, tmp_path, quantise="nf4", **sections)
    with pytest.raises(BadRecipe, match=message):
        load_recipe(save_recipe(tmp_path / "recipe.yaml", recipe))


@pytest.mark.parametrize("stream", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_whole_run_on_a_packed_base(stream: bool, tmp_path: Path) -> None:
    model = tiny_variant("llama", "causal-lm", **SIZES, vocab_size=300, max_position_embeddings=256)
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    recipe = tiny_recipe(
        tmp_path / "model",
        save_sums(tmp_path / "data"),
        quantise="nf4",
        sparsify={"stream": stream},
        train={"gradient_checkpointing": True},
        baselines=["sparse", "sparse+lora"],
    )
    cli("run", save_recipe(tmp_path / "recipe.yaml", recipe), "--out", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "base" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    report = json.loads((tmp_path / "run" / "base" / "sparsity.json").read_text())
    assert 0.5 <= report["total"]["sparsity"] < 0.75  # small numbers round to zero, too
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]
    assert {"sparse", "heuristic", "sparse+lora"} <= {row["name"] for row in rows}
    adapters = list((tmp_path / "run" / "subnets").glob("*/adapter_config.json"))
    assert adapters
    base = json.loads(adapters[0].read_text())["base_model_name_or_path"]
    assert Path(base) == (tmp_path / "run" / "base").resolve()


def test_what_is_missing_or_does_not_go_together_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path / "none", save_sums(tmp_path / "data"), quantise="nf4")
    path = save_recipe(tmp_path / "recipe.yaml", recipe)
    with monkeypatch.context() as patched:
        patched.setattr("elastune.models.four_bit.importlib.util.find_spec", lambda _: None)
        said = cli("run", path, "--out", tmp_path / "run", code=2)
    assert "pip install 'elastune[4bit]'" in " ".join(said.stderr.split())
    monkeypatch.setattr("elastune.check.shards_base", lambda: True)
    said = cli("run", path, "--out", tmp_path / "run", code=2)
    assert "not cut into shards" in " ".join(said.stderr.split())
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*"))
