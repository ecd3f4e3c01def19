"""Records of an evaluation survive a kill, and nothing is scored twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import tiny_llama, tiny_tokenizer

from elastune.evaluate import evaluate
from elastune.predict import PREDICTORS, Plan
from elastune.predictions import PredictionFile, read_predictions
from elastune.tasks import Example, get_task

PROMPTS = [f"Question: {a} + {b} =\nAnswer:" for a in range(3, 6) for b in range(2, 5)]
EXAMPLES = [Example(prompt, "", "7", prompt) for prompt in PROMPTS]


def sums(tmp_path: Path) -> Any:
    path = tmp_path / "sums.jsonl"
    path.write_text('{"prompt": "1 + 1", "completion": "2"}\n')
    return get_task(f"custom:{path}", max_new_tokens=4)


def score(folder: Path, task: Any, key: str = "a", examples: Sequence[Example] = EXAMPLES) -> Any:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer)
    return evaluate(model, tokenizer, task, examples, predictions=folder / "p.jsonl", key=key)


class Killed(BaseException):
    """Stands for a kill in the middle of an evaluation."""


def die_after(monkeypatch: pytest.MonkeyPatch, number: int, seen: list[int]) -> None:
    """Let the evaluation die after some records; ``seen`` lists what was really scored."""
    stock = PREDICTORS["generation"]

    def dying(*args: Any, **kwargs: Any) -> Plan:
        plan = stock(*args, **kwargs)

        def records() -> Any:
            for count, record in enumerate(plan.records):
                if count == number:
                    raise Killed
                seen.append(record["index"])
                yield record

        return Plan(plan.total, records())

    monkeypatch.setitem(PREDICTORS, "generation", dying)  # type: ignore[arg-type]


def test_a_killed_evaluation_goes_on_and_scores_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = sums(tmp_path)
    whole = score(tmp_path / "whole", task)
    seen: list[int] = []
    for number in (3, 2, 99):
        with monkeypatch.context() as patch:
            die_after(patch, number, seen)
            if number < 99:
                with pytest.raises(Killed):
                    score(tmp_path / "cut", task)
            else:
                resumed = score(tmp_path / "cut", task)
    assert sorted(seen) == list(range(len(EXAMPLES)))
    assert (resumed.value, resumed.stderr, resumed.n) == (whole.value, whole.stderr, whole.n)
    both = [(tmp_path / name / "p.jsonl").read_text() for name in ("whole", "cut")]
    assert both[0] == both[1]
    assert [p.name for p in (tmp_path / "cut").iterdir()] == ["p.jsonl"]


def test_a_torn_line_is_scored_again_and_seconds_add_up(tmp_path: Path) -> None:
    first = PredictionFile(tmp_path / "p.jsonl", "k")
    with first.open():
        first.add({"index": 1, "correct": True}, 2.0)
        first.add({"index": 0, "correct": False}, 3.0)
    text = first.partial.read_text()
    first.partial.write_text(text[:-5])
    second = PredictionFile(tmp_path / "p.jsonl", "k")
    assert list(second.records) == [1]
    assert second.seconds == 2.0
    with second.open():
        second.add({"index": 0, "correct": False}, 3.0)
    third = PredictionFile(tmp_path / "p.jsonl", "k")
    assert third.seconds == 5.0
    assert third.finish() == [{"index": 0, "correct": False}, {"index": 1, "correct": True}]
    assert read_predictions(tmp_path / "p.jsonl") == third.finish()


def test_line_separators_within_a_text_do_not_cut_a_record(tmp_path: Path) -> None:
    record = {"index": 0, "text": "a\u2028b\u0085c\r\nd", "correct": True}
    file = PredictionFile(tmp_path / "p.jsonl", "k")
    with file.open():
        file.add(record, 1.0)
    assert PredictionFile(tmp_path / "p.jsonl", "k").records == {0: record}
    file.finish()
    assert read_predictions(tmp_path / "p.jsonl") == [record]


def test_records_of_another_evaluation_are_not_gone_on_from(tmp_path: Path) -> None:
    first = PredictionFile(tmp_path / "p.jsonl", "of one model")
    with first.open():
        first.add({"index": 0, "correct": True}, 1.0)
    assert PredictionFile(tmp_path / "p.jsonl", "of another").records == {}


def test_sigkill_in_a_process_of_its_own_leaves_whole_lines(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from elastune.predictions import PredictionFile\n"
        "file = PredictionFile(Path(sys.argv[1]), 'k')\n"
        "with file.open():\n"
        "    for i in range(10**6):\n"
        "        file.add({'index': i, 'text': 'x' * 500}, 0.001)\n"
    )
    target = tmp_path / "p.jsonl"
    process = subprocess.Popen([sys.executable, str(script), str(target)])
    partial = target.with_name(".p.jsonl.partial")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (
        partial.exists() and partial.stat().st_size > 20_000
    ):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = PredictionFile(target, "k")
    assert len(kept.records) > 30
    assert list(kept.records) == list(range(len(kept.records)))
    assert not target.exists()
    assert all(json.loads(json.dumps(r))["text"] == "x" * 500 for r in kept.records.values())
