"""Scores on disk, and scores of units made from scores of weights, against plain loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import tiny_model, tiny_variant, token_ids
from torch import Tensor

from elastune.errors import BadArtifact, BadData, BadRecipe
from elastune.importance import (
    SharedScores,
    load_scores,
    save_scores,
    structure_scores,
    taylor_scores,
    units_from_weights,
)

ROWS = torch.tensor(token_ids(*[12] * 4))
MADE_FROM: dict[str, Any] = {
    "method": "movement",
    "model": "tiny",
    "data": {"task": "sst2", "examples": 64},
    "steps": 12,
    "seed": 0,
}


def shared() -> SharedScores:
    """Return scores of blocks, cut blocks, rows, columns and single weights."""
    torch.manual_seed(0)
    blocks = torch.randn(2, 3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    return SharedScores(
        {
            "even": blocks,
            "cut": blocks[:7, :9],
            "rows": torch.randn(8, 1).expand(8, 5),
            "columns": torch.randn(1, 5).expand(8, 5),
            "weights": torch.randn(3, 4),
        },
        {"even": (4, 4), "cut": (4, 4), "rows": (1, 5), "columns": (8, 1)},
    )


def test_scores_of_weights_and_of_units_come_back_with_what_they_were_made_from(
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    for scores in (taylor_scores(model, ROWS), structure_scores(model, ROWS)):
        save_scores(tmp_path / "deep" / "scores.safetensors", scores, MADE_FROM)
        found, made_from = load_scores(tmp_path / "deep" / "scores.safetensors")
        assert list(found) == sorted(scores)
        assert all(torch.equal(found[name], score) for name, score in scores.items())
        versions = made_from.pop("versions")
        assert versions["torch"] == torch.__version__
        assert made_from == MADE_FROM
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["scores.safetensors"]


def test_shared_scores_are_written_once_and_read_in_the_shape_of_the_weights(
    tmp_path: Path,
) -> None:
    path = tmp_path / "scores.safetensors"
    scores = shared()
    save_scores(path, scores, MADE_FROM)
    with safe_open(path, "pt") as file:
        sizes = {name: tuple(file.get_slice(name).get_shape()) for name in scores}
    assert sizes == {
        "even": (2, 3),
        "cut": (2, 3),
        "rows": (8, 1),
        "columns": (1, 5),
        "weights": (3, 4),
    }
    found, _ = load_scores(path)
    assert isinstance(found, SharedScores)
    assert found.blocks == scores.blocks
    assert found.keys() == scores.keys()
    assert all(torch.equal(found[name], score) for name, score in scores.items())
    assert found["rows"].untyped_storage().nbytes() == 8 * 4
    save_scores(path, found, MADE_FROM)  # what was read can be written again
    assert all(torch.equal(load_scores(path)[0][name], scores[name]) for name in scores)


def test_scores_that_are_said_to_be_shared_and_differ_are_refused(tmp_path: Path) -> None:
    scores = shared()
    scores["even"][5, 6] += 1
    with pytest.raises(BadData, match="even differ within blocks of 4 x 4 weights"):
        save_scores(tmp_path / "scores", scores, MADE_FROM)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    save_scores(path, {"a": torch.ones(2)}, MADE_FROM)
    with pytest.raises(BadData, match="not JSON"):
        save_scores(path, {"a": torch.zeros(2)}, {"model": object()})
    assert load_scores(path)[0]["a"].tolist() == [1, 1]


def test_what_is_no_file_of_scores_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    with pytest.raises(BadArtifact, match="is missing"):
        load_scores(path)
    save_scores(path, shared(), MADE_FROM)
    whole = path.read_bytes()
    for damaged in (whole[:-7], whole[:30], b"", b"not at all"):
        path.write_bytes(damaged)
        with pytest.raises(BadArtifact, match=r"cannot be read.*\n?.*try: delete it"):
            load_scores(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(BadArtifact, match="holds no importance scores: its format is None"):
        load_scores(path)


@pytest.mark.parametrize(
    "change",
    [
        {"made_from": "{"},
        {"shared": json.dumps({"b": {"shape": [4, 4], "block": [2, 2]}})},
        {"shared": json.dumps({"a": {"shape": [9, 4], "block": [2, 2]}})},
        {"shared": json.dumps({"a": {"shape": [4, 4], "block": [0, 2]}})},
        {"shared": json.dumps({"a": {"shape": [4, 4]}})},
        {"shared": "[3]"},
    ],
)
def test_a_header_that_does_not_fit_the_scores_is_damage(
    change: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "scores.safetensors"
    save_scores(path, SharedScores({"a": torch.ones(4, 4)}, {"a": (2, 2)}), MADE_FROM)
    with safe_open(path, "pt") as file:
        header, tensor = file.metadata(), file.get_tensor("a")
    save_file({"a": tensor}, path, metadata=header)
    assert load_scores(path)[0]["a"].shape == (4, 4)
    save_file({"a": tensor}, path, metadata=header | change)
    with pytest.raises(BadArtifact, match="cannot be read"):
        load_scores(path)


def slices_of(model: Any, name: str) -> dict[tuple[str, str], list[tuple[str, int, list[int]]]]:
    """Return (half, unit) -> weight, dim and its rows or columns, written down by hand.

    Block 0; 4 query heads of size 8 in 2 groups, 48 channels.
    """
    found: dict[tuple[str, str], list[tuple[str, int, list[int]]]] = {}
    path = "model.layers.0"
    for group in range(2):
        q = [*range(16 * group, 16 * group + 16)]
        kv = [*range(8 * group, 8 * group + 8)]
        out = [(f"{path}.self_attn.o_proj.weight", 1, q)]
        if name == "llama":
            rows = [
                (f"{path}.self_attn.q_proj.weight", 0, q),
                (f"{path}.self_attn.k_proj.weight", 0, kv),
                (f"{path}.self_attn.v_proj.weight", 0, kv),
            ]
        else:
            fused = [*q, *[32 + r for r in kv], *[48 + r for r in kv]]
            rows = [(f"{path}.self_attn.qkv_proj.weight", 0, fused)]
        found["layers.0.heads", str(group)] = rows + out
    for channel in range(48):
        if name == "llama":
            rows = [
                (f"{path}.mlp.gate_proj.weight", 0, [channel]),
                (f"{path}.mlp.up_proj.weight", 0, [channel]),
            ]
        else:
            rows = [(f"{path}.mlp.gate_up_proj.weight", 0, [channel, 48 + channel])]
        down = (f"{path}.mlp.down_proj.weight", 1, [channel])
        found["layers.0.ffn", str(channel)] = [*rows, down]
    return found


@pytest.mark.parametrize("tie", ["sum", "any"])
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_units_are_the_sum_or_the_largest_of_all_weights_tied_to_them(name: str, tie: Any) -> None:
    model = tiny_variant(name, "causal-lm")
    torch.manual_seed(1)
    names = {weight for parts in slices_of(model, name).values() for weight, _, _ in parts}
    scores = {weight: torch.randn(model.get_parameter(weight).shape) - 3 for weight in names}
    found = units_from_weights(model, scores, tie=tie)
    assert set(found) == {"layers.0.heads", "layers.0.ffn"}
    for (half, unit), parts in slices_of(model, name).items():
        own: list[float] = []
        for weight, dim, index in parts:
            for i in index:
                own += (scores[weight][i] if dim == 0 else scores[weight][:, i]).tolist()
        expected = sum(own) if tie == "sum" else max(own)
        assert float(found[half][int(unit)]) == pytest.approx(expected, rel=1e-4)


def test_a_unit_outlives_a_threshold_if_any_weight_of_it_does() -> None:
    model = tiny_model("llama")
    scores = {
        "model.layers.1.mlp.up_proj.weight": torch.full((48, 32), -1.0),
        "model.layers.1.mlp.down_proj.weight": torch.full((32, 48), -1.0),
    }
    scores["model.layers.1.mlp.down_proj.weight"][3, 7] = 0.5
    found = units_from_weights(model, scores, tie="any")["layers.1.ffn"]
    assert (found > 0).nonzero().flatten().tolist() == [7]
    assert int((units_from_weights(model, scores)["layers.1.ffn"] > 0).sum()) == 0


@pytest.mark.parametrize("name", ["llama-one-kv-head", "falcon-multi-query"])
def test_the_one_key_that_all_heads_share_keeps_none_of_them(name: str) -> None:
    model = tiny_variant(name, "causal-lm")
    weights = taylor_scores(model, ROWS)
    scores = {weight: torch.full_like(score, -1.0) for weight, score in weights.items()}
    if name == "llama-one-kv-head":
        o = "model.layers.0.self_attn.o_proj.weight"
        scores["model.layers.0.self_attn.k_proj.weight"] += 5
        scores["model.layers.0.self_attn.v_proj.weight"] += 5
    else:  # 32 rows of queries, then one key and one value of 8 rows
        o = "transformer.h.0.self_attention.dense.weight"
        scores["transformer.h.0.self_attention.query_key_value.weight"][32:] += 5
    scores[o][:, 8] = 2.0
    heads = units_from_weights(model, scores, tie="any")["layers.0.heads"]
    assert heads.tolist() == [-1, 2, -1, -1]


def test_an_unknown_tie_is_refused() -> None:
    with pytest.raises(BadRecipe, match="did you mean 'sum'"):
        units_from_weights(tiny_model("llama"), {}, tie="sums")  # type: ignore[arg-type]


def test_scores_by_rows_that_take_no_memory_are_summed_alike() -> None:
    model = tiny_model("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    row = torch.arange(48.0)[:, None]
    for scores in (row.expand(48, 32), row.expand(48, 32).contiguous()):
        found: Tensor = units_from_weights(model, {name: scores})["layers.0.ffn"]
        torch.testing.assert_close(found, row[:, 0] * 32)
