"""Elastic embeddings of low rank: the law, costs, training, saving, and who leaves them alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_models import word_tokenizer
from tiny_models import fill_adapters, inputs_of, outputs_of, tiny_model, tiny_variant
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import AutoModelForMaskedLM

from elastune.allocate import allocate, uniform_config
from elastune.build_space import lora_space
from elastune.build_structure import structure_space
from elastune.cost import CostModel, model_cost
from elastune.elastic.embedding import ElasticEmbedding, token_counts
from elastune.elastic.factorised import FactorisedEmbedding
from elastune.errors import BadData, InvalidSpace, InvalidSubnet
from elastune.export import save_subnetwork, snap_to_uniform
from elastune.export.verify import auto_class
from elastune.extract import extract
from elastune.latency import Conditions
from elastune.latency_table import LatencyTable
from elastune.models import load_model
from elastune.sampling import ProgressiveSampler
from elastune.space import ElasticDim, SearchSpace, SubnetConfig
from elastune.subnetwork import Subnetwork, extract_model
from elastune.supernet import SuperNetwork

RANK = "embeddings.rank"

MODELS = [
    ("bert", "classifier"),
    ("bert", "base"),
    ("distilbert", "classifier"),
    ("roberta", "reader"),
    ("electra", "classifier"),
    ("deberta-v2", "classifier"),
    ("llama", "causal-lm"),
    ("gpt2", "classifier"),
    ("opt", "classifier"),
]
#: Loaded in a fresh process, too.
FRESH = [
    pair for pair in MODELS if pair[0] not in ("deberta-v2", "gpt2", "opt") and pair[1] != "base"
]


def elastic(name: str = "bert", head: str = "classifier", **options: Any) -> SuperNetwork:
    """Return a super-network of three blocks, all of which is elastic, the embedding too."""
    layers = {"distilbert": "n_layers"}.get(name, "num_hidden_layers")
    model = tiny_variant(name, head, **{layers: 3})
    sizes = {"heads": [4, 2, 0], "ffn": [1.0, 0.5, 0], "depth": "all", "round_to": 8}
    space = structure_space(model, embedding=[1.0, 0.5, 8], **sizes)  # type: ignore[arg-type]
    return SuperNetwork(model, space, **options)


def with_rank(config: SubnetConfig, rank: int, **choices: int) -> SubnetConfig:
    named = {name.replace("_", "."): choice for name, choice in choices.items()}
    return SubnetConfig({**config, RANK: rank, **named})


def some_configs(space: SearchSpace) -> list[SubnetConfig]:
    """Return sub-networks of a smaller embedding: alone, and with heads, widths and depth."""
    rng = np.random.default_rng(0)
    least = space.dims[0].choices[-1]
    mixed = with_rank(space.sample(rng), least, layers_1_block=0, layers_2_block=1)
    return [with_rank(space.largest(), least), mixed]


def table_of(net: SuperNetwork) -> ElasticEmbedding:
    assert net.embedding is not None
    return net.embedding


# --- the law --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "head"), MODELS)
def test_costs_are_counted_parameters_and_both_formats_compute_what_was_active(
    name: str, head: str, tmp_path: Path
) -> None:
    net = elastic(name, head)
    inputs = inputs_of(net.model)
    whole = outputs_of(net, inputs)
    cost = CostModel(net, 11)
    for number, config in enumerate(some_configs(net.space)):
        net.activate(config)
        activated = outputs_of(net, inputs)
        assert float((activated - whole).abs().max()) > 1e-3
        sub = extract_model(net, config)
        torch.testing.assert_close(outputs_of(sub.model, inputs), activated, rtol=0, atol=1e-6)
        assert cost(config) == model_cost(sub.model, 11)
        assert cost(config).block_macs == cost(with_rank(config, table_width(net))).block_macs
        n_params = sum(p.numel() for p in sub.model.parameters())
        for format in ("auto", "hf-padded"):
            saved = save_subnetwork(sub, word_tokenizer(), tmp_path / f"{number}", format=format)
            assert saved.largest_difference < 1e-5
            assert (saved.n_params == n_params) == (saved.format == "hf-hetero")


def table_width(net: SuperNetwork) -> int:
    return table_of(net).embedding_dim


SCRIPT = """
import json, sys, torch, transformers
sys.modules["elastune"] = None  # whatever imports it fails
found, ids = {}, torch.tensor(json.loads(sys.argv[2]))
for folder, (auto, generates) in json.loads(sys.argv[1]).items():
    auto = getattr(transformers, auto)
    model = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        row = {"output": model(input_ids=ids)[0].flatten().tolist()}
    row["n_params"] = sum(p.numel() for p in model.parameters())
    row["rank"] = model.config.embedding_rank
    if generates:
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        mask = torch.ones_like(ids)
        row["said"] = [
            model.generate(ids, attention_mask=mask, use_cache=cache, **options).tolist()
            for cache in (True, False)
        ]
    model.save_pretrained(folder + "-again")
    again = auto.from_pretrained(folder + "-again", trust_remote_code=True)
    with torch.no_grad():
        row["saved_again"] = float((again.eval()(input_ids=ids)[0].flatten() -
                                    torch.tensor(row["output"])).abs().max())
    found[folder] = row
print(json.dumps(found))
"""
IDS = [[5, 9, 4, 7, 3, 8, 6, 11]]


def test_folders_compute_the_same_in_a_fresh_process_without_elastune(tmp_path: Path) -> None:
    cases, expected = {}, {}
    for name, head in FRESH:
        net = elastic(name, head)
        for place, config in enumerate(some_configs(net.space)):
            sub = extract_model(net, config)
            folder = str(tmp_path / f"{name}-{head}-{place}")
            save_subnetwork(sub, word_tokenizer(), folder)
            cases[folder] = (auto_class(sub.model).__name__, head == "causal-lm")
            with torch.no_grad():
                out = sub.model(input_ids=torch.tensor(IDS))[0].flatten()
            expected[folder] = (out, sum(p.numel() for p in sub.model.parameters()), config[RANK])
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", SCRIPT, json.dumps(cases), json.dumps(IDS)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, found in json.loads(done.stdout.splitlines()[-1]).items():
        out, n_params, rank = expected[folder]
        torch.testing.assert_close(torch.tensor(found["output"]), out, rtol=1e-5, atol=1e-5)
        assert (found["n_params"], found["rank"]) == (n_params, rank)
        assert found["saved_again"] < 1e-6
        cached, uncached = found.get("said", (0, 0))
        assert cached == uncached


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_every_rank_is_the_closest_table_of_its_rank(name: str) -> None:
    head = "causal-lm" if name == "llama" else "base"
    net = elastic(name, head)
    table = table_of(net)
    full = table.weight.detach()
    left, values, right = torch.linalg.svd(full, full_matrices=False)
    ids = torch.arange(len(full))
    for rank in (16, 8):
        table.set_active(rank)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        torch.testing.assert_close(table(ids), best, rtol=0, atol=1e-4)
    table.set_active(table.embedding_dim)
    assert torch.equal(table(ids), full)


def test_fitted_to_counts_every_rank_has_the_least_error_over_the_tokens_of_texts() -> None:
    net = elastic("bert", "base")
    table = table_of(net)
    full = table.weight.detach()
    rows = [[3, 3, 3, 5], [3, 9, 5], [], [60]]
    counts = token_counts(rows, len(full))
    assert counts.tolist() == [sum(row.count(i) for row in rows) for i in range(len(full))]
    table.fit_(counts)
    # Weighted by counts, the closest table is that of the rows times the root of their weight.
    root = (counts + 1).sqrt()[:, None]
    left, values, right = torch.linalg.svd(root * full, full_matrices=False)
    for rank in (16, 8):
        table.set_active(rank)
        best = (left[:, :rank] * values[:rank]) @ right[:rank] / root
        torch.testing.assert_close(table(torch.arange(len(full))), best, rtol=0, atol=1e-4)


@pytest.mark.parametrize("counts", [torch.ones(63), torch.ones(64, 1), -torch.ones(64)])
def test_counts_must_be_of_every_token(counts: Tensor) -> None:
    with pytest.raises(BadData, match="for 64 tokens"):
        table_of(elastic()).fit_(counts)
    with pytest.raises(BadData, match="token id 64 is outside"):
        token_counts([[1, 64]], 64)


def test_unwrap_gives_the_stock_embedding_back() -> None:
    model = tiny_variant("bert", "classifier")
    inputs, names = inputs_of(model), list(model.state_dict())
    expected = outputs_of(model, inputs)
    net = SuperNetwork(model, structure_space(model, embedding=[1.0, 0.5]))
    assert torch.equal(outputs_of(net, inputs), expected)
    net.activate(net.space.smallest())
    back = net.unwrap()
    assert type(back.get_input_embeddings()) is nn.Embedding
    assert list(back.state_dict()) == names
    assert torch.equal(outputs_of(back, inputs), expected)


def test_adapters_and_ranks_go_together() -> None:
    model = tiny_variant("llama", "causal-lm")
    space = lora_space(model, [4, 2]) + structure_space(model, embedding=[0.5, 0.25])
    net = SuperNetwork(model, space, alpha=16)
    fill_adapters(net)
    inputs = inputs_of(model)
    net.activate(space.smallest())
    activated = outputs_of(net, inputs)
    merged = extract_model(net, space.smallest()).model
    torch.testing.assert_close(outputs_of(merged, inputs), activated, rtol=0, atol=1e-5)
    assert CostModel(net, 11, merged=True)(space.smallest()) == model_cost(merged, 11)
    with pytest.raises(InvalidSubnet, match="an adapter alone is no sub-network"):
        extract(net, space.smallest())


# --- training -------------------------------------------------------------------------------------


def test_a_rank_trains_its_prefix_and_the_full_size_the_table() -> None:
    net = elastic(train_base=True)
    table = table_of(net)
    inputs = inputs_of(net.model)
    net.activate(with_rank(net.space.largest(), 8))
    net(**inputs)[0].sum().backward()
    assert table.weight.grad is None
    assert table.factor_a.grad is not None
    assert table.factor_b.grad is not None
    assert torch.count_nonzero(table.factor_a.grad[:, :8]) > 0
    assert torch.count_nonzero(table.factor_a.grad[:, 8:]) == 0
    assert torch.count_nonzero(table.factor_b.grad[8:]) == 0
    net.zero_grad()
    net.activate(net.space.largest())
    net(**inputs)[0].sum().backward()
    assert torch.count_nonzero(table.weight.grad) > 0
    assert table.factor_a.grad is None


def test_gradients_are_those_of_the_extracted_embedding() -> None:
    net = elastic(train_base=True)
    table = table_of(net)
    table.set_active(8)
    made = table.extract()
    assert isinstance(made, FactorisedEmbedding)
    ids = torch.tensor([[3, 0, 7, 3], [9, 5, 0, 0]])
    target = torch.randn(2, 4, table.embedding_dim, generator=torch.Generator().manual_seed(0))
    mse_loss(table(ids), target).backward()
    mse_loss(made(ids), target).backward()
    grads = (table.factor_a.grad, table.factor_b.grad)
    assert grads[0] is not None
    assert grads[1] is not None
    torch.testing.assert_close(grads[0][:, :8], made.rows.weight.grad)
    torch.testing.assert_close(grads[1][:8], _turned(made.projection.weight.grad))
    assert torch.count_nonzero(grads[0][0]) == 0, "the pad token's row gets no gradient"


def _turned(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.T


@pytest.mark.parametrize(
    ("choices", "train_base", "trained"),
    [([1.0, 0.5], True, True), ([0.5, 0.25], True, False), ([1.0, 0.5], False, False)],
)
def test_the_table_is_trained_only_where_it_is_a_choice(
    choices: list[float], train_base: bool, trained: bool
) -> None:
    model = tiny_variant("bert", "classifier")
    net = SuperNetwork(model, structure_space(model, embedding=choices), train_base=train_base)
    table = table_of(net)
    assert table.weight.requires_grad == trained
    assert table.factor_a.requires_grad == table.factor_b.requires_grad == train_base


@pytest.mark.parametrize("train_base", [True, False])
def test_trained_state_holds_the_factors_and_is_loaded_back(train_base: bool) -> None:
    net = elastic(train_base=train_base)
    table = table_of(net)
    with torch.no_grad():
        table.factor_a.add_(0.3)
        table.factor_b.mul_(1.1)
    state = {name: tensor.clone() for name, tensor in net.trained_state().items()}
    assert {n.rpartition(".")[2] for n in state} >= {"factor_a", "factor_b"}
    other = elastic(train_base=train_base)
    other.load_trained_state(state)
    inputs = inputs_of(net.model)
    for config in some_configs(net.space):
        net.activate(config)
        other.activate(config)
        assert torch.equal(outputs_of(other, inputs), outputs_of(net, inputs))


# --- saving ---------------------------------------------------------------------------------------


def smaller(**changes: Any) -> Subnetwork:
    net = elastic(**changes)
    return extract_model(net, with_rank(net.space.largest(), 8))


def test_even_blocks_are_saved_with_factors_unless_a_stock_class_is_asked_for(
    tmp_path: Path,
) -> None:
    sub = smaller()
    kept = save_subnetwork(sub, word_tokenizer(), tmp_path / "auto")
    stock = save_subnetwork(sub, word_tokenizer(), tmp_path / "hf", format="hf")
    assert kept.format == "hf-hetero"
    assert json.loads((tmp_path / "auto/config.json").read_text())["embedding_rank"] == 8
    assert "rank 8 of 32" in (tmp_path / "auto/README.md").read_text()
    assert "embedding_rank" not in (tmp_path / "hf/config.json").read_text()
    assert "2,048 weights are stored, 768 of which would do" in stock.notes[0]
    assert stock.n_params - kept.n_params == 64 * 32 - 8 * (64 + 32)
    assert (tmp_path / "hf/README.md").read_text().count(stock.notes[0]) == 1


def test_a_loaded_folder_is_cut_once_more_and_keeps_its_rank(tmp_path: Path) -> None:
    save_subnetwork(smaller(), word_tokenizer(), tmp_path / "one")
    model, tokenizer = load_model(tmp_path / "one", head="sequence-classification")
    inputs = inputs_of(model)
    space = structure_space(model, ffn=[1.0, 0.5], round_to=8)
    net = SuperNetwork(model, space)
    net.activate(space.smallest())
    activated = outputs_of(net, inputs)
    sub = extract_model(net, space.smallest())
    assert CostModel(net, 11)(space.smallest()) == model_cost(sub.model, 11)
    save_subnetwork(sub, tokenizer, tmp_path / "two")
    again, _ = load_model(tmp_path / "two", head="sequence-classification")
    assert again.get_input_embeddings().rank == 8  # type: ignore[union-attr]
    torch.testing.assert_close(outputs_of(again, inputs), activated, rtol=0, atol=1e-5)
    with pytest.raises(InvalidSpace, match="has rank 8 already"):
        structure_space(again, embedding=[1.0, 0.5])


def test_a_head_that_would_be_tied_to_it_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    save_subnetwork(smaller(), word_tokenizer(), tmp_path / "model")
    with pytest.raises(ValueError, match="cannot be tied to an embedding of rank 8"):
        AutoModelForMaskedLM.from_pretrained(tmp_path / "model")


# --- the space ------------------------------------------------------------------------------------


def test_parts_are_rounded_to_multiples_of_8_and_the_width_is_never_rounded() -> None:
    model = tiny_model("bert", hidden_size=36)
    choices = structure_space(model, embedding=[0.6, 1.0, 0.3, 0.05, 20]).dims[0].choices
    assert choices == (36, 24, 20, 8)
    space = structure_space(model, embedding=[1.0, 0.5], ffn=[1.0, 0.5], round_to=8)
    assert [dim.name for dim in space.dims] == [RANK, "layers.0.ffn", "layers.1.ffn"]
    assert space.dims[0].modules == ("embeddings.word_embeddings",)
    assert SearchSpace.from_dict(space.to_dict()) == space


@pytest.mark.parametrize(
    ("name", "head", "embedding", "message"),
    [
        ("gpt2", "causal-lm", [0.5], "head of a GPT2LMHeadModel is tied"),
        ("gemma2", "classifier", [0.5], "no plain table"),
        ("vit", "base", [0.5], "no plain table"),
        ("bert", "base", [33], "rank 33 of an embedding of width 32"),
        ("bert", "base", [1.0, 0], "rank 0"),
        ("bert", "base", [1.5], "neither a part"),
        ("bert", "base", [], "no sizes given"),
        ("bert", "base", [1.0], "nothing of the structure is elastic"),
    ],
)
def test_embeddings_that_cannot_be_factorised_are_refused(
    name: str, head: str, embedding: list[float], message: str
) -> None:
    with pytest.raises(InvalidSpace, match=message):
        structure_space(tiny_variant(name, head), embedding=embedding)


def test_a_dim_of_another_module_or_a_second_one_leaves_the_model_as_it_was() -> None:
    model = tiny_variant("bert", "base")
    classes = [type(module) for module in model.modules()]
    table = "embeddings.word_embeddings"
    spaces = {
        "the embedding is": [ElasticDim("a", "embedding", (8,), ("encoder.layer.0",))],
        "two embedding dims": [ElasticDim(n, "embedding", (8,), (table,)) for n in "ab"],
        "rank 64": [ElasticDim("a", "embedding", (64, 8), (table,))],
    }
    for message, dims in spaces.items():
        with pytest.raises(InvalidSpace, match=message):
            SuperNetwork(model, SearchSpace(dims))
    assert [type(module) for module in model.modules()] == classes


# --- those that know of blocks alone --------------------------------------------------------------


def test_equal_cuts_and_snapping_leave_the_rank_alone() -> None:
    net = elastic()
    cost = CostModel(net, 11)
    config = uniform_config(net.space, lambda c: cost(c).macs, 0.7 * cost(net.config).macs)
    assert config[RANK] == 32
    mixed = some_configs(net.space)[1]
    assert snap_to_uniform(net.space, mixed, net.unwrap())[RANK] == mixed[RANK]


def test_allocation_buys_the_rank_too_and_never_leaves_all_blocks_out() -> None:
    net = elastic()
    cost = CostModel(net, 11)
    losses = {
        dim.name: {choice: float(i) for i, choice in enumerate(dim.choices)}
        for dim in net.space.dims
    }
    losses[RANK] = {32: 0.0, 16: 0.001, 8: 0.002}
    budget = 0.98 * cost(net.config).params
    bought = allocate(net.space, losses, lambda c: cost(c).params, budget)
    assert bought[RANK] < 32
    assert with_rank(bought, 32) == net.space.largest()
    assert cost(bought).params <= budget
    # As if every block did harm.
    losses |= {f"layers.{number}.block": {1: 0.0, 0: -1.0} for number in range(3)}
    smallest = allocate(net.space, losses, lambda c: cost(c).macs, cost(net.config).macs)
    assert any(shape is not None for shape in net.shapes(smallest))


def test_a_latency_table_measures_and_predicts_beside_it() -> None:
    model = tiny_variant("bert", "base")
    space = structure_space(model, ffn=[1.0, 0.5], embedding=[1.0, 0.5], round_to=8, shared=True)
    net = SuperNetwork(model, space)
    conditions = Conditions(prompt_tokens=8, warmup=1, repeats=2)
    table = LatencyTable.measure(net, conditions)
    small, full = (with_rank(space.smallest(), rank) for rank in (16, 32))
    assert table.predict(small) == table.predict(full)
    assert net.config == space.largest()


def test_progressive_training_opens_the_rank_with_the_widths() -> None:
    net = elastic()
    sampler = ProgressiveSampler(net.space, seed=0)
    for progress, lowest in ((0.0, 32), (1.2 / sampler.n_stages, 16), (2.5 / sampler.n_stages, 8)):
        drawn = {sampler.draw(i, progress)[0].config[RANK] for i in range(40)}
        assert min(drawn) == lowest
