"""A user's own LoRA made elastic: equal to stock PEFT at every rank, and cut without training."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_models import word_tokenizer
from tiny_models import AUTO, inputs_of, outputs_of, tiny_model
from typer.testing import CliRunner

from elastune.adapters import cut, cut_adapter, from_adapter
from elastune.adapters.energies import AdapterEnergies, ModuleEnergies
from elastune.cli import adapters as commands
from elastune.errors import BadArtifact, BadRecipe, ElastuneError, InvalidSpace, UnsupportedModel
from elastune.extract import PeftAdapter, extract
from elastune.models import save_model
from elastune.search import search
from elastune.space import SubnetConfig

# PEFT's own
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LLAMA: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 12,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "rank_pattern": {"down_proj": 12},
    "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 5},
    "task_type": "CAUSAL_LM",
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "patterns": ("llama", "causal-lm", LLAMA),
    "rslora": ("llama", "causal-lm", LLAMA | {"use_rslora": True}),
    "head": (
        "bert",
        "classifier",
        {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    ),
    "transposed": (
        "gpt2",
        "causal-lm",
        {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
    ),
}


def trained(
    folder: Path, model: Any, *, change: Callable[[Any], None] | None = None, **options: Any
) -> PeftModel:
    """Save an adapter with random weights and return the stock PEFT model that it is of."""
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    if change is not None:
        change(wrapped)
    wrapped.eval().save_pretrained(str(folder))
    return wrapped


def case(name: str, folder: Path) -> tuple[Any, PeftModel]:
    """Return a fresh base and the stock PEFT model of a case of `CASES`."""
    family, head, options = CASES[name]
    base = tiny_model(family, auto=AUTO[head])
    return base, trained(folder, copy.deepcopy(base), **options)


def llama(folder: Path, **options: Any) -> tuple[Any, PeftModel]:
    base = tiny_model("llama")
    return base, trained(folder, copy.deepcopy(base), **(LLAMA | options))


def lora_layers(model: Any) -> dict[str, Any]:
    """Return the layers of PEFT by the names their modules have in the base."""
    found = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    return {name.removeprefix("base_model.model."): layer for name, layer in found.items()}


def product(layer: Any) -> torch.Tensor:
    """Return s B A as PEFT has it, in float64."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.scaling["default"] * (b.detach().double() @ a.detach().double())


def truncated(model: Any, ranks: dict[str, int]) -> None:
    """Cut every product of a PEFT model to a rank by `torch.linalg.svd` of the whole matrix."""
    for name, layer in lora_layers(model).items():
        u, s, vt = torch.linalg.svd(product(layer), full_matrices=False)
        low = (u[:, : ranks[name]] * s[: ranks[name]]) @ vt[: ranks[name]]
        base = layer.base_layer
        with torch.no_grad():
            base.weight += low.T if hasattr(base, "nx") else low
            layer.lora_B["default"].weight.zero_()


def edit(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


# --- equal to stock PEFT --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_full_rank_computes_what_stock_peft_does(name: str, tmp_path: Path) -> None:
    base, stock = case(name, tmp_path)
    expected = outputs_of(stock, inputs_of(base))
    assert (expected - outputs_of(base, inputs_of(base))).abs().max() > 0.05
    net, _ = from_adapter(base, tmp_path)
    torch.testing.assert_close(
        outputs_of(net.eval(), inputs_of(base)), expected, rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize("name", ["patterns", "transposed"])
def test_rank_r_equals_the_naive_truncated_svd(name: str, tmp_path: Path) -> None:
    base, stock = case(name, tmp_path)
    net, energies = from_adapter(base, tmp_path, ranks=[3, 1])
    config = SubnetConfig({d.name: 1 + 2 * (i % 2) for i, d in enumerate(net.space.dims)})
    truncated(stock, {m.module: config[m.dim] for m in energies.modules})
    expected = outputs_of(stock, inputs_of(base))
    net.eval().activate(config)
    torch.testing.assert_close(outputs_of(net, inputs_of(base)), expected, rtol=1e-5, atol=2e-5)


def test_energies_are_those_of_the_whole_product(tmp_path: Path) -> None:
    base, stock = llama(tmp_path)
    _, energies = from_adapter(base, tmp_path)
    layers = lora_layers(stock)
    assert {m.module for m in energies.modules} == set(layers)
    for m in energies.modules:
        values = torch.linalg.svdvals(product(layers[m.module]))
        torch.testing.assert_close(
            torch.tensor(m.values), values[: m.rank].float(), rtol=1e-5, atol=1e-6
        )
        rank = m.rank_for(0.9)
        energy = (values**2).cumsum(0) / (values**2).sum()
        assert energy[rank - 1] >= 0.9 > energy[rank - 2]
        assert m.kept(rank) == pytest.approx(float(energy[rank - 1]))
    whole = sum(float(product(layer).square().sum()) for layer in layers.values())
    assert sum(m.energy for m in energies.modules) == pytest.approx(whole)


def test_an_extracted_adapter_loads_in_stock_peft_with_its_rank_pattern(tmp_path: Path) -> None:
    base, _ = llama(tmp_path / "a")
    net, _ = from_adapter(base, tmp_path / "a", shares=(0.9, 0.5))
    config = net.space.decode([i % 3 for i in range(len(net.space))])
    net.eval().activate(config)
    expected = outputs_of(net, inputs_of(base))
    extract(net, config).save(tmp_path / "b")
    said = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert len(set(config.values())) > 1
    assert said["rank_pattern"]
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "b")).eval()
    torch.testing.assert_close(outputs_of(loaded, inputs_of(base)), expected, rtol=1e-5, atol=2e-5)


def test_a_trained_head_is_taken_over_and_extracted(tmp_path: Path) -> None:
    base, _ = case("head", tmp_path / "a")
    net, _ = from_adapter(base, tmp_path / "a", ranks=[2])
    assert net.trained == ("classifier",)
    small = net.space.smallest()
    net.eval().activate(small)
    extract(net, small).save(tmp_path / "b")
    fresh = tiny_model("bert", auto=AUTO["classifier"], seed=5)
    fresh.load_state_dict(
        {n: t for n, t in base.state_dict().items() if "lora" not in n and ".base." not in n},
        strict=False,
    )
    for name, adapter in net.adapters.items():
        fresh.get_submodule(name).load_state_dict(adapter.base.state_dict())
    torch.nn.init.zeros_(fresh.classifier.weight)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "b")).eval()
    torch.testing.assert_close(
        outputs_of(loaded, inputs_of(base)), outputs_of(net, inputs_of(base)), rtol=1e-5, atol=1e-5
    )


def test_ranks_that_add_nothing_are_gone_and_the_rest_is_the_same(tmp_path: Path) -> None:
    def thin(model: Any) -> None:
        layers = lora_layers(model)
        with torch.no_grad():
            layers["model.layers.0.self_attn.q_proj"].lora_B["default"].weight.zero_()
            b = layers["model.layers.1.self_attn.q_proj"].lora_B["default"].weight
            b[:, 3:] = b[:, :1]  # of rank 3

    base = tiny_model("llama")
    stock = trained(tmp_path, copy.deepcopy(base), change=thin, **LLAMA)
    net, energies = from_adapter(base, tmp_path)
    assert energies.empty == ("model.layers.0.self_attn.q_proj",)
    assert energies.largest()["layers.1.q"] == 3
    torch.testing.assert_close(
        outputs_of(net.eval(), inputs_of(base)),
        outputs_of(stock, inputs_of(base)),
        rtol=1e-5,
        atol=2e-5,
    )


# --- ordered by outputs ---------------------------------------------------------------------------


def test_by_outputs_the_first_ranks_have_the_least_error_on_the_inputs(tmp_path: Path) -> None:
    base, stock = llama(tmp_path)
    rows = torch.randint(3, 64, (12, 24), generator=torch.Generator().manual_seed(0))
    seen: dict[str, list[torch.Tensor]] = {}
    layers = lora_layers(stock)
    for name, layer in layers.items():
        hook = lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach())  # noqa: E731
        layer.register_forward_pre_hook(hook)
    outputs_of(stock, {"input_ids": rows})
    plain, _ = from_adapter(tiny_model("llama"), tmp_path, ranks=[2])
    net, energies = from_adapter(base, tmp_path, ranks=[2], calibration=rows)
    for m in energies.modules:
        x = torch.cat(seen[m.module]).flatten(0, 1).double()
        wanted = x @ product(layers[m.module]).T
        # The best of rank 2 for these outputs, whatever it is made of: their own truncated SVD.
        values = torch.linalg.svdvals(wanted)
        least = float(values[2:].square().sum())
        errors = []
        for other in (net, plain):
            a, b = other.adapters[m.module].lora_A[:2], other.adapters[m.module].lora_B[:, :2]
            found = other.adapters[m.module].scale_at(2) * (x @ a.double().T @ b.double().T)
            errors.append(float((found - wanted).detach().square().sum()))
        assert errors[0] == pytest.approx(least, rel=1e-3)
        assert errors[0] <= errors[1]
        assert m.energy == pytest.approx(float(wanted.square().sum(1).mean()), rel=1e-3)
    torch.testing.assert_close(
        outputs_of(net.eval(), inputs_of(base)),
        outputs_of(stock, inputs_of(base)),
        rtol=1e-5,
        atol=2e-5,
    )


# --- the space ------------------------------------------------------------------------------------


def test_choices_are_shares_of_energy_or_given_and_begin_with_the_full_rank(tmp_path: Path) -> None:
    base, _ = llama(tmp_path)
    net, energies = from_adapter(base, tmp_path, shares=(0.9, 0.5))
    for dim, m in zip(net.space.dims, energies.modules, strict=True):
        assert dim.modules == (m.module,)
        assert dim.choices == tuple(sorted({m.rank, m.rank_for(0.9), m.rank_for(0.5)})[::-1])
    net.unwrap()
    net, _ = from_adapter(base, tmp_path, ranks={"*": [16, 4], "*.down": [6, 0]})
    choices = {dim.name: dim.choices for dim in net.space.dims}
    assert choices["layers.0.q"] == (8, 4)
    assert choices["layers.1.down"] == (12, 6, 0)
    net.unwrap()
    for wrong in ({"*.up": [4]}, [-1]):
        with pytest.raises(InvalidSpace):
            from_adapter(base, tmp_path, ranks=wrong)  # type: ignore[arg-type]
    with pytest.raises(BadRecipe, match="90"):
        from_adapter(base, tmp_path, shares=[90])


def test_the_super_network_is_searched_like_any_other(tmp_path: Path) -> None:
    base, stock = llama(tmp_path)
    net, energies = from_adapter(base, tmp_path, shares=(0.5,))
    expected = outputs_of(stock, inputs_of(base))
    net.eval()

    def score(config: SubnetConfig) -> dict[str, float]:
        with net.active(config):
            error = float((outputs_of(net, inputs_of(base)) - expected).square().mean())
        return {"loss": error, "params": energies.n_params(config)}

    found = search(net.space, score, values=("loss", "params"), algorithm="nsga2", trials=12)
    best = found.best({"params": 0.7 * energies.n_stored})
    assert energies.n_params(best.config) <= 0.7 * energies.n_stored
    assert (
        0
        < best.values["loss"]
        == min(
            t.values["loss"] for t in found.trials if t.values["params"] <= 0.7 * energies.n_stored
        )
    )


def test_ranks_within_a_budget_are_the_largest_values_of_all() -> None:
    values = {"a": (9.0, 4.0, 1.0), "b": (8.0, 7.0, 0.5), "c": (0.9,)}
    alike = [ModuleEnergies(n, n, 3, v, 10) for n, v in values.items()]
    assert AdapterEnergies(tuple(alike)).within(45) == {"a": 2, "b": 2, "c": 0}
    # A rank that costs more must carry more.
    wide = [
        ModuleEnergies("a", "a", 3, (4.0, 3.0), 40),
        ModuleEnergies("b", "b", 3, (3.0, 2.5), 10),
    ]
    found = AdapterEnergies(tuple(wide))
    assert found.within(20) == {"a": 0, "b": 2}
    assert found.within(60) == {"a": 1, "b": 2}
    assert found.n_params(found.within(99)) <= 99
    with pytest.raises(BadRecipe, match="10"):
        found.within(9)


# --- cut in one call ------------------------------------------------------------------------------


def test_a_cut_adapter_keeps_its_target_and_is_what_stock_peft_computes(tmp_path: Path) -> None:
    base, _ = llama(tmp_path / "a")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    found = cut_adapter(tmp_path / "a", tmp_path / "b", model=base, target="params<=50%")
    assert found.n_params <= 0.5 * found.n_before
    assert 0.5 < found.kept < 1
    assert found.largest_difference < 1e-4
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].equal(before[name]) for name in before)
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == found.n_params
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == found.n_before
    page = (tmp_path / "b" / "README.md").read_text()
    assert f"{found.n_params:,} of {found.n_before:,} weights" in page


def test_the_base_is_loaded_by_the_name_in_the_config_with_its_head(tmp_path: Path) -> None:
    base, stock = case("head", tmp_path / "a")
    save_model(base, word_tokenizer(), tmp_path / "base")
    edit(tmp_path / "a", base_model_name_or_path=str(tmp_path / "base"))
    found = cut_adapter(tmp_path / "a", tmp_path / "b", energy=1.0)
    assert found.kept == pytest.approx(1)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "b")).eval()
    torch.testing.assert_close(
        outputs_of(loaded, inputs_of(base)),
        outputs_of(stock, inputs_of(base)),
        rtol=1e-5,
        atol=1e-5,
    )
    assert cut_adapter(tmp_path / "a", tmp_path / "c", rank=1).config.short() == "1x4"
    with pytest.raises(BadRecipe, match="one of them"):
        cut_adapter(tmp_path / "a", tmp_path / "d", rank=1, energy=0.5)
    with pytest.raises(BadRecipe, match="params"):
        cut_adapter(tmp_path / "a", tmp_path / "d", target="macs<=50%")


def test_the_command_tells_ranks_as_json_and_bad_input_in_one_message(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(commands.adapter)
    app.command()(commands.push)
    base, _ = llama(tmp_path / "a")
    save_model(base, word_tokenizer(), tmp_path / "base")
    (tmp_path / "texts.txt").write_text("a b c d e f g h\n\ni j k l\n" * 20)
    given = ["adapter", str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--rank", "4"]
    given += ["--model", str(tmp_path / "base"), "--calibration", str(tmp_path / "texts.txt")]
    done = CliRunner().invoke(app, [*given, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert set(told["ranks"].values()) == {4}
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert told["params"] == sum(t.numel() for t in tensors.values()) < told["params_before"]
    assert CliRunner().invoke(app, given).exit_code == 0
    assert CliRunner().invoke(app, [*given, "--energy", "0.5"]).exit_code == 2
    assert CliRunner().invoke(app, ["push", str(tmp_path / "a"), "me/mine"]).exit_code == 2


def test_a_written_adapter_that_computes_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = llama(tmp_path / "a")

    class Broken(PeftAdapter):
        def save(self, folder: Path, *, base: str | None = None) -> None:
            super().save(folder, base=base)
            rewrite(folder, lambda tensors: next(iter(tensors.values())).neg_())

    monkeypatch.setattr(cut, "extract", lambda net, c: Broken(**extract(net, c).__dict__))
    with pytest.raises(ElastuneError, match="stock PEFT"):
        cut_adapter(tmp_path / "a", tmp_path / "b", model=base, rank=4)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"trainable_token_indices": [3]}, "token"),
        ({"modules_to_save": ["lm_head"], "tied": True}, "shares"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # PEFT's own about some of these
def test_what_is_more_than_a_plain_lora_is_refused(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    options = dict(options)
    base = tiny_model("llama", tie_word_embeddings=options.pop("tied", False))
    trained(tmp_path, copy.deepcopy(base), **(LLAMA | options))
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(UnsupportedModel, match=words) as caught:
        from_adapter(base, tmp_path)
    assert caught.value.try_
    assert [name for name, _ in base.named_modules()] == before


def test_other_kinds_and_settings_that_are_not_known_are_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    other = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(copy.deepcopy(base), other).save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(UnsupportedModel, match="IA3"):
        from_adapter(base, tmp_path / "ia3")
    llama(tmp_path / "a")
    edit(tmp_path / "a", some_new_trick={"strength": 2})
    with pytest.raises(UnsupportedModel, match="some_new_trick"):
        from_adapter(base, tmp_path / "a")
    edit(tmp_path / "a", some_new_trick=None, loftq_config={"loftq_bits": 4})
    with pytest.raises(UnsupportedModel, match="LoftQ"):
        from_adapter(base, tmp_path / "a")


def test_damaged_adapters_and_those_of_other_models_are_named(tmp_path: Path) -> None:
    base, _ = llama(tmp_path)
    with pytest.raises(BadArtifact, match=r"adapter_config\.json"):
        from_adapter(base, tmp_path / "nowhere")
    with pytest.raises(BadArtifact, match="48 in and 32 out"):
        from_adapter(tiny_model("llama", hidden_size=64), tmp_path)
    with pytest.raises(BadArtifact, match=r"model\.layers\.0\.mlp\.down_proj"):
        from_adapter(tiny_model("gpt2"), tmp_path)
    edit(tmp_path, r=6)
    with pytest.raises(BadArtifact, match="rank 6"):
        from_adapter(base, tmp_path)
    edit(tmp_path, r=8)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    rewrite(tmp_path, lambda tensors: dict.__delitem__(tensors, key.format("A")))
    with pytest.raises(BadArtifact, match="only one of"):
        from_adapter(base, tmp_path)
    rewrite(tmp_path, lambda tensors: dict.__delitem__(tensors, key.format("B")))
    with pytest.raises(BadArtifact, match="weights lack"):
        from_adapter(base, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[:-50])
    with pytest.raises(BadArtifact, match="damaged"):
        from_adapter(base, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(BadArtifact, match="pickled"):
        from_adapter(base, tmp_path)
