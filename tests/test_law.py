"""The law: activated output == extracted output == output reloaded by stock PEFT elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import fill_adapters, logits_of, tiny_model, tiny_net, token_ids
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from elastune.build_space import lora_space
from elastune.cost import CostModel
from elastune.errors import InvalidSubnet
from elastune.extract import extract
from elastune.space import SearchSpace, SubnetConfig
from elastune.supernet import SuperNetwork

# PEFT still asks for a property that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = torch.tensor(token_ids(11, 11))
RANKS = {"*": [8, 4, 2, 0], "*.down": [6, 3], "layers.0.o": [8, 1, 0]}
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")

#: name -> model type, class to build and load with, changes, options of the super-network
CASES: dict[str, tuple[str, Any, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", AutoModelForCausalLM, {"num_hidden_layers": 12}, {}),
    "llama-alpha/r": ("llama", AutoModelForCausalLM, {}, {"scaling": "alpha/r"}),
    "llama-rslora": ("llama", AutoModelForCausalLM, {}, {"scaling": "rslora"}),
    "llama-base": ("llama", AutoModel, {}, {}),
    "qwen3": ("qwen3", AutoModelForCausalLM, {}, {}),
    "gemma2": ("gemma2", AutoModelForCausalLM, {"attn_implementation": "eager"}, {}),
    "gemma3": ("gemma3_text", AutoModelForCausalLM, {"sliding_window": 4}, {}),
    "bert": ("bert", AutoModel, {}, {}),
    "bert-classifier": ("bert", AutoModelForSequenceClassification, {"num_labels": 3}, {}),
    "distilbert": ("distilbert", AutoModel, {}, {}),
    "distilbert-reader": ("distilbert", AutoModelForQuestionAnswering, {}, {}),
}

FRESH = """
import json, pathlib, sys, warnings
import peft, torch, transformers
from safetensors.torch import save_file
warnings.simplefilter("error")
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")  # of PEFT's own
folder = pathlib.Path(sys.argv[1])
ids = torch.tensor(json.loads((folder / "ids.json").read_text()))
for name, auto in json.loads((folder / "cases.json").read_text()).items():
    base = getattr(transformers, auto).from_pretrained(folder / name / "base")
    model = peft.PeftModel.from_pretrained(base, folder / name / "adapter").eval()
    with torch.no_grad():
        save_file({"logits": model(input_ids=ids)[0].clone()}, folder / name / "fresh.safetensors")
assert "elastune" not in sys.modules
"""


def random_config(space: SearchSpace, seed: int = 0) -> SubnetConfig:
    """Return a mix of ranks, with at least one 0 and one other; no use of the space's own draw."""
    generator = torch.Generator().manual_seed(seed)
    picks = [int(torch.randint(len(d.choices), (1,), generator=generator)) for d in space.dims]
    picks[0], picks[1] = len(space.dims[0].choices) - 1, 0
    choices = {d.name: d.choices[i] for d, i in zip(space.dims, picks, strict=True)}
    assert 0 in choices.values()
    return SubnetConfig(choices)


def build(name: str) -> SuperNetwork:
    model_type, auto, changes, options = CASES[name]
    model = tiny_model(model_type, auto=auto, **changes)
    roles = [r for r in TARGETS if r != "gate" or model_type not in ("bert", "distilbert")]
    space = lora_space(model, RANKS, targets=roles)
    net = SuperNetwork(model, space, alpha=16, **options)
    fill_adapters(net)
    return net


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case saved as base and adapter, then read by a process that never heard of us."""
    torch.set_num_threads(1)
    root: Path = tmp_path_factory.mktemp("law")
    for name in CASES:
        net = build(name)
        extract(net, random_config(net.space)).save(root / name / "adapter")
        net.unwrap().save_pretrained(root / name / "base")
    (root / "ids.json").write_text(json.dumps(IDS.tolist()))
    (root / "cases.json").write_text(json.dumps({n: c[1].__name__ for n, c in CASES.items()}))
    command = [sys.executable, "-c", FRESH, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("name", CASES)
def test_activated_extracted_and_reloaded_outputs_are_equal(name: str, saved: Path) -> None:
    net = build(name)
    net.activate(net.space.largest())
    largest = logits_of(net, IDS)
    config = random_config(net.space)
    net.activate(config)
    activated = logits_of(net, IDS)
    assert (activated - largest).abs().max() > 1e-3

    base = CASES[name][1].from_pretrained(saved / name / "base")
    model: Any = PeftModel.from_pretrained(base, saved / name / "adapter").eval()
    torch.testing.assert_close(logits_of(model, IDS), activated, atol=1e-5, rtol=0)
    fresh = load_file(saved / name / "fresh.safetensors")["logits"]
    torch.testing.assert_close(fresh, activated, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_counted_parameters_are_those_of_the_peft_model(name: str, saved: Path) -> None:
    net = build(name)
    config = random_config(net.space)
    base = CASES[name][1].from_pretrained(saved / name / "base")
    model: Any = PeftModel.from_pretrained(base, saved / name / "adapter")
    # PEFT keeps a trainable copy of a task head beside the original; the model has one head.
    head = sum(p.numel() for n, p in model.named_parameters() if "modules_to_save" in n)
    cost = CostModel(net, tokens=8)(config)
    assert cost.params == sum(p.numel() for p in model.parameters()) - head
    adapter = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert adapter == sum(
        a.numel() + b.numel() for a, b, _ in extract(net, config).weights.values()
    )


def test_the_adapter_holds_no_module_of_rank_0(saved: Path) -> None:
    net = build("llama")
    config = random_config(net.space)
    state = load_file(saved / "llama" / "adapter" / "adapter_model.safetensors")
    off = [name for dim in net.space.dims if config[dim.name] == 0 for name in dim.modules]
    assert off
    assert not [key for key in state for name in off if f".{name}." in key]
    assert SubnetConfig.from_json((saved / "llama/adapter/subnet.json").read_text()) == config


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3"])
def test_generation_with_a_cache_gives_the_logits_of_generation_without(
    name: str, saved: Path
) -> None:
    net = build(name)
    net.activate(random_config(net.space))
    base = CASES[name][1].from_pretrained(saved / name / "base")
    plain: Any = PeftModel.from_pretrained(base, saved / name / "adapter").eval()
    found = []
    for model, cached in ((net.model, True), (net.model, False), (plain, True)):
        out = model.generate(  # type: ignore[operator]
            input_ids=IDS[:1],
            attention_mask=torch.ones_like(IDS[:1]),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            use_cache=cached,
            output_logits=True,
            return_dict_in_generate=True,
        )
        found.append(torch.stack(out.logits))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[2], found[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_new_super_network_and_every_sub_network_of_it_is_the_base(name: str) -> None:
    model_type, auto, changes, options = CASES[name]
    model = tiny_model(model_type, auto=auto, **changes)
    before = logits_of(model, IDS)
    net = SuperNetwork(model, lora_space(model, [8, 4, 0], targets=["q", "down"]), **options)
    assert net.config == net.space.largest()
    assert torch.equal(logits_of(net, IDS), before)
    net.activate(net.space.smallest())
    assert torch.equal(logits_of(net, IDS), before)


def test_an_adapter_of_nothing_but_rank_0_is_refused() -> None:
    net = tiny_net(tiny_model("llama"), ranks=(4, 0))
    with pytest.raises(InvalidSubnet, match="every rank of this sub-network is 0"):
        extract(net, net.space.smallest())
    assert net.config == net.space.largest()


def test_equal_adapters_are_equal_files(tmp_path: Path) -> None:
    net = tiny_net(tiny_model("llama"))
    extract(net, net.space.largest()).save(tmp_path / "adapter", base="base")
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["target_modules"] == sorted(net.adapters)
