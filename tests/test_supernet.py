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
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from elastune.build_space import lora_space
from elastune.cost import CostModel
from elastune.elastic import ElasticLoRALinear
from elastune.errors import BadArtifact, InvalidSpace, InvalidSubnet
from elastune.extract import extract
from elastune.space import ElasticDim, SearchSpace, SubnetConfig
from elastune.supernet import SuperNetwork

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
import json, pathlib, sys
import peft, torch, transformers
from safetensors.torch import save_file
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
    subprocess.run([sys.executable, "-W", "error", "-c", FRESH, str(root)], check=True)
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
    assert adapter == sum(a.numel() + b.numel() for a, b, _ in extract(net, config).weights.values())


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


def test_unwrap_puts_the_very_modules_back() -> None:
    model = tiny_model("llama")
    before = {name: id(module) for name, module in model.named_modules()}
    net = tiny_net(model)
    assert any(isinstance(module, ElasticLoRALinear) for module in model.modules())
    assert net.unwrap() is model
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_only_the_adapters_train() -> None:
    net = tiny_net(tiny_model("llama"))
    trainable = {name for name, p in net.model.named_parameters() if p.requires_grad}
    assert trainable == set(net.trained_state())
    assert all(name.endswith(("lora_A", "lora_B")) for name in trainable)


def test_a_dim_sets_all_modules_that_share_it_and_no_other() -> None:
    net = tiny_net(tiny_model("llama"))
    config = SubnetConfig(dict(net.space.largest()) | {"layers.1.qkv": 2})
    net.activate(config)
    ranks = {name: adapter.active_rank for name, adapter in net.adapters.items()}
    small = {f"model.layers.1.self_attn.{role}_proj" for role in "qkv"}
    assert {name for name, rank in ranks.items() if rank == 2} == small
    assert {rank for name, rank in ranks.items() if name not in small} == {8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.qkv": 5}, "rank 5 is not a choice of layers.0.qkv .* nearest is 4"),
        ({"layers.0.qvk": 4}, "unknown dim 'layers.0.qvk' .did you mean 'layers.0.qkv'"),
        (None, "missing dim 'layers.1.down'"),
    ],
)
def test_a_refused_configuration_leaves_everything_as_it_was(
    change: dict[str, int] | None, message: str
) -> None:
    net = tiny_net(tiny_model("llama"))
    net.activate(net.space.heuristic())
    ranks = [adapter.active_rank for adapter in net.adapters.values()]
    choices = dict(net.space.smallest()) | (change or {})
    if change is None:
        del choices["layers.1.down"]
    with pytest.raises(InvalidSubnet, match=message):
        net.activate(SubnetConfig(choices))
    assert net.config == net.space.heuristic()
    assert [adapter.active_rank for adapter in net.adapters.values()] == ranks


def test_active_puts_the_former_configuration_back_after_an_error_too() -> None:
    net = tiny_net(tiny_model("llama"))
    net.activate(net.space.heuristic())
    with pytest.raises(KeyError), net.active(net.space.smallest()):
        assert net.config == net.space.smallest()
        raise KeyError
    assert net.config == net.space.heuristic()
    assert {a.active_rank for a in net.adapters.values()} == {4}


def test_trained_weights_make_the_round_trip() -> None:
    first = tiny_net(tiny_model("llama"), seed=1)
    second = tiny_net(tiny_model("llama"), seed=2)
    assert not torch.equal(logits_of(first, IDS), logits_of(second, IDS))
    second.load_trained_state({n: t.clone() for n, t in first.trained_state().items()})
    assert torch.equal(logits_of(first, IDS), logits_of(second, IDS))


def test_weights_of_another_super_network_are_refused_whole() -> None:
    net = tiny_net(tiny_model("llama"))
    before = {name: tensor.clone() for name, tensor in net.trained_state().items()}
    other = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    name = "model.layers.1.mlp.down_proj.lora_A"
    other[name] = other[name][:4]
    with pytest.raises(BadArtifact, match=r"down_proj.lora_A has shape \(4, 48\), expected \(8, 48"):
        net.load_trained_state(other)
    del other[name]
    with pytest.raises(BadArtifact, match="missing model.layers.1.mlp.down_proj.lora_A"):
        net.load_trained_state(other)
    with pytest.raises(BadArtifact, match="unexpected extra"):
        net.load_trained_state(before | {"extra": torch.zeros(1)})
    assert all(torch.equal(net.trained_state()[n], tensor) for n, tensor in before.items())


def test_the_seed_alone_decides_the_first_weights() -> None:
    def weights(seed: int, disturbance: int) -> dict[str, torch.Tensor]:
        model = tiny_model("llama")
        torch.manual_seed(disturbance)
        return SuperNetwork(model, lora_space(model), seed=seed).trained_state()

    first, same, other = weights(1, 5), weights(1, 6), weights(2, 5)
    assert all(torch.equal(first[name], same[name]) for name in first)
    changed = [name for name in first if not torch.equal(first[name], other[name])]
    assert changed == [name for name in first if name.endswith("lora_A")]
    a = [first[f"model.layers.{i}.self_attn.q_proj.lora_A"] for i in range(2)]
    assert not torch.equal(a[0], a[1])


def test_one_scale_holds_for_dims_of_different_largest_rank() -> None:
    model = tiny_model("llama")
    net = SuperNetwork(model, lora_space(model, {"*": [8, 4], "*.down": [4, 2]}), alpha=16)
    for config in (net.space.largest(), net.space.smallest()):
        with net.active(config):
            scales = {adapter.extract()[2] for adapter in net.adapters.values()}
        assert scales == {16 / 8}


def test_an_adapter_of_nothing_but_rank_0_is_refused() -> None:
    net = tiny_net(tiny_model("llama"), ranks=(4, 0))
    with pytest.raises(InvalidSubnet, match="every rank of this sub-network is 0"):
        extract(net, net.space.smallest())
    assert net.config == net.space.largest()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (("model.layers.0.mlp.up",), "no module 'model.layers.0.mlp.up' .did you mean"),
        (("model.layers.0.mlp",), "model.layers.0.mlp is a LlamaMLP, not linear"),
        (("model.layers.0.mlp.up_proj",) * 2, "up_proj stands in two dims"),
    ],
)
def test_spaces_that_do_not_fit_leave_the_model_untouched(
    modules: tuple[str, ...], message: str
) -> None:
    model = tiny_model("llama")
    good = ElasticDim("good", "rank", (4, 2), ("model.layers.0.mlp.down_proj",))
    space = SearchSpace([good, ElasticDim("bad", "rank", (4, 2), modules)])
    with pytest.raises(InvalidSpace, match=message):
        SuperNetwork(model, space)
    assert type(model.get_submodule("model.layers.0.mlp.down_proj")) is nn.Linear


def test_a_dim_that_is_always_off_is_refused_before_the_model_is_touched() -> None:
    model = tiny_model("llama")
    good = ElasticDim("good", "rank", (4, 2), ("model.layers.0.mlp.down_proj",))
    off = ElasticDim("off", "rank", (0,), ("model.layers.0.mlp.up_proj",))
    with pytest.raises(InvalidSpace, match="off: "):
        SuperNetwork(model, SearchSpace([good, off]))
    assert type(model.get_submodule("model.layers.0.mlp.down_proj")) is nn.Linear
    assert any(p.requires_grad for p in model.parameters())


def test_a_model_that_is_a_super_network_already_is_refused() -> None:
    net = tiny_net(tiny_model("llama"))
    with pytest.raises(InvalidSpace, match="already"):
        SuperNetwork(net.model, net.space)
