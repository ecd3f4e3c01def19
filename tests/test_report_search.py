"""The search in the report: what is drawn and said of it, against independent sources."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from test_report import metric_row, metrics_of, read_page, write_json, write_rows

from elastune.report import load_run, search_table, write_report
from elastune.report.search_progress import best_so_far, volumes_so_far
from elastune.report.trials import Searched, searched

LAYERS, CHOICES = 3, {"heads": (4, 2, 1), "ffn": (64, 32, 16)}
ODD = '</script><img src=x onerror="document.title=1">&'
DIMS = [(f"layers.{n}.{kind}", kind) for n in range(LAYERS) for kind in CHOICES]
FAILED, DROPPED = 5, 9


def make_trials() -> list[dict[str, Any]]:
    """30 trials whose error falls with their MACs; one fails, one is dropped by the race."""
    rng, trials = random.Random(0), []
    for number in range(30):
        config = {name: rng.choice(CHOICES[kind]) for name, kind in DIMS}
        config[f"{ODD}.rank"] = 8
        macs = sum(10e6 * config[name] / CHOICES[kind][0] for name, kind in DIMS)
        error: float | None = 0.4 - macs / 3e8 + rng.gauss(0, 0.02)
        measured = {"params": macs / 10, "latency_ms": macs / 1e7 + rng.random()}
        error = None if number == FAILED else 0.01 if number == DROPPED else error
        trial = {"number": number, "config": config, "values": {"error": error, "macs": macs}}
        work = {"dropped": number == DROPPED, "equivalents": 0.25 if number == DROPPED else 1.0}
        trials.append(trial | {"measured": measured} | work)
    return trials


def naive_front(trials: list[dict[str, Any]], cost: str) -> set[int]:
    """Numbers of what no other whole trial beats, by comparing all pairs."""
    whole = [t for t in trials if t["number"] not in (FAILED, DROPPED)]
    known = {
        t["number"]: (t["values"]["error"], (t["measured"] | t["values"])[cost]) for t in whole
    }
    return {
        one
        for one, ours in known.items()
        if not any(
            theirs != ours and theirs[0] <= ours[0] and theirs[1] <= ours[1]
            for theirs in known.values()
        )
    }


def make_searched(run: Path, best_score: float = 0.90) -> Path:
    """A run after its search, whose best sub-network is saved as an adapter."""
    run.mkdir(parents=True, exist_ok=True)
    recipe = {"method": "lonas", "model": "acme/tiny", "task": "gsm8k"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    dims = [
        {"name": name, "kind": kind, "choices": list(CHOICES[kind]), "modules": [name]}
        for name, kind in DIMS
    ]
    dims.append({"name": f"{ODD}.rank", "kind": "rank", "choices": [8, 4], "modules": ["m"]})
    write_json(run / "space.json", {"schema": 1, "dims": dims})
    trials = make_trials()
    front = sorted(naive_front(trials, "macs"))
    best = min(front, key=lambda number: trials[number]["values"]["error"])
    about = {
        "algorithm": f"nsga2 {ODD}",
        "seconds": 12.0,
        "equivalents": 29.25,
        "examples": 500,
        "limits": ["macs <= 50 M"],
        "bounds": {"macs": [None, 50e6]},
        "additivity": {"pearson": 0.95, "spearman": 0.93, "slope": 0.71, "n": 28},
    }
    found = {"schema": 1, "trials": trials, "pareto": front, "best": best, "about": about}
    write_json(run / "search/trials.json", found)
    chosen = trials[best]["config"]
    middle = {name: CHOICES[kind][1] for name, kind in DIMS} | {f"{ODD}.rank": 4}
    rows = [
        metric_row("best", best_score, config=chosen),
        metric_row("heuristic", 0.895, config=middle),
        metric_row(f"front-{front[0]}", 0.5, config=trials[front[0]]["config"]),
        metric_row("dense", 0.3),
    ]
    write_json(run / "metrics.json", metrics_of(*rows))
    write_json(run / "base/config.json", {"architectures": ["LlamaForCausalLM"]})
    write_json(run / "subnets/best/adapter_config.json", {"peft_type": "LORA"})
    return run


def change_search(run: Path, *dropped: str, **changes: Any) -> None:
    path = run / "search/trials.json"
    found = json.loads(path.read_text()) | changes
    write_json(path, {key: value for key, value in found.items() if key not in dropped})


def found_in(run: Path) -> Searched:
    found = searched(load_run(run), [])
    assert found is not None
    return found


def data_of(run: Path) -> dict[str, Any]:
    page = write_report(run).read_text(encoding="utf-8")
    match = re.search(r'<script type="application/json" id="trials">(.*?)</script>', page, re.S)
    assert match is not None
    return json.loads(match[1])


def test_hypervolume_after_each_trial_equals_moocore(tmp_path: Path) -> None:
    moocore = pytest.importorskip("moocore", reason="moocore is not installed")
    found = found_in(make_searched(tmp_path / "run"))
    drawn = volumes_so_far(found)
    assert drawn is not None
    assert len(drawn) == len(found.trials)
    ends = np.array([[p.quality, p.costs["macs"]] for p in found.front], dtype=float)
    low, span = ends.min(axis=0), np.ptp(ends, axis=0)
    seen: list[np.ndarray] = []
    for point, volume in zip(found.trials, drawn, strict=True):
        if point.number not in (FAILED, DROPPED):
            seen.append((np.array([point.quality, point.costs["macs"]]) - low) / (1.1 * span))
        expected = moocore.hypervolume(np.array(seen), ref=[1.0, 1.0])
        assert volume == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("cost", ["macs", "latency_ms"])
def test_front_by_any_cost_equals_naive_domination(tmp_path: Path, cost: str) -> None:
    found = found_in(make_searched(tmp_path / "run"))
    members = found.front_by(cost)
    assert {point.number for point in members} == naive_front(make_trials(), cost)
    costs = [point.costs[cost] for point in members]
    assert costs == sorted(costs)


def test_failed_and_dropped_trials_are_marked_and_never_the_best(tmp_path: Path) -> None:
    run = make_searched(tmp_path / "run")
    states = {row[0]: row[7] for row in data_of(run)["points"]}
    assert states[f"trial {FAILED}"] == "failed"
    assert states[f"trial {DROPPED}"] == "dropped"
    assert list(states.values()).count("front") == len(naive_front(make_trials(), "macs"))
    text = read_page(run).text
    assert "dropped by the race, estimate" in text
    assert "The race dropped 1 of 30 trials" in text
    whole = [t["values"]["error"] for t in make_trials() if t["number"] not in (FAILED, DROPPED)]
    assert best_so_far(found_in(run))[-1] == min(whole) > 0.01


def test_names_of_a_run_are_text_and_never_markup(tmp_path: Path) -> None:
    run = make_searched(tmp_path / "run")
    reader = read_page(run)
    assert "img" not in reader.tags
    assert f"Algorithm: nsga2 {ODD}" in reader.text
    assert data_of(run)["dims"][-1][0] == f"{ODD}.rank"


def test_every_trial_has_a_mark_that_tells_its_configuration_without_script(tmp_path: Path) -> None:
    page = write_report(make_searched(tmp_path / "run")).read_text(encoding="utf-8")
    marks = re.findall(r"<(?:circle|path)[^>]*data-point[^>]*><title>([^<]*)</title>", page)
    assert {re.match(r"trial \d+", mark)[0] for mark in marks} == {  # type: ignore[index]
        f"trial {number}" for number in range(30)
    }
    assert all("ffn" in mark and "heads" in mark for mark in marks)


def test_trials_of_older_runs_are_drawn_and_nothing_is_claimed_of_them(tmp_path: Path) -> None:
    run = make_searched(tmp_path / "run")
    bare = [{key: t[key] for key in ("number", "config", "values")} for t in make_trials()]
    change_search(run, "about", trials=[t for t in bare if t["number"] not in (FAILED, DROPPED)])
    data, text = data_of(run), read_page(run).text
    assert [name for name, _ in data["costs"]] == ["macs"]
    assert len(data["points"]) == 28
    assert not any(word in text for word in ("race", "whole evaluations", "add up", "Limits:"))


def test_without_a_search_there_is_no_figure_of_one(tmp_path: Path) -> None:
    run = make_searched(tmp_path / "run")
    (run / "search/trials.json").unlink()
    page = write_report(run).read_text(encoding="utf-8")
    assert 'id="front"' not in page
    assert 'id="trials"' not in page


@pytest.mark.parametrize(
    ("best_score", "word", "no_gain"),
    [(0.90, "within noise of heuristic", True), (0.99, "better than heuristic", False)],
)
def test_best_is_held_against_the_heuristic(
    tmp_path: Path, best_score: float, word: str, no_gain: bool
) -> None:
    text = read_page(make_searched(tmp_path / "run", best_score)).text
    assert f"the best sub-network is {word}" in text
    assert ("shows no gain in score over choosing without a search" in text) is no_gain


def test_paired_answers_decide_what_standard_errors_cannot(tmp_path: Path) -> None:
    run = make_searched(tmp_path / "run", 0.92)
    for name, right in (("best", 368), ("heuristic", 358)):
        rows = [
            {"index": n, "prompt": "1?", "text": "1", "extracted": "1", "gold": "1"}
            | {"correct": n < right}
            for n in range(400)
        ]
        write_rows(run / f"predictions/{name}.gsm8k.jsonl", rows)
    assert "the best sub-network is better than heuristic" in read_page(run).text


def test_work_limits_and_additivity_are_told_with_their_figures(tmp_path: Path) -> None:
    run = make_searched(tmp_path / "run")
    text = read_page(run).text
    assert "30 trials took the work of 29.2 whole evaluations, 3% less" in text
    assert (
        "Single-choice losses add up: Pearson 0.950, Spearman 0.930, slope 0.71, 28 trials" in text
    )
    kept = sum(t["values"]["macs"] <= 50e6 for t in make_trials() if t["number"] != FAILED)
    assert f"Limits: macs <= 50 M. {kept} of 30 trials keep them." in text
    change_search(run, about={"additivity": {"pearson": 0.2}})
    assert "Single-choice losses do not add up: Pearson 0.200" in read_page(run).text


def test_terminal_table_is_the_front_cheapest_first(tmp_path: Path) -> None:
    run = make_searched(tmp_path / "run")
    table = search_table(json.loads((run / "search/trials.json").read_text()))
    screen = io.StringIO()
    Console(file=screen, width=160).print(table)
    shown = [int(n) for n in re.findall(r"^ *(\d+) +0\.\d{4}", screen.getvalue(), re.M)]
    trials = make_trials()
    front = naive_front(trials, "macs")
    assert shown == sorted(front, key=lambda number: trials[number]["values"]["macs"])
