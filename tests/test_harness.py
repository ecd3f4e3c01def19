"""lm-eval's tasks on live models, against lm-eval's own way and this library's predictors."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from tiny_llama import tiny_llama, tiny_tokenizer
from tiny_models import tiny_model, tiny_net
from tiny_run import cli, save_recipe

from elastune import harness
from elastune.errors import BadData, BadRecipe, UnsupportedModel
from elastune.evaluate import evaluate
from elastune.extract import extract
from elastune.generate import generate
from elastune.harness import harness_scores, harness_tasks
from elastune.metrics import METRICS
from elastune.tasks.base import MultipleChoiceExample

pytest.importorskip("lm_eval")

WORDS = ("apples", "clips", "bucket", "water", "friends", "answer", "Derek", "3", "4", "7", "48")
MEAN = {"aggregation": "mean", "higher_is_better": True}
SHARED = {"dataset_path": "json", "test_split": "test", "fewshot_split": "test"}
CHOICE = SHARED | {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc"} | MEAN, {"metric": "acc_norm"} | MEAN],
}
TASKS = {
    "tiny_choice": CHOICE | {"tag": "tiny"},
    "tiny_exact": CHOICE | {"metric_list": [{"metric": m} | MEAN for m in ("exact_match", "acc")]},
    "tiny_mcc": CHOICE
    | {
        "metric_list": [
            {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True}
        ]
    },
    "tiny_text": SHARED
    | {
        "tag": "tiny",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": [" 4", "e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"} | MEAN],
        "filter_list": [
            {"name": "whole", "filter": [{"function": "take_first"}]},
            {
                "name": "word",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(\S)"},
                    {"function": "take_first"},
                ],
            },
        ],
    },
    "tiny_lambada": SHARED
    | {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[0]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc"} | MEAN,
        ],
    },
    "tiny_rolling": SHARED
    | {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [
            {
                "metric": "word_perplexity",
                "aggregation": "weighted_perplexity",
                "higher_is_better": False,
            }
        ],
    },
    "tiny_lost": CHOICE | {"dataset_kwargs": {"data_files": {"test": "lost.jsonl"}}},
}
PARTS = ["tiny_choice", "tiny_exact"]
GROUPS = {
    "tiny_mean": {"aggregate_metric_list": [{"metric": "acc", "aggregation": "mean"}]},
    "tiny_heap": {},
}
RUN = [name for name in TASKS if name != "tiny_lost"]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    rng = random.Random(0)

    def words(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    return [
        {
            "question": words(9),
            "choices": [words(4) for _ in range(4)],
            "gold": rng.randrange(4),
            "text": "",
        }
        for _ in range(24)
    ]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(tiny_tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows, model) -> Path:
    """Task files as users write them; half of the generated texts are the gold ones."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = generate(model, tiny_tokenizer(), [r["question"] for r in rows], max_new_tokens=12)
    for row, text in list(zip(rows, texts, strict=True))[::2]:
        row["text"] = text.split(" 4")[0].split("e")[0]
    (folder / "data").write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = {"data_files": {"test": str(folder / "data")}, "cache_dir": str(folder / "cache")}
    for name, task in TASKS.items():
        settings = {"dataset_kwargs": local, "task": name} | task
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    for name, group in GROUPS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, "task": PARTS} | group))
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Leave out the 14,000 tasks of lm-eval, which take half a minute, and draw less often."""
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "_DRAWS", 100)
        patch.setattr(
            harness,
            "_whole_manager",
            lambda folders: TaskManager(include_path=list(folders), include_defaults=False),
        )
        yield


@pytest.fixture(scope="module")
def stock(folder, model) -> dict:
    """What lm-eval finds by itself."""
    from lm_eval.evaluator import evaluate as evaluate_stock
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with harness._by_itself():
        lm = HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=3)
        loaded = TaskManager(include_path=str(folder), include_defaults=False).load(RUN)
        return evaluate_stock(lm, loaded, bootstrap_iters=100)


@pytest.fixture(scope="module")
def scored(folder, model, tmp_path_factory) -> dict:
    """Score and records of every task by our way, all at once."""
    out = tmp_path_factory.mktemp("records")
    told: list[tuple[int, int]] = []
    scores = harness_scores(
        model,
        tiny_tokenizer(),
        RUN,
        include_path=folder,
        batch_tokens=300,
        progress=lambda done, total: told.append((done, total)),
        predictions=lambda task: out / f"{task.replace(':', '_')}.jsonl",
    )
    records = {name: read(out / f"lm-eval_{name}.jsonl") for name in RUN}
    return {"scores": dict(zip(RUN, scores, strict=True)), "records": records, "told": told}


NAMES = {"acc": "accuracy", "acc_norm": "accuracy_norm"}


@pytest.mark.parametrize("name", RUN)
def test_every_number_equals_lm_evals_own(name, stock, scored):
    score = scored["scores"][name]
    assert score.task == f"lm-eval:{name}"
    assert score.n == stock["n-samples"][name]["effective"] == 24
    measured = [score, *score.others]
    found = {k: v for k, v in stock["results"][name].items() if "," in k and "_stderr" not in k}
    order = [metric["metric"] for metric in TASKS[name]["metric_list"]]
    found = dict(sorted(found.items(), key=lambda item: order.index(item[0].split(",")[0])))
    assert len(measured) == len(found)
    for ours, (key, value) in zip(measured, found.items(), strict=True):
        metric, kind = key.split(",")
        assert ours.metric in (NAMES.get(metric, metric), f"{metric} ({kind})")
        assert ours.value == pytest.approx(value, rel=1e-4)
        stderr = stock["results"][name][f"{metric}_stderr,{kind}"]
        if stderr == "N/A":
            assert math.isnan(ours.stderr)
        else:
            assert ours.stderr == pytest.approx(stderr, rel=1e-3)
    first = next(iter(found)).split(",")[0]
    assert score.higher_is_better == stock["higher_is_better"][name][first]


def test_the_numbers_could_have_differed(scored):
    values = [scored["scores"][name].value for name in ("tiny_choice", "tiny_text")]
    assert all(0 < value < 1 for value in values)
    assert scored["scores"]["tiny_text"].metric == "exact_match"
    assert [m.metric for m in scored["scores"]["tiny_text"].others] == ["exact_match (word)"]


@pytest.mark.parametrize("name", RUN)
def test_every_answer_equals_lm_evals_own(name, stock, scored):
    first = {s["doc_id"]: s for s in reversed(stock["samples"][name])}
    records = scored["records"][name]
    assert [record["index"] for record in records] == list(range(24))
    for record in records:
        sample = first[record["index"]]
        assert record["prompt"] == sample["arguments"][0][0]
        if name == "tiny_text":
            assert record["text"] == sample["resps"][0][0]
        else:
            answers = [r[0] if isinstance(r, tuple) else r for (r,) in sample["resps"]]
            np.testing.assert_allclose(record["loglikelihoods"], answers, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tiny_choice", "tiny_exact", "tiny_text"])
def test_metrics_of_the_records_are_the_scores(name, scored):
    score = scored["scores"][name]
    for measured in (score, *score.others):
        metric = METRICS.get(measured.metric)
        if metric is not None:
            value = metric.value(*metric.arrays(scored["records"][name]))
            assert value == pytest.approx(measured.value)
            assert metric.stderr is not None


def test_choices_score_as_by_our_own_task(rows, model, scored):
    from elastune.metrics import ACCURACY, ACCURACY_NORM

    class Own:
        name, kind, metrics, higher_is_better = (
            *("own", "multiple-choice", (ACCURACY, ACCURACY_NORM)),
            True,
        )

    examples = [
        MultipleChoiceExample(
            f"Question: {row['question']}\nAnswer:",
            tuple(f" {choice}" for choice in row["choices"]),
            row["gold"],
            row["question"],
        )
        for row in rows
    ]
    own = evaluate(model, tiny_tokenizer(), Own(), examples)
    score = scored["scores"]["tiny_choice"]
    assert (own.value, own.n) == (score.value, score.n)
    assert [m.value for m in own.others] == [m.value for m in score.others]


def test_progress_reaches_the_number_of_requests(scored):
    told = scored["told"]
    assert told[-1] == (24 * (3 * 4 + 3), 24 * (3 * 4 + 3))
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_sub_networks_are_scored_as_they_are_active(folder, tmp_path):
    tokenizer = tiny_tokenizer()
    net = tiny_net(tiny_llama(tokenizer), alpha=200)
    found = {}
    for name, config in (("large", net.space.largest()), ("small", net.space.smallest())):
        net.activate(config)
        path = tmp_path / f"{name}.jsonl"
        options = {"include_path": folder, "predictions": lambda task, path=path: path}
        score = harness_scores(net.model, tokenizer, ["tiny_choice"], **options)[0]
        found[name] = [record["loglikelihoods"] for record in read(path)]
        extract(net, config).save(tmp_path / name)
        adapted = PeftModel.from_pretrained(tiny_llama(tokenizer), tmp_path / name)
        expected = harness_scores(adapted, tokenizer, ["tiny_choice"], **options)[0]
        assert score.value == expected.value
        again = [record["loglikelihoods"] for record in read(path)]
        np.testing.assert_allclose(found[name], again, rtol=1e-4, atol=1e-4)
    assert np.abs(np.subtract(found["large"], found["small"])).max() > 0.1


def test_nothing_but_the_scores_is_left_behind(folder, capfd):
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer).train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    level = logging.getLogger("lm_eval").level
    harness_scores(model, tokenizer, ["tiny_mcc", "tiny_lambada"], include_path=folder)
    assert capfd.readouterr() == ("", "")
    assert model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert logging.getLogger("lm_eval").level == level


def test_limit_and_worked_examples_are_lm_evals(folder, model, tmp_path):
    score = harness_scores(
        model,
        tiny_tokenizer(),
        ["tiny_choice"],
        include_path=folder,
        limit=5,
        num_fewshot=2,
        predictions=lambda task: tmp_path / "records",
    )[0]
    records = read(tmp_path / "records")
    assert score.n == len(records) == 5
    assert {record["prompt"].count("Question:") for record in records} == {3}


def test_a_group_is_one_score_and_a_tag_one_for_each_task(folder, model, scored, tmp_path):
    group = harness_scores(
        model,
        tiny_tokenizer(),
        ["tiny_mean"],
        include_path=folder,
        predictions=lambda task: tmp_path / "records",
    )
    parts = [scored["scores"]["tiny_choice"], *scored["scores"]["tiny_exact"].others]
    assert [score.task for score in group] == ["lm-eval:tiny_mean"]
    assert group[0].value == pytest.approx(sum(part.value for part in parts) / 2)
    assert group[0].n == 48
    records = read(tmp_path / "records")
    assert [record["index"] for record in records] == list(range(48))
    assert [record["lm_eval_task"] for record in records] == [
        name for name in PARTS for _ in "x" * 24
    ]
    assert list(harness_tasks(["tiny"], folder)) == ["tiny_choice", "tiny_text"]
    with pytest.raises(BadRecipe, match="no score of its own") as caught:
        harness_scores(model, tiny_tokenizer(), ["tiny_heap"], include_path=folder)
    assert "tiny_choice,tiny_exact" in str(caught.value)


def test_a_task_may_be_a_file(folder, model, scored):
    path = str(folder / "tiny_choice.yaml")
    assert harness_tasks([path]) == {"tiny_choice": path}
    score = harness_scores(model, tiny_tokenizer(), [path])[0]
    assert score.value == scored["scores"]["tiny_choice"].value
    assert score.task == "lm-eval:tiny_choice"


def test_an_unknown_task_is_named_with_its_nearest(folder):
    with pytest.raises(BadRecipe, match=r"no task 'tiny_choise' \(did you mean 'tiny_choice'\?\)"):
        harness_tasks(["tiny_choise"], folder)
    with pytest.raises(BadRecipe, match="no folder"):
        harness_tasks(["tiny_choice"], folder / "absent")
    with pytest.raises(BadRecipe, match="no lm-eval task is named"):
        harness_tasks([], folder)


def test_data_out_of_reach_says_how_to_give_local_data(folder, model):
    with pytest.raises(BadData, match="'tiny_lost' cannot be set up") as caught:
        harness_scores(model, tiny_tokenizer(), ["tiny_lost"], include_path=folder)
    assert "dataset_path: json" in str(caught.value)


def test_other_bad_input_is_named(folder, model):
    with pytest.raises(BadRecipe, match="limit is 0"):
        harness_scores(model, tiny_tokenizer(), ["tiny_choice"], include_path=folder, limit=0)
    with pytest.raises(UnsupportedModel, match="this is a BertModel"):
        harness_scores(tiny_model("bert"), tiny_tokenizer(), ["tiny_choice"], include_path=folder)


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadRecipe, match="not installed") as caught:
        harness_tasks(["piqa"])
    assert "elastune[lm-eval]" in str(caught.value)


def test_rows_of_lm_eval_stay_in_the_table_until_what_they_depend_on_changes(
    tmp_path: Path,
) -> None:
    tokenizer = tiny_tokenizer()
    tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "day.txt").write_text("It is a day like any other.\n" * 40)
    recipe = {
        "method": "finetune",
        "model": str(tmp_path / "model"),
        "task": {"name": f"perplexity:{tmp_path / 'day.txt'}", "options": {"window": 16}},
        "baselines": ["dense"],
        "evaluate": {"macs_length": 16},
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"q": f"{i} + 1 =", "choices": [f" {i + 1}", " 0"], "gold": 0} for i in range(4)]
    (folder / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {folder / 'rows.json'}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    out = tmp_path / "run"
    path = save_recipe(tmp_path / "recipe.yaml", recipe)

    def told(*arguments: Any) -> dict[str, Any]:
        stdout = cli(*arguments, "--json").stdout
        return {row["task"]: row for row in json.loads(stdout)["rows"]}

    assert set(told("run", path, "--out", out)) == {"day.txt"}
    first = told("evaluate", out, "--lm-eval", "sums", "--lm-eval-path", folder)
    assert first["lm-eval:sums"]["n"] == 4
    assert (out / "predictions" / "dense.lm-eval_sums.jsonl").exists()
    assert told("run", out) == first
    changed = told("run", path, "--out", out, "--update", "--set", "dtype=bfloat16")
    assert set(changed) == {"day.txt"}
