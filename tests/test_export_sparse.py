"""Merged sparse checkpoints: no zero of the base is lost, in the merge or in the file."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_structure_law import law_net
from tiny_llama import tiny_tokenizer

from elastune.errors import BadArtifact, BadRecipe, ElastuneError
from elastune.export.merged_sparse import check_merged_sparse, save_merged_sparse, zeros_kept
from elastune.export.saved import Saved
from elastune.space import SubnetConfig
from elastune.subnetwork import Subnetwork, extract_model
from elastune.supernet import SuperNetwork

TOKENIZER = tiny_tokenizer()


def sparse_net() -> tuple[SuperNetwork, SubnetConfig]:
    """Return a super-network half of whose matrices in blocks is zero, and a ragged cut."""
    net = law_net("llama", "causal-lm")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in net.model.named_parameters():
            if ".layers." in name and weight.dim() == 2 and "lora" not in name:
                weight *= torch.rand(weight.shape, generator=generator) < 0.5
    choices = dict(net.space.largest())
    for name, choice in {"layers.0.ffn": 24, "layers.1.heads": 2, "layers.2.ffn": 0}.items():
        assert choice in next(dim.choices for dim in net.space.dims if dim.name == name)
        choices[name] = choice
    return net, SubnetConfig(choices)


@pytest.fixture(scope="module")
def base() -> Subnetwork:
    return extract_model(*sparse_net(), merge=False)


@pytest.fixture(scope="module")
def merged(base: Subnetwork) -> Subnetwork:
    """Return a merge that adds where the base is not zero, as SparsePEFT does."""
    added = extract_model(*sparse_net()).model.state_dict()
    sub = replace(extract_model(*sparse_net()), adapter=None)
    with torch.no_grad():
        for name, weight in sub.model.named_parameters():
            old = base.model.state_dict()[name]
            weight.copy_(torch.where(old == 0, old, added[name]))
    return sub


@pytest.fixture(scope="module")
def saved(base: Subnetwork, merged: Subnetwork, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    out = tmp_path_factory.mktemp("sparse") / "out"
    return save_merged_sparse(merged, TOKENIZER, out, base=base)


def test_every_zero_is_kept_and_counted_after_loading(base: Subnetwork, saved: Saved) -> None:
    assert saved.format == "merged-sparse"
    about = json.loads((saved.folder / "sparsity.json").read_text())
    state = load_file(saved.folder / "model.safetensors")
    matrices = {name: weight for name, weight in state.items() if weight.dim() == 2}
    assert set(about["tensors"]) == set(matrices)
    n_zeros = 0
    for name, weight in matrices.items():
        lost = (weight != 0) & (base.model.state_dict()[name] == 0)
        assert not lost.any()
        n_zeros += int((weight == 0).sum())
        assert about["tensors"][name]["zeros"] == int((weight == 0).sum())
    assert about["total"]["zeros"] == n_zeros > 0.3 * about["total"]["weights"]
    assert f"{n_zeros:,} of" in saved.notes[-1]
    assert saved.largest_difference < 1e-6
    assert sorted(p.name for p in saved.folder.iterdir()) == list(saved.files)
    assert (saved.folder / "README.md").read_text().splitlines().count("# out") == 1


@pytest.mark.slow
def test_padding_adds_zeros_and_loses_none(
    base: Subnetwork, merged: Subnetwork, tmp_path: Path
) -> None:
    hetero = save_merged_sparse(merged, TOKENIZER, tmp_path / "a", base=base, format="hf-hetero")
    padded = save_merged_sparse(
        merged, TOKENIZER, tmp_path / "b", base=base.model, format="hf-padded"
    )
    totals = [
        json.loads((saved.folder / "sparsity.json").read_text())["total"]
        for saved in (hetero, padded)
    ]
    assert totals[0]["zeros"] < totals[1]["zeros"]
    dense = [total["weights"] - total["zeros"] for total in totals]
    assert dense[0] == dense[1]


def test_a_merge_that_loses_zeros_is_refused(
    base: Subnetwork, merged: Subnetwork, tmp_path: Path
) -> None:
    plain = extract_model(*sparse_net())
    lost = sum(zeros.lost for zeros in zeros_kept(base, plain).values())
    assert lost > 100
    with pytest.raises(ElastuneError, match=f"the merge lost {lost:,} of"):
        save_merged_sparse(plain, TOKENIZER, tmp_path / "out", base=base)
    with pytest.raises(BadRecipe, match="is not merged"):
        save_merged_sparse(base, TOKENIZER, tmp_path / "out", base=base)
    net = sparse_net()[0]
    whole = extract_model(net, net.space.largest())
    with pytest.raises(BadRecipe, match="other sizes cannot be compared"):
        save_merged_sparse(merged, TOKENIZER, tmp_path / "out", base=whole)
    assert not list(tmp_path.iterdir())


def test_broken_files_are_found(saved: Saved, tmp_path: Path) -> None:
    folder = shutil.copytree(saved.folder, tmp_path / "out")
    file = folder / "model.safetensors"
    state = load_file(file)
    name = "model.layers.1.self_attn.v_proj.weight"
    flipped = state | {name: -state[name]}
    without = {n: w for n, w in state.items() if ".layers.1." not in n}
    for weights in (flipped, without):
        save_file(weights, file, {"format": "pt"})
        with pytest.raises(ElastuneError, match=r"model\.safetensors changed since"):
            check_merged_sparse(folder)
    # What is counted is what a fresh process has loaded.
    about = json.loads((folder / "sparsity.json").read_text())
    save_file(state | {name: torch.where(state[name] == 0, 1e-30, state[name])}, file)
    about["sha256"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "sparsity.json").write_text(json.dumps(about))
    with pytest.raises(ElastuneError, match=r"v_proj\.weight has 0 zeros when it is loaded"):
        check_merged_sparse(folder)
    file.unlink()
    with pytest.raises(BadArtifact, match=r"lacks model\.safetensors"):
        check_merged_sparse(folder)
