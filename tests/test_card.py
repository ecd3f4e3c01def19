"""Model cards: read by the hub's own library, with the figures of the rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel
from test_models import word_tokenizer
from tiny_models import AUTO, tiny_model, tiny_net

from elastune.build_structure import structure_space
from elastune.errors import BadArtifact
from elastune.export.base_facts import License, base_facts
from elastune.export.card import adapter_card, model_card
from elastune.export.card_facts import CardFacts, run_facts
from elastune.export.formats import FORMATS
from elastune.extract import extract
from elastune.files import write_json
from elastune.models import save_model
from elastune.subnetwork import Subnetwork, extract_model
from elastune.supernet import SuperNetwork

# PEFT's own
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def row(name: str, score: float, *, task: str = "sst2", **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": name,
        "task": task,
        "metric": "accuracy",
        "score": score,
        "stderr": 0.0123,
        "n": 872,
        "other_metrics": [],
        "params": 1000,
        "nonzero": 900,
        "macs": 5000,
        "latency_ms": None,
        "decode_latency_ms": None,
        "seconds": 1.5,
        "config": None,
        "notes": None,
        "options": None,
    }
    return fields | changes


OTHER = {"metric": "matthews", "score": 0.4567, "stderr": None, "n": 872}
ROWS = [
    row("dense", 0.9),
    row("dense", 12.5, task="wiki", metric="perplexity", stderr=0.25, n=50),
    row("best-50", 0.8769, other_metrics=[OTHER]),
    row("best-50", math.inf, task="wiki", metric="perplexity", stderr=math.nan, n=50),
    row("largest", 0.5),
]
RECIPE = """
method: lonas
model: smollm2-135m
seed: 3
task: {name: sst2}
structure: {budgets: [0.75, 0.5]}
train: {epochs: 2.0, max_steps: null, batch_size: 16, learning_rate: 0.0003}
search: {algorithm: nsga2, trials: 40, limits: ["params<=80%"]}
"""


def small(head: str = "causal-lm", family: str = "llama") -> Subnetwork:
    model = tiny_model(family, auto=AUTO[head])
    net = SuperNetwork(model, structure_space(model, ffn=[48, 16]))
    return extract_model(net, net.space.smallest())


def page(sub: Subnetwork, facts: CardFacts | None = None, **options: Any) -> ModelCard:
    """Return the card of a sub-network as the hub's library reads it."""
    format = FORMATS["hf-hetero"]
    origin = options.pop("origin", "example/tiny")
    text = model_card(
        sub, format.make(sub), format, origin=origin, folder="small", facts=facts, **options
    )
    return ModelCard(text)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    write_json(folder / "metrics.json", {"schema": 1, "rows": ROWS})
    return folder


def test_figures_in_the_index_equal_the_rows(run: Path) -> None:
    card = page(small(), run_facts(run, "best-50"), origin=None)
    found = {(e.dataset_name, e.metric_type): e.metric_value for e in card.data.eval_results}
    assert found == {
        ("sst2", "accuracy"): 0.8769,
        ("sst2", "accuracy_stderr"): 0.0123,
        ("sst2", "matthews"): 0.4567,
    }
    assert {e.task_type for e in card.data.eval_results} == {"text-generation"}
    assert all(e.dataset_args == {"n": 872} for e in card.data.eval_results)
    assert card.data.model_name == "small"


def test_the_page_shows_figures_beside_the_baselines_and_how_it_was_made(run: Path) -> None:
    write_json(
        run / "search" / "targets.json",
        {"schema": 1, "subnets": {"tiny": {"config": {}, "limits": ["macs<=1G"]}}},
    )
    text = page(small(), run_facts(run, "best-50")).text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert any("best-50" in line and "87.7 ± 1.2" in line for line in lines)
    assert any("dense (baseline)" in line and "90.0 ± 1.2" in line for line in lines)
    assert not any("largest" in line for line in lines)
    for said in (
        "**budget**: 50 % of the full model",
        "**method**: lonas",
        "**trained on**: sst2",
        "**training**: 2 epochs, batches of 16, learning rate 0.0003",
        "**search**: nsga2, 40 trials",
        "**seed**: 3",
        "**licence of the base**: apache-2.0",
        "huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    ):
        assert said in text
    assert run_facts(run, "best").budget == "params<=80%"
    assert run_facts(run, "tiny").budget == "macs<=1G"
    assert run_facts(run, "largest").budget is None


def test_a_system_without_rows_has_a_card_without_figures(run: Path) -> None:
    facts = run_facts(run, "heuristic")
    assert facts.rows == ()
    card = page(small(), facts)
    assert card.data.eval_results is None
    assert "## Figures" not in card.text
    (run / "metrics.json").unlink()
    assert run_facts(run, "best-50").rows == ()
    with pytest.raises(BadArtifact, match="not a run directory"):
        run_facts(run / "nowhere", "best")
    with pytest.raises(BadArtifact, match="did you mean 'dense'"):
        CardFacts(system="densse", rows=ROWS)


def test_the_front_matter_is_the_hubs() -> None:
    data = page(small()).data
    assert data.library_name == "transformers"
    assert data.base_model == "example/tiny"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["elastune", "hf-hetero"]
    assert data.license is None
    assert page(small("classifier", "bert")).data.pipeline_tag == "text-classification"
    assert page(small("reader", "bert")).data.pipeline_tag == "question-answering"
    assert page(small("base", "bert")).data.pipeline_tag == "feature-extraction"


def test_a_base_without_a_licence_is_said_to_have_none_known() -> None:
    assert "**licence of the base**: unknown: check the base" in page(small()).text
    assert "unknown: check the base" in page(small(), origin="/somewhere/of/mine/model").text
    assert "/somewhere" not in str(page(small(), origin="/somewhere/of/mine/model"))


def test_the_licence_is_read_from_the_bases_card_or_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "base"
    save_model(tiny_model("llama"), word_tokenizer(), folder)
    assert base_facts(folder).license is None
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"license": "mit"}))
    assert base_facts(folder).license == License("mit", source="its config.json")
    front = "license: other\nlicense_name: tiny-1\nlicense_link: https://example.com/l"
    (folder / "README.md").write_text(f"---\n{front}\n---\n# base\n")
    found = base_facts(folder).license
    assert found == License("other", "tiny-1", "https://example.com/l", "its model card")
    data = page(small(), origin=str(folder)).data
    assert (data.license, data.license_name) == ("other", "tiny-1")
    assert data.license_link == "https://example.com/l"
    assert data.base_model is None
    (folder / "README.md").write_text("---\nlicense: [: broken\n---\n")
    assert base_facts(folder).license == License("mit", source="its config.json")
    # A folder of the hub's cache says which model it is; a hub id is looked up there.
    cached = tmp_path / "models--owner--base" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    (cached / "README.md").write_text("---\nlicense: gemma\n---\n")
    assert base_facts(cached).hub_id == "owner/base"
    assert base_facts(cached).license == License("gemma", source="its model card")
    look = "elastune.export.base_facts.try_to_load_from_cache"
    monkeypatch.setattr(look, lambda name, file: str(cached / file))
    assert str(base_facts("owner/base").license) == "gemma"


def test_the_card_of_an_adapter_loads_it_by_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = tiny_net(tiny_model("llama"))
    adapter = extract(net, net.space.heuristic())
    adapter.save(tmp_path / "mine", base="base")
    card = ModelCard(adapter_card(adapter, net.model, folder="mine", origin="base"))
    assert card.data.library_name == "peft"
    n_params = sum(a.numel() + b.numel() for a, b, _ in adapter.weights.values())
    assert f"rank 4, {n_params:,} weights" in card.text
    save_model(net.unwrap(), word_tokenizer(), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(card.text.partition("```python\n")[2].partition("```")[0], names)
    assert isinstance(names["model"], PeftModel)
