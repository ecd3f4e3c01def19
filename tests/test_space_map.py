"""The picture of a generated space: a cell for each layer and point, and what is marked absent."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_report import read_page

from elastune.errors import BadArtifact
from elastune.generated import Candidate, GeneratedSpace, generated
from elastune.report import load_run
from elastune.report.plots import opacity_of
from elastune.report.quantities import DASH, TIMES
from elastune.report.space_map import space_figures
from elastune.space import ElasticDim, SubnetConfig

N = 5  # blocks; block 3 is in no point, block 1 not in the smallest
HEADS, FFN = 4, 40


def three_points() -> GeneratedSpace:
    dims = []
    for i in range(N):
        block = f"model.layers.{i}"
        dims.append(ElasticDim(f"layers.{i}.heads", "heads", (HEADS,), (f"{block}.o",)))
        dims.append(ElasticDim(f"layers.{i}.ffn", "ffn", (FFN,), (f"{block}.down",)))
        dims.append(ElasticDim(f"layers.{i}.block", "depth", (1, 0), (block,)))
    full = {dim.name: dim.choices[0] for dim in dims}
    large = {**full, "layers.3.block": 0}
    middle = {**large, "layers.0.ffn": 20, "layers.4.ffn": 10, "layers.2.heads": 0}
    small = {**middle, "layers.0.ffn": 10, "layers.4.ffn": 0, "layers.1.block": 0}
    candidates = [
        Candidate(0.25, 0.2512, SubnetConfig(small), 0.7),
        Candidate(0.5, 0.4987, SubnetConfig(middle), 0.2),
        Candidate(0.8, 0.8, SubnetConfig(large), 0.1),
    ]
    made_from = {"generator": "importance", "cost": "macs", "full_sizes": full}
    return generated(dims, candidates, made_from, full)


def run_with(folder: Path, made: GeneratedSpace, change: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text("method: eftnas\n")
    (folder / "generated.json").write_text(json.dumps(made.to_dict() | (change or {})))
    return folder


def cells(svg: str) -> dict[tuple[str, int], tuple[str, float]]:
    """(target, layer) -> what the tooltip says is kept, and the opacity of the cell."""
    found = {}
    for opacity, hint in re.findall(r'fill-opacity="([\d.]+)"[^>]*><title>([^<]*)', svg):
        match = re.fullmatch(r"(\S+) % \(.*\), layer (\d+) \w+: (.*)", hint)
        assert match is not None, hint
        found[match[1], int(match[2])] = (match[3], float(opacity))
    return found


def test_every_cell_says_what_a_point_keeps_of_a_layer_of_the_full_model(tmp_path: Path) -> None:
    made = three_points()
    assert made.removed_blocks == (3,)
    assert {dim.name for dim in made.space.dims} == {
        *("layers.0.ffn", "layers.1.block", "layers.2.heads", "layers.3.ffn")
    }
    heads, ffn = space_figures(load_run(run_with(tmp_path / "run", made)))
    assert heads is not None
    assert ffn is not None
    out = ("the layer is left out", 0.0)

    def kept(size: int, full: int) -> tuple[str, float]:
        opacity = round(opacity_of(size / full), 2) if size else 0.0
        return f"{size} of {full}", opacity

    expected = {
        "80": [40, 40, 40, None, 40],
        "50": [20, 40, 40, None, 10],
        "25": [10, None, 40, None, 0],
    }
    found = cells(ffn.svg)
    assert list(dict.fromkeys(target for target, _ in found)) == ["80", "50", "25"]
    for target, sizes in expected.items():
        for layer, size in enumerate(sizes):
            assert found[target, layer] == (out if size is None else kept(size, FFN))
    assert [cells(heads.svg)[t, 2] for t in ("80", "50", "25")] == [
        kept(4, HEADS),
        *[kept(0, HEADS)] * 2,
    ]


def test_absent_halves_have_a_dash_and_blocks_left_out_a_cross(tmp_path: Path) -> None:
    heads, ffn = space_figures(load_run(run_with(tmp_path / "run", three_points())))
    assert heads is not None
    assert ffn is not None
    assert ffn.svg.count('<line class="tick"') == 1 + 2 * 4
    assert heads.svg.count('<line class="tick"') == 2 + 2 * 4
    words = [words for _, _, words in ffn.legend]
    assert words == [
        "100 %",
        "50 %",
        "5 %",
        "of all",
        f"{DASH} half absent",
        f"{TIMES} layer left out",
    ]
    assert "3 points by MACs of the blocks" in ffn.note
    assert "Layers that no point has: 3." in ffn.note


def test_the_page_names_the_points_and_stays_without_a_generated_space(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", three_points())
    text = read_page(run).text
    assert "Generated space: heads" in text
    assert "Generated space: feed-forward channels" in text
    for label in ("80 % (80.0)", "50 % (49.9)", "25 % (25.1)"):
        assert Counter(re.findall(re.escape(label), text))[label] >= 2
    (run / "generated.json").unlink()
    assert space_figures(load_run(run)) == []
    assert "Generated space" not in read_page(run).text


def test_a_half_that_no_point_cuts_is_told_in_words(tmp_path: Path) -> None:
    full = {"layers.0.heads": 4, "layers.0.ffn": 40}
    dims = [
        ElasticDim("layers.0.heads", "heads", (4,), ("m.0.o",)),
        ElasticDim("layers.0.ffn", "ffn", (40,), ("m.0.down",)),
    ]
    small = Candidate(0.5, 0.5, SubnetConfig({**full, "layers.0.ffn": 20}))
    made = generated(dims, [small], {"cost": "params", "full_sizes": full}, full)
    heads, ffn = space_figures(load_run(run_with(tmp_path / "run", made)))
    assert heads is not None
    assert ffn is not None
    assert (heads.svg, heads.note) == ("", "Every point keeps all heads of every layer.")
    assert "parameters of the blocks" in ffn.note


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 9}, "schema"),
        ({"points": None}, "field 'points'"),
        ({"points": [{"target": 0.5, "config": {}}]}, "point 0: field 'cost' is missing"),
        ({"made_from": {}}, "made_from: field 'full_sizes' is missing"),
        ({"made_from": {"full_sizes": {"layers.0.ffn": "many"}}}, "full_sizes"),
        ({"removed_blocks": ["one"]}, "removed_blocks"),
        ({"points": [{"target": 0.5, "cost": 0.5, "config": {"a": None}}]}, "config"),
    ],
)
def test_a_damaged_file_names_its_field(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(BadArtifact, match=words):
        load_run(run_with(tmp_path / "run", three_points(), change))
