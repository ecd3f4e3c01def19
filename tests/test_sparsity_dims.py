"""Sparsity as a dim: the masks of `sparsify_`, and the law for sub-networks of any density."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from test_models import word_tokenizer
from test_structure_law import law_model
from tiny_models import fill_adapters, outputs_of, tiny_model, token_ids
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from elastune.build_space import lora_space
from elastune.build_sparsity import (
    load_levels,
    save_levels,
    sparsity_levels,
    sparsity_space,
)
from elastune.build_structure import structure_space
from elastune.cost import CostModel, model_cost
from elastune.elastic.mask import WeightLevels
from elastune.errors import (
    BadArtifact,
    BadData,
    BadRecipe,
    InvalidSpace,
    InvalidSubnet,
    UnsupportedModel,
)
from elastune.export import save_subnetwork
from elastune.extract import extract
from elastune.models import architecture
from elastune.models.blocks import blocks
from elastune.models.families import record_for
from elastune.reorder import reorder_
from elastune.sampling import ProgressiveSampler
from elastune.space import ElasticDim, SearchSpace, SubnetConfig
from elastune.sparsify import Sparsity, keep_mask, sparsify_
from elastune.subnetwork import extract_model
from elastune.supernet import SuperNetwork

# PEFT still asks for a property that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SPARSITIES = (0.0, 0.3, 0.5, 0.6)
TARGETS = ("q", "k", "v", "o", "up", "gate", "down")
#: Plain projections, turned weights, fused qkv stacked and by group, fused gate and up, encoders.
FAMILIES = ("llama", "gpt2", "phi3", "gpt_neox", "falcon", "bert", "distilbert", "qwen3")
IDS = {"input_ids": torch.tensor(token_ids(11, 11))}


def sparse_net(model: Any, space: SearchSpace | None = None, **options: Any) -> SuperNetwork:
    """Make sparsity elastic, and whatever else ``space`` says."""
    sparse = sparsity_space(model, SPARSITIES)
    levels = sparsity_levels(model, sparse, "magnitude")
    whole = sparse if space is None else space + sparse
    net = SuperNetwork(model, whole, alpha=16, levels=levels, **options).eval()
    fill_adapters(net)
    return net


def whole_net(family: str, **options: Any) -> SuperNetwork:
    """Make all of three blocks elastic: ranks, heads, widths, depth and sparsity."""
    head = "causal-lm" if record_for(family).kind == "decoder" else "base"
    model = law_model(family, head)
    space = lora_space(model, [4, 2, 0], targets=TARGETS) + structure_space(
        model, heads=[4, 2, 0], ffn=[1.0, 0.5, 0.25, 0], depth="all", round_to=4
    )
    return sparse_net(model, space, **options)


def configs_of(space: SearchSpace) -> list[SubnetConfig]:
    """Return densities alone, densities and ranks, and random ones; the last block stays."""
    rng = np.random.default_rng(0)
    found = []
    for kinds in (("density",), ("density", "rank"), None, None):
        config = dict(space.largest())
        for dim in space.dims:
            is_free = kinds is None or dim.kind in kinds
            if is_free and not (dim.kind == "depth" and dim.name.startswith("layers.2.")):
                config[dim.name] = int(rng.choice(dim.choices))
        found.append(SubnetConfig(config))
    return found


def at(space: SearchSpace, density: int) -> SubnetConfig:
    """Return the largest sub-network at one density."""
    return SubnetConfig(
        {d.name: density if d.kind == "density" else d.choices[0] for d in space.dims}
    )


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [n for n in expected if not torch.equal(found[n], expected[n])] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_that_run_are_those_that_sparsify_leaves(family: str) -> None:
    model = tiny_model(family)
    plain = copy.deepcopy(model)
    net = sparse_net(model)
    for sparsity in SPARSITIES:
        expected = copy.deepcopy(plain)
        sparsify_(expected, "magnitude", Sparsity(sparsity))
        config = at(net.space, round(100 - 100 * sparsity))
        found = extract_model(net, config).model
        assert_same(weights_of(found), weights_of(expected))
        zeros = torch.cat([p[p == 0].flatten() for p in found.parameters()])
        assert not zeros.signbit().any(), "-0 is another bit pattern than sparsify_ writes"


def test_wanda_orders_by_what_flows_into_the_dense_model() -> None:
    model = tiny_model("llama")
    rows = torch.tensor(token_ids(16, 16, 16))
    space = sparsity_space(model, SPARSITIES)
    squares: dict[str, Tensor] = {}
    hooks = []
    for name in architecture(model).linear_names(model):

        def note(_: Any, args: Any, name: str = name) -> None:
            squares[name] = squares.get(name, 0) + args[0].flatten(0, 1).square().sum(0)

        hooks.append(model.get_submodule(name).register_forward_pre_hook(note))
    with torch.no_grad():
        model(input_ids=rows)
    for hook in hooks:
        hook.remove()
    found = sparsity_levels(model, space, "wanda", rows)
    scores = {
        f"{name}.weight": model.get_submodule(name).weight.detach().abs() * total.sqrt()
        for name, total in squares.items()
    }
    given = sparsity_levels(model, space, scores)
    assert found.levels.keys() == scores.keys() == given.levels.keys()
    for name, levels in found.levels.items():
        for level, sparsity in enumerate(SPARSITIES[1:], start=1):
            kept = keep_mask(scores[name], Sparsity(sparsity))
            assert torch.equal(given.levels[name] >= level, kept)
            # Sums in another order may turn two scores that are all but equal.
            assert ((levels >= level) != kept).float().mean() < 2e-3
    first = copy.deepcopy(model)
    masks = sparsify_(first, "wanda", Sparsity(0.5), rows)
    for name in masks:
        if ".layers.0." in name:  # behind it sparsify_ sees blocks that are sparse already
            assert torch.equal(found.levels[name] >= 2, masks[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_activated_extracted_and_peft_compute_the_same_and_cost_what_is_counted(
    family: str,
) -> None:
    net = whole_net(family)
    merged, beside = CostModel(net, 10, merged=True), CostModel(net, 10)
    whole = outputs_of(net, IDS)
    for config in configs_of(net.space):
        net.activate(config)
        activated = outputs_of(net, IDS)
        assert (activated - whole).abs().max() > 1e-3
        alone = extract_model(net, config)
        assert torch.allclose(outputs_of(alone.model, IDS), activated, atol=1e-5)
        assert merged(config) == model_cost(alone.model, 10)
        sub = extract_model(net, config, merge=False)
        counted = model_cost(sub.model, 10)
        weights = sub.adapter.weights.values() if sub.adapter else ()
        more = sum(a.numel() + b.numel() for a, b, _ in weights)
        assert beside(config).nonzero == counted.nonzero + more
        assert beside(config).params == counted.params + more


def test_zeros_cost_neither_parameters_nor_macs() -> None:
    net = sparse_net(tiny_model("llama"))
    cost = CostModel(net, 10)
    dense, sparse = cost(net.space.largest()), cost(at(net.space, 50))
    assert (sparse.params, sparse.macs, sparse.decode_macs) == (
        *(dense.params, dense.macs),
        dense.decode_macs,
    )
    # Every width is even: half of each row is half of each weight.
    assert dense.nonzero - sparse.nonzero == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) // 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bert"])
@pytest.mark.parametrize("merge", [True, False])
def test_what_is_saved_computes_the_same_and_keeps_its_zeros(
    family: str, merge: bool, tmp_path: Path
) -> None:
    is_decoder = record_for(family).kind == "decoder"
    model = law_model(family, "causal-lm" if is_decoder else "base")
    net = sparse_net(model, lora_space(model, [4, 2, 0], targets=TARGETS))
    config = configs_of(net.space)[2]
    net.activate(config)
    expected = outputs_of(net, IDS)
    sub = extract_model(net, config, merge=merge)
    saved = save_subnetwork(sub, word_tokenizer(), tmp_path / "sub")
    assert saved.format == "hf"
    auto = AutoModelForCausalLM if is_decoder else AutoModel
    loaded = auto.from_pretrained(tmp_path / "sub").eval()
    if not merge:
        assert_same(weights_of(loaded), weights_of(sub.model))
        zeros = sum(int((p == 0).sum()) for p in loaded.parameters())
        more = sum(a.numel() + b.numel() for a, b, _ in sub.adapter.weights.values())  # type: ignore[union-attr]
        cost = CostModel(net, 10)(config)
        assert zeros == cost.params - cost.nonzero
        assert sum(p.numel() for p in loaded.parameters()) == cost.params - more
        loaded = PeftModel.from_pretrained(loaded, tmp_path / "sub" / "adapter").eval()
    assert torch.allclose(outputs_of(loaded, IDS), expected, atol=1e-5)


def test_an_adapter_alone_is_no_sub_network_where_the_sparsity_differs() -> None:
    model = tiny_model("llama")
    net = sparse_net(model, lora_space(model, [4, 2]))
    assert net.structure is None
    assert net.has_elastic_base
    with pytest.raises(InvalidSubnet, match="elastic, too"):
        extract(net, net.space.largest())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_unwrap_restores_weights_bitwise_and_classes(family: str) -> None:
    head = "causal-lm" if record_for(family).kind == "decoder" else "base"
    model = law_model(family, head)
    before, classes = weights_of(model), [type(m) for m in model.modules()]
    fields = [sorted(vars(m)) for m in model.modules()]
    space = structure_space(model, ffn=[1.0, 0.5], heads=[4, 2], round_to=4)
    net = sparse_net(model, lora_space(model, [4, 2]) + space)
    for config in configs_of(net.space):
        net.activate(config)
        outputs_of(net, IDS)
    assert net.unwrap() is model
    assert_same(weights_of(model), before)
    assert [type(m) for m in model.modules()] == classes
    assert [sorted(vars(m)) for m in model.modules()] == fields
    SuperNetwork(model, lora_space(model, [4, 2]))


def gradients(model: Any, names: Any = None) -> dict[str, Tensor]:
    """Return the gradients of a loss of all outputs, by parameter."""
    model.zero_grad(set_to_none=True)
    out = model(**IDS)[0]
    (out.square() * torch.linspace(0, 1, out.shape[-1])).mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_base_weights_that_train_get_the_gradient_of_the_sparse_model_where_they_are_kept(
    family: str,
) -> None:
    net = sparse_net(law_model(family, "causal-lm"), train_base=True)
    config = configs_of(net.space)[0]
    net.activate(config)
    found = gradients(net.model)
    sparse = extract_model(net, config).model
    expected = gradients(sparse)
    pruned = {f"{n}.weight" for n in architecture(sparse).linear_names(sparse)}
    assert found.keys() == expected.keys() > pruned
    assert any((sparse.get_parameter(name) == 0).any() for name in pruned)
    for name, gradient in expected.items():
        if name in pruned:
            gradient = gradient * (sparse.get_parameter(name) != 0)
            assert bool((found[name] != 0).any())
        assert torch.allclose(found[name], gradient, atol=1e-7), name


def test_adapters_train_as_on_the_sparse_base_with_checkpointing_too() -> None:
    model = law_model("llama", "causal-lm")
    net = sparse_net(model, lora_space(model, [4, 2], targets=TARGETS))
    config = configs_of(net.space)[1]
    net.activate(config)
    with torch.inference_mode():
        net(**IDS)  # what evaluation made must be fit to train with
    found = gradients(net.model)
    assert found.keys() == net.trained_state().keys()
    # The same network on a base that is sparse for good.
    sub = extract_model(net, config, merge=False)
    ranks = SearchSpace([d for d in net.space.dims if d.kind == "rank"])
    fixed = SuperNetwork(sub.model, ranks, alpha=16)
    fixed.load_trained_state(net.trained_state())
    fixed.activate(SubnetConfig({dim.name: config[dim.name] for dim in ranks.dims}))
    for name, gradient in gradients(fixed.model).items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name
    model.train()
    # transformers calls it activation checkpointing of late, and warns of the older name.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    checkpointed = gradients(net.model)
    assert_same(checkpointed, found)


def test_other_sub_networks_may_run_before_the_backward_pass() -> None:
    model = law_model("llama", "causal-lm")
    net = sparse_net(model, lora_space(model, [4, 2], targets=TARGETS))
    first, _, *others = configs_of(net.space)
    for config in (*others, first):  # with buffers that an evaluation left
        net.activate(config)
        outputs_of(net, IDS)
    expected = gradients(net.model)
    net.model.zero_grad(set_to_none=True)
    out = net(**IDS)[0]
    for config in others:
        with net.active(config):
            outputs_of(net, IDS)
    (out.square() * torch.linspace(0, 1, out.shape[-1])).mean().backward()
    found = {n: p.grad for n, p in net.model.named_parameters() if p.grad is not None}
    assert_same(found, expected)


def test_an_evaluation_sees_what_training_changed() -> None:
    net = sparse_net(law_model("llama", "causal-lm"), train_base=True)
    config = at(net.space, 50)
    net.activate(config)
    before = outputs_of(net, IDS)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    gradients(net.model)
    optimizer.step()
    after = outputs_of(net, IDS)
    assert (after - before).abs().max() > 1e-3
    assert torch.allclose(outputs_of(extract_model(net, config).model, IDS), after, atol=1e-5)
    with torch.no_grad():  # with no training step in between
        net.model.model.layers[0].mlp.up_proj.weight.mul_(3)
    changed = outputs_of(net, IDS)
    assert (changed - after).abs().max() > 1e-3
    assert torch.allclose(outputs_of(extract_model(net, config).model, IDS), changed, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_masks_are_exact_at_every_precision(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    expected = copy.deepcopy(model)
    sparsify_(expected, "magnitude", Sparsity(0.5))
    net = sparse_net(model)
    found = extract_model(net, at(net.space, 50)).model
    assert_same(weights_of(found), weights_of(expected))
    assert {p.dtype for p in found.parameters()} == {dtype}


def test_a_saved_super_network_comes_back_with_its_levels(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    plain = copy.deepcopy(model)
    sparse = sparsity_space(model, SPARSITIES, per="half")
    levels = sparsity_levels(model, sparse, "magnitude")
    space = lora_space(model, [4, 2]) + sparse
    net = SuperNetwork(model, space, levels=levels, train_base=True)
    fill_adapters(net, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)  # trained: another order than that of the levels
    save_levels(tmp_path / "levels.safetensors", levels, {"criterion": "magnitude"})
    loaded, made_from = load_levels(tmp_path / "levels.safetensors")
    assert made_from["criterion"] == "magnitude"
    assert made_from["versions"]["torch"] == torch.__version__
    assert loaded.densities == levels.densities
    assert_same(dict(loaded.levels), dict(levels.levels))
    again = SearchSpace.from_dict(space.to_dict())
    assert again == space
    other = SuperNetwork(plain, again, levels=loaded, train_base=True)
    other.load_trained_state(net.trained_state())
    for config in (space.smallest(), space.heuristic()):
        net.activate(config)
        other.activate(config)
        assert torch.equal(outputs_of(net, IDS), outputs_of(other, IDS))


def test_files_that_hold_no_levels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArtifact, match="missing"):
        load_levels(tmp_path / "levels.safetensors")
    path = tmp_path / "levels.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(BadArtifact, match="cannot be read"):
        load_levels(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(BadArtifact, match="holds no levels"):
        load_levels(path)
    densities = '{"b": [50]}'
    header = {"format": "elastune-levels-1", "made_from": "{}", "densities": densities}
    save_file({"a": torch.zeros(1)}, path, header)
    with pytest.raises(BadArtifact, match="different weights"):
        load_levels(path)
    with pytest.raises(BadData, match="not JSON"):
        save_levels(path, WeightLevels({}, {}), {"a": object()})


def test_levels_made_after_reordering_leave_the_same_function() -> None:
    model = law_model("llama", "causal-lm")
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    scores = {
        f"layers.{block.index}.{part}": torch.rand(block.n_units(part), generator=generator)
        for block in blocks(model)
        for part in ("heads", "ffn")
    }
    reorder_(moved, scores)  # type: ignore[arg-type]
    first, second = sparse_net(model), sparse_net(moved)
    for density in (70, 40):
        first.activate(at(first.space, density))
        second.activate(at(second.space, density))
        assert torch.allclose(outputs_of(first, IDS), outputs_of(second, IDS), atol=1e-5)
    with pytest.raises(UnsupportedModel, match=r"sparsity of .* is elastic"):
        reorder_(moved, scores)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("per", "n_dims", "name"),
    [
        ("model", 1, "layers.density"),
        ("layer", 2, "layers.1.density"),
        ("half", 4, "layers.1.ffn.density"),
        ("module", 14, "layers.1.up.density"),
    ],
)
def test_what_shares_a_sparsity(per: Any, n_dims: int, name: str) -> None:
    model = tiny_model("llama")
    space = sparsity_space(model, SPARSITIES, per=per)
    assert len(space) == n_dims
    assert {dim.choices for dim in space.dims} == {(100, 70, 50, 40)}
    modules = [module for dim in space.dims for module in dim.modules]
    assert sorted(modules) == sorted(architecture(model).linear_names(model))
    net = SuperNetwork(model, space, levels=sparsity_levels(model, space, "magnitude"))
    config = SubnetConfig({**space.largest(), name: 40})
    own = next(dim.modules for dim in space.dims if dim.name == name)
    sub = extract_model(net, config).model
    sparse = {m for m in modules if bool((sub.get_submodule(m).weight == 0).any())}
    assert sparse == set(own)
    assert CostModel(net, 10)(config) == model_cost(sub, 10)


def test_patterns_give_layers_choices_of_their_own() -> None:
    model = tiny_model("llama")
    space = sparsity_space(model, {"*": (0.5, 0.0, 0.5), "layers.1.*": (0.29,)})
    assert [dim.choices for dim in space.dims] == [(100, 50), (71,)]
    net = SuperNetwork(model, space, levels=sparsity_levels(model, space, "magnitude"))
    sub = extract_model(net, space.largest()).model
    zeros = [int((layer.mlp.down_proj.weight == 0).sum()) for layer in sub.model.layers]
    assert zeros == [0, 32 * (48 * 29 // 100)]


def test_a_narrower_space_reads_the_levels_of_a_wider_one() -> None:
    model = tiny_model("llama")
    levels = sparsity_levels(model, sparsity_space(model, SPARSITIES), "magnitude")
    narrow = sparsity_space(model, (0.0, 0.5))
    expected = copy.deepcopy(model)
    sparsify_(expected, "magnitude", Sparsity(0.5))
    net = SuperNetwork(model, narrow, levels=levels)
    found = extract_model(net, narrow.smallest()).model
    assert_same(weights_of(found), weights_of(expected))


def test_a_base_that_is_sparse_already_stays_so() -> None:
    model = tiny_model("llama")
    sparsify_(model, "magnitude", Sparsity(0.5))
    before = model_cost(model, 10)
    net = sparse_net(model)
    cost = CostModel(net, 10)
    assert cost(at(net.space, 100)) == cost(at(net.space, 70)) == cost(at(net.space, 50)) == before
    sparser = extract_model(net, at(net.space, 40)).model
    assert cost(at(net.space, 40)) == model_cost(sparser, 10)
    assert cost(at(net.space, 40)).nonzero < before.nonzero


def test_progressive_training_opens_densities_with_widths() -> None:
    model = tiny_model("llama")
    space = lora_space(model, [4, 2]) + sparsity_space(model, SPARSITIES)
    sampler = ProgressiveSampler(space, 0)
    assert sampler.n_stages == 1 + 1 + 3

    def drawn(progress: float) -> set[int]:
        configs = [sampler.draw(i, progress)[0].config for i in range(40)]
        return {config["layers.0.density"] for config in configs}

    assert [drawn((stage + 0.5) / 5) for stage in range(5)] == [
        *({100}, {100}, {100, 70}, {100, 70, 50}),
        {100, 70, 50, 40},
    ]


@pytest.mark.parametrize(
    ("sparsities", "options", "message"),
    [
        ((0.0, 1.0), {}, "sparsity 1.0 is no whole percentage"),
        ((0.0, -0.1), {}, "sparsity -0.1 is no whole percentage"),
        ((0.0, 0.125), {}, "sparsity 0.125 is no whole percentage"),
        ((0.0, float("nan")), {}, "sparsity nan is no whole percentage"),
        ((), {}, "no sparsities given"),
        ((0.0,), {}, "no sparsity but 0"),
        ({"*.density": (0.5,), "*.up": (0.5,)}, {}, "'\\*.up' matches no dim"),
        ((0.5,), {"per": "layers"}, "did you mean 'layer'"),
    ],
)
def test_spaces_without_sense_are_refused(sparsities: Any, options: Any, message: str) -> None:
    with pytest.raises(InvalidSpace, match=message):
        sparsity_space(tiny_model("llama"), sparsities, **options)


def test_scores_that_do_not_fit_are_refused() -> None:
    model = tiny_model("llama")
    space = sparsity_space(model)
    scores = {n: p.detach().abs() for n, p in model.named_parameters()}
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(BadData, match=r"shape \(32, 48\) for weights of shape \(48, 32\)"):
        sparsity_levels(model, space, scores | {name: scores[name].T})
    with pytest.raises(BadData, match="1536 scores are not a number"):
        sparsity_levels(model, space, scores | {name: scores[name] * float("nan")})
    with pytest.raises(BadData, match=r"no scores of model\.layers\.1\.mlp\.up_proj\.weight"):
        sparsity_levels(model, space, {n: s for n, s in scores.items() if n != name})
    with pytest.raises(BadRecipe, match="did you mean 'wanda'"):
        sparsity_levels(model, space, "wandas")  # type: ignore[arg-type]
    with pytest.raises(BadRecipe, match="calibration"):
        sparsity_levels(model, space, "wanda")
    with pytest.raises(InvalidSpace, match="no dim of density"):
        sparsity_levels(model, lora_space(model), "magnitude")


NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("dims", "change", "message"),
    [
        ([ElasticDim("a", "density", (100, 55), (NAME,))], {}, "densities of 100, 70, 50, 40 %"),
        ([ElasticDim("a", "density", (120, 50), (NAME,))], {}, "a percentage, 1 to 100"),
        ([ElasticDim("a", "density", (50, 0), (NAME,))], {}, "a percentage, 1 to 100"),
        ([ElasticDim("a", "density", (50,), ("lm_head",))], {}, "'lm_head' is no linear layer in"),
        (
            [ElasticDim(n, "density", (50,), (NAME,)) for n in "ab"],
            {},
            "up_proj stands in two density dims: a, b",
        ),
        ([ElasticDim("a", "density", (50,), (NAME,))], None, "nothing says which weights"),
        ([ElasticDim("a", "density", (50,), (NAME,))], {NAME: None}, "no levels of"),
        (
            [ElasticDim("a", "density", (50,), (NAME,))],
            {NAME: torch.zeros(32, 48, dtype=torch.uint8)},
            r"shape \(32, 48\), they must be torch.uint8 of shape \(48, 32\)",
        ),
    ],
)
def test_super_networks_without_sense_leave_the_model_as_it_was(
    dims: list[ElasticDim], change: dict[str, Any] | None, message: str
) -> None:
    model = tiny_model("llama")
    levels: WeightLevels | None = sparsity_levels(model, sparsity_space(model), "magnitude")
    assert levels is not None
    if change is None:
        levels = None
    elif change:
        found = dict(levels.levels)
        for name, value in change.items():
            del found[f"{name}.weight"]
            if value is not None:
                found[f"{name}.weight"] = value
        levels = WeightLevels(found, levels.densities)
    before = [type(module) for module in model.modules()]
    space = SearchSpace(dims) + structure_space(model, ffn=[1.0, 0.5], round_to=4)
    with pytest.raises(InvalidSpace, match=message):
        SuperNetwork(model, space, levels=levels)
    assert [type(module) for module in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())
