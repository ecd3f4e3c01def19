"""Reordering: the function stays, prefixes hold the best, and whole units move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import (
    VARIANTS,
    heads_of,
    inputs_of,
    outputs_of,
    tiny_model,
    tiny_net,
    tiny_variant,
    token_ids,
)

from elastune.build_structure import structure_space
from elastune.errors import BadData, UnsupportedModel
from elastune.importance import structure_scores
from elastune.models.blocks import PARTS, blocks
from elastune.models.families import known_model_types
from elastune.reorder import reorder_
from elastune.supernet import SuperNetwork

NAMES = [*known_model_types(), *VARIANTS]
ALIBI = {"bloom", "mpt", "falcon-alibi", "bloom-residual-after"}
ROWS = torch.tensor(token_ids(*[12] * 6))


def build(name: str) -> Any:
    model_type = VARIANTS.get(name, (name, {}))[0]
    return tiny_variant(name, "causal-lm" if "causal-lm" in heads_of(model_type) else "base")


def random_scores(model: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = {
        f"layers.{block.index}.{part}": torch.rand(block.n_units(part), generator=generator)
        for block in blocks(model)
        for part in PARTS
    }
    # The first unit goes last, so that heads move for certain.
    return {name: score.index_fill(0, torch.tensor(0), -1.0) for name, score in scores.items()}


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_the_same_and_every_projection_has_moved(name: str) -> None:
    model = build(name)
    for parameter in model.parameters():  # no bias and no norm that is the same everywhere
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    inputs = inputs_of(model)
    expected = outputs_of(model, inputs)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = reorder_(model, random_scores(model))
    torch.testing.assert_close(outputs_of(model, inputs), expected, rtol=1e-5, atol=1e-5)
    for block in blocks(model):
        for part in PARTS:
            stays = part == "heads" and name in ALIBI
            assert (f"layers.{block.index}.{part}" in moved) != stays
            for role in block.roles_of(part):
                path = f"{block.name}.{block.record.roles[role]}.weight"
                is_same = torch.equal(before[path], model.get_parameter(path))
                shared = role in ("k", "v") and block.shape.kv_heads == 1
                assert is_same == (stays or shared), path


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "falcon", "bert", "vit"])
def test_scores_taken_anew_fall_from_the_first_unit_to_the_last(name: str) -> None:
    model = build(name)
    inputs: Any = [inputs_of(model)] if name == "vit" else ROWS
    for method in ("magnitude", "wanda"):
        reorder_(model, structure_scores(model, inputs, method))  # type: ignore[arg-type]
        again = structure_scores(model, inputs, method)  # type: ignore[arg-type]
        for dim, score in again.items():
            falls = score[1:] <= score[:-1] * (1 + 1e-5)
            assert bool(falls.all()), dim


def test_whole_groups_move_and_the_heads_inside_keep_their_order() -> None:
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4)
    attention = model.model.layers[0].self_attn
    q, k, o = (getattr(attention, f"{r}_proj").weight.detach().clone() for r in "qko")
    moved = reorder_(model, {"layers.0.heads": torch.tensor([2.0, 1.0, 9.0, 4.0])})
    assert moved["layers.0.heads"].tolist() == [2, 3, 0, 1]
    groups = q.view(4, 16, 32)  # two query heads of size 8 for each of 4 keys
    assert torch.equal(attention.q_proj.weight.view(4, 16, 32), groups[[2, 3, 0, 1]])
    assert torch.equal(attention.k_proj.weight.view(4, 8, 32), k.view(4, 8, 32)[[2, 3, 0, 1]])
    assert torch.equal(attention.o_proj.weight.view(32, 4, 16), o.view(32, 4, 16)[:, [2, 3, 0, 1]])


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox", "falcon-multi-query"])
def test_a_cut_keeps_the_units_of_the_best_scores(name: str) -> None:
    model = build(name)
    scores = random_scores(model, seed=3)
    kept = {dim: score.argsort(descending=True)[: len(score) // 2] for dim, score in scores.items()}
    expected = without(build(name), kept)
    reorder_(model, scores)
    net = SuperNetwork(model, structure_space(model, ffn=[1.0, 0.5], heads=[1.0, 0.5], round_to=1))
    inputs = inputs_of(model)
    net.activate(net.space.smallest())
    torch.testing.assert_close(
        outputs_of(net, inputs), outputs_of(expected, inputs), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def without(model: Any, kept: dict[str, torch.Tensor]) -> Any:
    """Zero what the units that are not kept put out."""
    for block in blocks(model):
        for part, role in (("heads", "o"), ("ffn", "down")):
            module = block.module.get_submodule(block.record.roles[role])
            weight = module.weight.T if model.config.model_type == "gpt2" else module.weight
            n = block.n_units(part)  # type: ignore[arg-type]
            size = weight.shape[1] // n
            for unit in set(range(n)) - set(kept[f"layers.{block.index}.{part}"].tolist()):
                weight[:, unit * size : (unit + 1) * size] = 0
    return model


def test_zeros_move_with_their_weights() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter[torch.rand_like(parameter) < 0.5] = 0
    counts = {name: int((p == 0).sum()) for name, p in model.named_parameters()}
    reorder_(model, structure_scores(model, ROWS))
    assert {name: int((p == 0).sum()) for name, p in model.named_parameters()} == counts


def test_halves_without_scores_stay_and_equal_scores_keep_their_order() -> None:
    model = tiny_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = reorder_(model, {"layers.1.ffn": torch.ones(48)})
    assert moved["layers.1.ffn"].tolist() == list(range(48))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_wrong_scores_are_refused_and_nothing_has_moved() -> None:
    model = tiny_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    good = {"layers.0.ffn": torch.rand(48)}
    with pytest.raises(BadData, match=r"did you mean 'layers\.1\.ffn'"):
        reorder_(model, {**good, "layers.1.ff": torch.rand(48)})
    with pytest.raises(BadData, match=r"shape \(4,\) for 2 units"):
        reorder_(model, {**good, "layers.1.heads": torch.rand(4)})
    with pytest.raises(BadData, match="1 of 2 scores are not a number"):
        reorder_(model, {**good, "layers.1.heads": torch.tensor([1.0, float("nan")])})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_model_with_adapters_is_refused() -> None:
    net = tiny_net(tiny_model("llama"))
    with pytest.raises(UnsupportedModel, match="before adapters are added"):
        reorder_(net.model, {"layers.0.ffn": torch.rand(48)})


def difference_after_ordering(name: str) -> float:
    """Return the largest difference of outputs after a model was sorted by its own importance."""
    model = build(name)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    inputs = inputs_of(model)
    expected = outputs_of(model, inputs)
    reorder_(model, structure_scores(model, [inputs], "wanda"))
    return float((outputs_of(model, inputs) - expected).abs().max())


def main() -> None:
    """Print the difference of every layout."""
    found = {name: difference_after_ordering(name) for name in NAMES}
    for name, difference in found.items():
        print(f"{name:32} {difference:.1e}")  # noqa: T201
    print(f"{len(found)} layouts, largest difference {max(found.values()):.1e}")  # noqa: T201


if __name__ == "__main__":
    main()
