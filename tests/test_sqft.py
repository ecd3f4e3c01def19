"""SQFT from recipe to files: zeros and grid kept by training, search, saving and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import cli, save_recipe, save_sums, save_tiny_model, tiny_recipe
from transformers import AutoModelForCausalLM

from elastune.artifacts import RunDirectory
from elastune.config import make_recipe
from elastune.errors import BadRecipe
from elastune.progress import Reporter
from elastune.quantise import load_grids
from elastune.run import Run

pytest.importorskip("compressed_tensors")

IDS = torch.arange(3, 40)[None]
PART = {"max_steps": 3, "learning_rate": 0.1}
MINE: dict[str, Any] = {"method": "sqft", "train": PART, "search": {"trials": 2}}


def finished(folder: Path, **adapter: Any) -> tuple[Path, str]:
    model, data = save_tiny_model(folder / "model"), save_sums(folder / "data")
    more: dict[str, Any] = {"quantise": {"group_size": 16}} if adapter["keep"] == "int4" else {}
    recipe = tiny_recipe(
        model, data, baselines=["sparse", "sparse+lora"], adapter=adapter, **MINE, **more
    )
    result = cli("run", save_recipe(folder / "tiny.yaml", recipe), "--out", folder / "run")
    return folder / "run", " ".join(result.stderr.split())


@pytest.fixture(scope="module", params=["zeros", "int4"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return *finished(tmp_path_factory.mktemp(request.param), keep=request.param), request.param


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def test_every_saved_subnetwork_keeps_what_it_should_and_is_what_trained(run: Any) -> None:
    folder, said, keep = run
    base = load_file(folder / "base" / "model.safetensors")
    weights = [n for n, w in base.items() if ".layers." in n and w.dim() == 2]
    directory = RunDirectory(folder)
    net = Run(directory, directory.recipe(), Reporter()).load_supernet()
    for name in ("largest", "heuristic", "smallest"):
        plain = AutoModelForCausalLM.from_pretrained(folder / "subnets" / name, dtype=torch.float32)
        with net.active(getattr(net.space, name)()):
            torch.testing.assert_close(logits(plain), logits(net.model), atol=1e-5, rtol=1e-5)
        changed = 0
        for weight in weights:
            before, after = base[weight], plain.get_parameter(weight)
            assert bool((after[before == 0] == 0).all()), weight
            changed += int(torch.count_nonzero(before != after))
        assert changed > 0
    zeros = sum(int(torch.count_nonzero(base[n] == 0)) for n in weights if "o_proj" not in n)
    assert f"all {zeros:,} zeros of the base kept" in said
    assert ("on the INT4 grid" in said) is (keep == "int4")


def test_the_report_counts_non_zeros_as_they_are_saved(run: Any) -> None:
    rows = {row["name"]: row for row in json.loads((run[0] / "metrics.json").read_text())["rows"]}
    assert rows["heuristic"]["params"] == rows["sparse"]["params"]
    # A zero weight may become one by training, none may be lost.
    assert 0 <= rows["sparse"]["nonzero"] - rows["heuristic"]["nonzero"] <= 30
    # A LoRA that keeps nothing stays beside its base.
    assert rows["sparse+lora"]["params"] > rows["sparse"]["params"]


def test_exports_of_such_a_run_are_proved(run: Any) -> None:
    folder, _, keep = run
    formats = "merged-sparse" + (",compressed-tensors" if keep == "int4" else "")
    made = json.loads(cli("export", folder, "-f", formats, "--json").stdout)
    assert made["failed"] == []
    folders = [row["folder"] for row in made["exports"]]
    rows = json.loads(cli("check", *folders, "--json").stdout)["checks"]
    assert all(row["ok"] for row in rows)
    assert rows[0]["zeros"] > 6000
    if keep == "zeros":
        refused = cli("export", folder, "-f", "compressed-tensors", code=2)
        assert "holds weights on an INT4 grid" in refused.stderr
        return
    grids = load_grids(folder / "base" / "int4_grid.safetensors")
    state = load_file(Path(folders[1]) / "model.safetensors")
    assert {n.removesuffix(".weight_packed") for n in state if n.endswith("_packed")} == set(grids)
    plain = AutoModelForCausalLM.from_pretrained(folders[1])
    for name, grid in grids.items():
        packed = state[f"{name}.weight_packed"]
        codes = torch.stack([packed >> (4 * place) & 15 for place in range(8)], -1).flatten(1) - 8
        zero_point, scale = (
            part.repeat_interleave(16, 1) for part in (grid.zero_point, grid.scale)
        )
        # By hand, from the bits of the file: the weights that transformers unpacks.
        assert torch.equal((codes - zero_point) * scale, plain.get_parameter(f"{name}.weight"))


def refused(**more: Any) -> str:
    smallest = {"model": "smollm2-135m", "task": "gsm8k", "method": "sqft"}
    with pytest.raises(BadRecipe) as caught:
        make_recipe(smallest | more, "my.yaml")
    return str(caught.value)


def test_recipes_that_cannot_keep_are_refused() -> None:
    assert "adapter.dropout must be 0" in refused(adapter={"dropout": 0.1})
    assert "is of method: sqft" in refused(method="shears", adapter={"keep": "zeros"})
    assert "a quantised base needs adapter.keep=int4" in refused(quantise={})
    assert "train.update must be adapter" in refused(train={"update": "full"})
    assert "leave sparsify.choices out" in refused(sparsify={"choices": [0.0, 0.5]})
    assert "method shears has no section 'quantise'" in refused(method="shears", quantise={})
