"""The report: what it shows of a run, what it says of noise, and what it refuses."""

from __future__ import annotations

import html.parser
import io
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from elastune.errors import BadArtifact
from elastune.report import load_run, markdown_table, metrics_table, sparsity_table, write_report
from elastune.report.layers import config_text, short_labels, split_name, uniform_text
from elastune.report.results import AVERAGE, Column, systems, with_average
from elastune.report.svg import nice_ticks, tick_texts
from elastune.report.verdicts import verdicts

VOID = {"meta", "link", "br", "hr", "img", "input"}
LAYERS, RANKS = 6, (32, 24, 16)
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
ROLES = ("qkv", "up", "down")
DIMS = [f"layers.{layer}.{role}" for layer in range(LAYERS) for role in ROLES]


def metric_row(name: str, score: float, **fields: Any) -> dict[str, Any]:
    """One row of metrics.json; accuracy on gsm8k of 400 examples unless told otherwise."""
    row = {
        "name": name,
        "task": "gsm8k",
        "metric": "accuracy",
        "score": score,
        "stderr": 0.02,
        "n": 400,
        "params": 134_515_008,
        "nonzero": 134_515_008 if name.startswith("dense") else 81_000_000,
        "macs": 2_300_000_000,
        "latency_ms": None,
        "seconds": 12.5,
        "config": None,
    }
    return row | fields


def metrics_of(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"schema": 1, "rows": list(rows), "environment": {"machine": "2 cores"}}


def some_metrics() -> dict[str, Any]:
    mixed = {dim: RANKS[place % 3] for place, dim in enumerate(DIMS)}
    return metrics_of(
        metric_row("best", 0.361, config=mixed, nonzero=82_000_000),
        metric_row("dense", 0.101),
        metric_row("sparse+lora", 0.33),
        metric_row("heuristic", 0.345, config=dict.fromkeys(DIMS, 24)),
        metric_row("smallest", 0.25, config=dict.fromkeys(DIMS, 16), nonzero=80_000_000),
        metric_row("dense+lora", 0.375),
        metric_row("sparse", 0.02),
    )


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(run: Path) -> Path:
    """A whole run directory as the stages leave it."""
    rng = random.Random(0)
    run.mkdir(parents=True, exist_ok=True)
    recipe = {"method": "shears", "model": "acme/tiny-135m", "task": "gsm8k", "seed": 7}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    stage = {"status": "done", "input_hash": "ab", "seconds": 12.3}
    stages = {
        "sparsify": stage | {"finished": "2026-01-02T03:04:05"},
        "train": {"status": "failed", "input_hash": "cd", "seconds": 754.0, "finished": None},
    }
    manifest = {"schema": 1, "stages": stages, "versions": {"torch": "2.13.0"}}
    write_json(run / "manifest.json", manifest)
    write_json(run / "metrics.json", some_metrics())
    tensors = {
        f"model.layers.{layer}.{module}.weight": {
            "shape": [64, 64],
            "zeros": 2048,
            "sparsity": 0.5,
        }
        for layer in range(LAYERS)
        for module in MODULES
    }
    zeros = 2048 * len(tensors)
    total = {"zeros": zeros, "weights": 2 * zeros, "sparsity": 0.5}
    sparsity = {"schema": 1, "method": "wanda", "ratio": 0.5, "pattern": None}
    write_json(run / "base/sparsity.json", sparsity | {"tensors": tensors, "total": total})
    write_json(run / "base/config.json", {"architectures": ["LlamaForCausalLM"]})
    dims = [{"name": d, "kind": "rank", "choices": list(RANKS), "modules": [d]} for d in DIMS]
    write_json(run / "space.json", {"schema": 1, "dims": dims})
    for folder in ("supernet", "baselines/dense-lora", "baselines/sparse-lora"):
        steps = [
            {
                "step": step,
                "loss": 1 + 2 * math.exp(-step / 30) + rng.gauss(0, 0.1),
                "lr": 1e-4,
                "tokens": 1000,
                "seconds": 1.0,
                "configs": [[rng.randrange(3) for _ in DIMS]],
            }
            for step in range(1, 121)
        ]
        write_rows(run / folder / "train.jsonl", steps)
    trials = []
    for number in range(30):
        config = {dim: rng.choice(RANKS) for dim in DIMS}
        params = sum(config.values()) * 1000
        loss = 1.5 - params / 1e6 + rng.gauss(0, 0.02)
        trials.append(
            {"number": number, "config": config, "values": {"loss": loss, "params": params}}
        )
    search = {"schema": 1, "trials": trials, "pareto": [3, 5, 8], "best": 5}
    write_json(run / "search/trials.json", search)
    answers = [
        {
            "index": index,
            "prompt": f"How many apples are {index} and one?",
            "text": f"The answer is {index + 1}.",
            "extracted": str(index + 1),
            "gold": str(index + 1),
            "correct": index % 2 == 0,
        }
        for index in range(10)
    ]
    write_rows(run / "predictions/best.gsm8k.jsonl", answers)
    write_json(run / "subnets/best/adapter_config.json", {"peft_type": "LORA"})
    return run


class Reader(html.parser.HTMLParser):
    """Collects text, references and titles of a page, and checks that its tags balance."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.cells: list[list[str]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for key, value in attrs if key in ("src", "href", "action")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.cells[-1][-1] += data

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def read_page(run: Path) -> Reader:
    reader = Reader()
    reader.feed(write_report(run).read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def test_a_whole_run_gives_a_balanced_page_with_every_part(tmp_path: Path) -> None:
    page = read_page(make_run(tmp_path / "run"))
    for part in (
        "Results",
        "Search and sub-networks",
        "Training loss",
        "Choices drawn in training",
        "Sparsity by layer",
        "Predictions",
        "Load the result",
        "Time by stage",
    ):
        assert part in page.text
    assert "Not in this report" not in page.text
    assert "shears · acme/tiny-135m" in page.text
    assert "50.0 % (wanda, unstructured)" in page.text
    assert "2026-01-02 03:04" in page.text
    assert "5 right of 10" in page.text
    assert "not a speed-up" in page.text


def test_main_table_shows_the_numbers_in_order_and_bolds_the_best_subnet(tmp_path: Path) -> None:
    write_json(tmp_path / "metrics.json", some_metrics())
    page = read_page(tmp_path)
    rows = [cells for cells in page.cells if len(cells) > 1][:8]
    assert rows[0][:2] == ["system", "gsm8kaccuracy % ↑n = 400"]
    order = ["dense", "dense+lora", "sparse", "sparse+lora", "heuristic", "smallest", "best"]
    assert [cells[0] for cells in rows[1:]] == order
    # 134,515,008 / 82,000,000 = 1.640; 2.3e9 MACs; 134.5 M parameters
    assert rows[-1][1:] == ["36.1 ± 2.0", "134.5", "82.0", f"1.64{chr(215)}", "2.30", "12.5"]
    written = (tmp_path / "report.html").read_text()
    assert "<b>36.1</b>" in written
    assert "<b>37.5</b>" not in written  # dense+lora is better, but a baseline


def test_metrics_alone_make_a_report_that_names_what_is_missing(tmp_path: Path) -> None:
    write_json(tmp_path / "metrics.json", some_metrics())
    text = read_page(tmp_path).text
    assert "Not in this report" in text
    for name in ("recipe.yaml", "space.json", "search/trials.json", "supernet/train.jsonl"):
        assert name in text


@pytest.mark.parametrize(
    "lost",
    ["metrics.json", "recipe.yaml", "manifest.json", "space.json", "search", "base", "supernet"],
)
def test_any_part_may_be_missing(tmp_path: Path, lost: str) -> None:
    run = make_run(tmp_path / "run")
    (run / lost).rename(tmp_path / "away")
    assert lost in read_page(run).text


def test_user_text_is_escaped_everywhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    evil = "<script>alert('x')</script>\"&"
    recipe = {"method": evil, "model": evil, "task": evil, evil: evil, "seed": evil}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    metrics = some_metrics()
    for row in metrics["rows"]:
        row["task"] = evil
        row["config"] = {evil: evil} if row["name"] == "best" else row["config"]
    metrics["rows"].append(metric_row(evil, 0.5, task=evil))
    metrics["environment"] = {evil: evil}
    write_json(run / "metrics.json", metrics)
    answer = {"prompt": evil, "text": evil, "gold": evil, "extracted": evil, "correct": False}
    write_rows(run / "predictions/best.gsm8k.jsonl", [answer])
    page = read_page(run)
    assert page.tags.count("script") == 2  # the page's own and the data of the trials
    assert "alert('x')" in page.text


def test_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = read_page(run)
    written = (run / "report.html").read_text()
    assert page.references == ["data:,"]
    assert not re.search(r"https?:|//[a-z]|@import|url\(", written)


def test_report_is_the_same_for_the_same_files_and_leaves_nothing_behind(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = {path.name for path in run.iterdir()}
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert {path.name for path in run.iterdir()} - before == {"report.html"}


@pytest.mark.parametrize(
    ("score", "stderr", "word"),
    [
        (0.36, 0.02, "within noise"),  # 0.03 < 2 * sqrt(2) * 0.02 = 0.0566
        (0.40, 0.02, "better"),  # 0.07 > 0.0566
        (0.26, 0.02, "worse"),
        (0.40, None, "unknown"),
    ],
)
def test_a_difference_counts_beyond_twice_its_standard_error(
    score: float, stderr: float | None, word: str
) -> None:
    metrics = metrics_of(metric_row("sparse+lora", 0.33), metric_row("best", score, stderr=stderr))
    (verdict,) = verdicts(systems(metrics))
    assert (verdict.name, verdict.reference, verdict.word) == ("best", "sparse+lora", word)


def test_lower_perplexity_is_better() -> None:
    fields = {"task": "wikitext2", "metric": "perplexity", "stderr": 0.1}
    metrics = metrics_of(
        metric_row("sparse+lora", 20.0, **fields),
        metric_row("best", 19.0, **fields),
        metric_row("smallest", 21.0, **fields),
    )
    assert [v.word for v in verdicts(systems(metrics))] == ["worse", "better"]
    assert "**19.00 ± 0.10**" in markdown_table(metrics)


def test_page_says_within_noise_and_warns_of_few_examples(tmp_path: Path) -> None:
    rows = (metric_row("sparse+lora", 0.33), metric_row("best", 0.36))
    write_json(tmp_path / "metrics.json", metrics_of(*rows))
    text = read_page(tmp_path).text
    assert "within noise +3.0 ± 5.7" in text
    assert "Different from sparse+lora beyond noise?" in text
    assert "means little" not in text
    few = (row | {"n": 8, "stderr": 0.17} for row in rows)
    write_json(tmp_path / "metrics.json", metrics_of(*few))
    assert "as few as 8 scored examples" in read_page(tmp_path).text


def test_without_a_lora_baseline_the_page_concludes_nothing(tmp_path: Path) -> None:
    metrics = metrics_of(metric_row("dense", 0.1), metric_row("best", 0.36))
    write_json(tmp_path / "metrics.json", metrics)
    assert "cannot be told from this run" in read_page(tmp_path).text


def test_average_is_over_accuracy_tasks_and_only_where_all_are_there() -> None:
    metrics = metrics_of(
        metric_row("best", 0.30, stderr=0.03),
        metric_row("best", 0.50, task="svamp", stderr=0.04),
        metric_row("best", 15.0, task="wikitext2", metric="perplexity"),
        metric_row("dense", 0.20),
    )
    dense, best = with_average(systems(metrics))
    assert best.values[AVERAGE].score == pytest.approx(0.40)
    assert best.values[AVERAGE].stderr == pytest.approx(0.05 / 2)  # sqrt(.03^2 + .04^2) / 2
    assert AVERAGE not in dense.values
    assert Column("wikitext2", "perplexity") in best.values


def test_terminal_and_markdown_tables_show_the_same_numbers() -> None:
    metrics = some_metrics()
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(metrics_table(metrics))
    shown = console.export_text()
    written = markdown_table(metrics)
    for number in ("36.1 ± 2.0", "33.0 ± 2.0", "134.5", "82.0", "2.30"):
        assert number in shown
        assert number in written
    assert "| sparse+lora (baseline) |" in written
    assert "**36.1 ± 2.0**" in written
    assert len({line.count("|") for line in written.splitlines()}) == 1


def test_a_tie_of_all_subnets_makes_none_bold() -> None:
    tie = metrics_of(*(metric_row(name, 0.1) for name in ("largest", "heuristic", "best")))
    assert "**" not in markdown_table(tie)


def test_parts_of_a_stage_are_added_and_unfinished_ones_said(tmp_path: Path) -> None:
    write_json(tmp_path / "metrics.json", some_metrics())
    row = {"input_hash": "a", "finished": "2026-01-02T03:04:05"}
    stages = {
        "extract/best": row | {"status": "done", "seconds": 40.0},
        "extract/heuristic": row | {"status": "done", "seconds": 35.0},
        "search": row | {"status": "started", "seconds": 5.0, "finished": "2027-01-01T00:00:00"},
    }
    write_json(tmp_path / "manifest.json", {"schema": 1, "stages": stages})
    text = read_page(tmp_path).text
    assert "1 min 15 s" in text
    assert "started 5.0 s" in text
    assert "2027" not in text


def test_sparsity_table_adds_up_by_role(tmp_path: Path) -> None:
    sparsity = load_run(make_run(tmp_path / "run")).sparsity
    assert sparsity is not None
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(sparsity_table(sparsity))
    shown = console.export_text()
    row = next(line for line in shown.splitlines() if "up_proj" in line)
    assert re.findall(r"[\d,.]+", row)[:4] == ["6", "24,576", "12,288", "50.0"]
    assert "98,304" in shown  # 24 tensors of 64 x 64


def test_measured_latency_gets_a_column_only_when_there_is_one() -> None:
    metrics = some_metrics()
    assert "latency" not in markdown_table(metrics)
    metrics["rows"][0]["latency_ms"] = 41.26
    assert "41.3" in markdown_table(metrics)
    assert "ms a token" not in markdown_table(metrics)
    metrics["rows"][0]["decode_latency_ms"] = 7.81
    assert "7.8" in markdown_table(metrics)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("metrics.json", "{", "not JSON"),
        ("metrics.json", "[]", "expected an object"),
        ("metrics.json", '{"schema": 2, "rows": []}', "'schema' is 2"),
        ("metrics.json", '{"schema": 1, "rows": [{"name": "dense"}]}', "'task' is missing"),
        ("metrics.json", '{"schema": 1}', "'rows' is missing"),
        ("space.json", '{"schema": 1, "dims": [{"name": "a"}]}', "'kind' is missing"),
        ("search/trials.json", '{"schema": 1, "trials": [{}]}', "'number' is missing"),
        ("base/sparsity.json", '{"schema": 1, "tensors": {"a": {}}, "total": {}}', "'shape'"),
        ("manifest.json", '{"schema": 1, "stages": {"train": {}}}', "'status' is missing"),
        ("supernet/train.jsonl", '{"step": 1}\n', "'loss' is missing"),
        ("supernet/train.jsonl", 'x\n{"step": 1, "loss": 2}\n', "line 1 is not JSON"),
        ("predictions/best.gsm8k.jsonl", '{"prompt": ""}\n', "'text' is missing"),
        ("recipe.yaml", "a: [", "not YAML"),
        ("recipe.yaml", "- a", "expected a mapping"),
    ],
)
def test_a_corrupt_or_foreign_file_is_named(
    tmp_path: Path, file: str, content: str, told: str
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    with pytest.raises(BadArtifact) as error:
        write_report(tmp_path)
    assert str(path) in str(error.value)
    assert told in str(error.value)
    assert error.value.try_


def test_impossible_rows_are_refused() -> None:
    with pytest.raises(BadArtifact, match=r"0\.\.1, got 36\.1"):
        systems(metrics_of(metric_row("best", 36.1)))
    with pytest.raises(BadArtifact, match="a second row for best / gsm8k / accuracy"):
        systems(metrics_of(metric_row("best", 0.1), metric_row("best", 0.2)))
    with pytest.raises(BadArtifact, match="'params' must be int, got str"):
        systems(metrics_of(metric_row("best", 0.1, params="many")))


def test_no_run_and_an_empty_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArtifact, match="no run directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(BadArtifact, match="none of the files of a run"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_training_log_of_another_space_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    dim = {"name": "layers.0.qkv", "kind": "rank", "choices": [8, 4], "modules": []}
    write_json(run / "space.json", {"schema": 1, "dims": [dim]})
    with pytest.raises(BadArtifact, match=r"18 dims, but .* has 1"):
        write_report(run)


def test_a_run_that_goes_on_can_be_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "supernet/train.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    assert load_run(tmp_path).curves["supernet"].steps == (1, 2)
    assert "1 steps have no finite loss" in read_page(tmp_path).text


def test_a_resumed_step_counts_once_in_the_curve(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": loss} for step, loss in ((1, 3.0), (2, 9.0), (2, 2.0))]
    write_rows(tmp_path / "supernet/train.jsonl", rows)
    assert load_run(tmp_path).curves["supernet"].losses == (3.0, 2.0)


def test_draws_are_counted_by_dim_and_choice(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": 1.0, "configs": [[0, s % 2], [1, 1]]} for s in range(4)]
    write_rows(tmp_path / "supernet/train.jsonl", rows)
    draws = load_run(tmp_path).curves["supernet"].draws
    assert [dict(counter) for counter in draws] == [{0: 4, 1: 4}, {0: 2, 1: 6}]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (80.2, 134.9, [90, 100, 110, 120, 130]),
        (-0.35, 0.25, [-0.3, -0.2, -0.1, 0, 0.1, 0.2]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_tick_texts_share_their_decimals() -> None:
    assert tick_texts([0, 0.05, 0.1]) == ["0.00", "0.05", "0.10"]
    assert tick_texts([-10, 0, 10]) == [f"{chr(0x2212)}10", "0", "10"]


def test_names_split_into_layer_and_role() -> None:
    assert split_name("model.layers.12.self_attn.q_proj.weight") == (12, "self_attn.q_proj")
    assert split_name("lm_head.weight") == (None, "lm_head")
    labels = short_labels(["attention.output.dense", "output.dense", "attention.self.query"])
    assert labels["attention.self.query"] == "query"
    assert len(set(labels.values())) == 3


def test_a_config_is_spelt_shortly() -> None:
    config = {f"layers.{layer}.qkv": 24 if layer < 10 else 16 for layer in range(11)}
    assert config_text(config) == "qkv: 24 x10 16"
    assert uniform_text(config) is None
    assert uniform_text(dict.fromkeys(DIMS, 24)) == "24 everywhere"
