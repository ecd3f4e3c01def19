"""Sparsity as a dim of a whole run: one search over ranks, widths and zeros, and what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_run import save_recipe, save_sums, save_tiny_model, tiny_recipe
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from elastune.artifacts import RunDirectory
from elastune.build_sparsity import load_levels
from elastune.cli import app
from elastune.config import make_recipe
from elastune.errors import BadRecipe
from elastune.files import read_json
from elastune.progress import Reporter
from elastune.run import Run
from elastune.space import SearchSpace, SubnetConfig
from elastune.sparsify import Sparsity, keep_mask

# PEFT still asks for a property that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SPARSE: dict[str, Any] = {
    "method": "magnitude",
    "choices": {"*": [0.0, 0.3, 0.6], "layers.0.*": [0.0, 0.5]},
    "per": "half",
}
STRUCTURE: dict[str, Any] = {"ffn": [1.0, 0.5], "round_to": 8, "order": "magnitude"}
SEARCH: dict[str, Any] = {
    "trials": 8,
    "cost": "nonzero",
    "limits": ["nonzero<=75%"],
    "objective": "loss",
}


def cli(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module", params=["shears", "lonas"])
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    model, data = save_tiny_model(folder / "model"), save_sums(folder / "data")
    recipe = tiny_recipe(model, data, search=SEARCH, baselines=["dense"])
    recipe |= {"sparsify": SPARSE, "method": request.param}
    if request.param == "lonas":
        recipe["structure"] = STRUCTURE
    cli("run", save_recipe(folder / "r.yaml", recipe), "--out", folder / "run")
    return folder / "run"


def space_of(run: Path) -> SearchSpace:
    return SearchSpace.from_dict(read_json(run / "space.json"))


def rows(run: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in read_json(run / "metrics.json")["rows"]}


def test_sparsity_is_searched_beside_the_other_dims_and_the_limit_is_kept(run: Path) -> None:
    space = space_of(run)
    structure = {"ffn"} if run.parent.name.startswith("lonas") else set()
    assert {dim.kind for dim in space.dims} == {"rank", "density"} | structure
    densities = {dim.name: dim.choices for dim in space.dims if dim.kind == "density"}
    assert densities["layers.0.ffn.density"] == (100, 50)
    assert densities["layers.1.ffn.density"] == (100, 70, 40)
    found = rows(run)
    assert found["best"]["nonzero"] <= 0.75 * found["largest"]["nonzero"]
    zeros = {name: row["params"] - row["nonzero"] for name, row in found.items()}
    assert zeros["largest"] == zeros["dense"]


def test_the_base_stays_dense_and_the_order_of_its_weights_lies_beside_it(run: Path) -> None:
    assert read_json(run / "base" / "sparsity.json")["total"]["zeros"] == 0
    levels, made_from = load_levels(run / "base" / "levels.safetensors")
    assert made_from["criterion"] == "magnitude"
    weights = AutoModelForCausalLM.from_pretrained(run / "base").state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    kept = levels.levels[name] >= 1  # of the choices 70 and 40: what the first keeps
    assert torch.equal(kept, keep_mask(weights[name].abs(), Sparsity(0.3)))


def test_what_is_saved_has_the_reported_zeros_and_computes_the_same_in_plain_libraries(
    run: Path,
) -> None:
    row = rows(run)["best"]
    config = SubnetConfig(row["config"])
    folder = run / "subnets" / "best"
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    if any(config[dim.name] for dim in space_of(run).dims if dim.kind == "rank"):
        plain = PeftModel.from_pretrained(plain, folder / "adapter")
    zeros = sum(int((p == 0).sum()) for name, p in plain.named_parameters() if "lora" not in name)
    assert zeros == row["params"] - row["nonzero"] > 0
    directory = RunDirectory(run)
    net = Run(directory, directory.recipe(), Reporter()).load_supernet()
    net.activate(config)
    ids = torch.tensor([[5, 9, 4, 7, 3, 8, 6, 11]])
    with torch.no_grad():
        expected = net.model.eval()(input_ids=ids).logits
        assert torch.allclose(plain.eval()(input_ids=ids).logits, expected, atol=1e-5)


def test_sparsegpt_has_no_order_to_choose_from() -> None:
    with pytest.raises(BadRecipe, match="choices need method wanda or magnitude"):
        make_recipe(
            {
                "model": "m",
                "task": "gsm8k",
                "sparsify": {"method": "sparsegpt", "choices": [0, 0.5]},
            },
            "r",
        )


def test_without_choices_a_base_is_as_sparse_as_published() -> None:
    plain = make_recipe({"model": "m", "task": "gsm8k"}, "r")
    chosen = make_recipe({"model": "m", "task": "gsm8k", "sparsify": {"choices": [0, 0.5]}}, "r")
    assert (plain.sparsify.ratio, chosen.sparsify.ratio) == (0.5, 0.0)
    assert not plain.cuts_base
    assert chosen.cuts_base
