"""Our metric values against independent sources, on the same predictions.

- accuracy, F1, Matthews: scikit-learn; Pearson, Spearman: scipy; random systems of many qualities,
  with ties and constant answers among them.
- SQuAD's normalisation and F1: the official functions, as lm-evaluation-harness carries them.
- GSM8K: right or wrong by `elastune.tasks.answers` against the harness's two filters (strict:
  after "####"; flexible: the last number), on written answers of the kinds that models give.
  Models trained on our wording say "The answer is N." without the mark: strict finds nothing.

    python benchmarks/metrics.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import yaml
from data_folder import add_data_option
from lm_eval.api.metrics import exact_match_fn
from lm_eval.filters.extraction import RegexFilter
from lm_eval.tasks.qasper import metrics as squad
from scipy import stats
from sklearn import metrics as sklearn

from elastune.metrics import METRICS
from elastune.tasks import get_task
from elastune.tasks.answers import extract_number, same_number
from elastune.tasks.spans import normalise_answer, token_f1

#: (generated text, gold number, why a filter of the harness may judge otherwise than we do)
ANSWERS = [
    ("5 + 3 = 8\n#### 8", "8", ""),
    ("She has 1,200 - 200 = 1,000 left.\n#### 1,000", "1000", ""),
    ("#### $18.", "18", "strict: wants digits right after the mark"),
    ("####18", "18", "strict: wants a blank after the mark"),
    ("The answer is 72.", "72", "strict: there is no mark"),
    ("The answer is: 72", "72", "strict: there is no mark"),
    ("The answer is 72.0", "72", "both: text is compared, not numbers"),
    ("#### 72.00", "72", "both: text is compared, not numbers"),
    ("The answer is 8. 5 + 3 is how I got it.", "8", "flexible: a later number is taken"),
    ("The answer is 10 - 4 = 6.", "6", "strict: there is no mark"),
    ("The answer is 6 apples, since 2 * 3 = 6 of 12.", "6", "flexible: a later number is taken"),
    ("It costs $3.50 in all.", "3.5", "both: text is compared, not numbers"),
    ("It is -4 degrees. The answer is -4", "-4", "strict: there is no mark"),
    ("10-3 leaves 7", "7", "strict: there is no mark"),
    ("so 10-7", "7", "flexible: a minus between numbers is read as a sign"),
    ("The answer is 1/2.", "0.5", "both: text is compared, not numbers"),
    ("The answer is 3 1/2", "3.5", "both: text is compared, not numbers"),
    ("The answer is \\frac{1}{2}", "0.5", "both: text is compared, not numbers"),
    ("The answer is 18. #### 17", "17", "we: an explicit sentence goes before the mark"),
    ("So 12 eggs, no, 13 eggs.", "13", "strict: there is no mark"),
    ("The answer is five.", "5", ""),
    ("I do not know.", "5", ""),
    ("The answer is 20%.", "20", "strict: there is no mark"),
    ("That makes 7 dollars...", "7", "strict: no mark; flexible: dots alone pass for a number"),
    ("The total, 1,234.", "1234", "strict: there is no mark"),
    ("Answer: 42\nQuestion: What is 3 + 4?", "42", "strict: there is no mark"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--quick", action="store_true", help="a tenth of the random systems")
    args = parser.parse_args()
    n = 30 if args.quick else 300
    figures: dict[str, Any] = {
        **_classes(n),
        **_correlations(n),
        **_spans(20 * n),
        **_gsm8k_written(),
    }
    if args.data is not None:
        figures |= _gsm8k_gold(args.data)
    print(json.dumps({"benchmark": "metrics", "figures": figures}))


def _classes(n: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    theirs = {
        "accuracy": sklearn.accuracy_score,
        "f1": lambda gold, given: sklearn.f1_score(gold, given, zero_division=0),
        "matthews": sklearn.matthews_corrcoef,
    }
    systems = []
    for _ in range(n):
        size, balance, quality = rng.integers(2, 2000), rng.random(), rng.random()
        gold = rng.random(size) < balance
        given = np.where(rng.random(size) < quality, gold, rng.random(size) < rng.integers(3) / 2)
        systems.append((given.astype(int), gold.astype(int)))
    ours = {name: METRICS[name].value for name in ("f1", "matthews")}
    ours["accuracy"] = lambda given, gold: METRICS["accuracy"].value((given == gold).astype(float))
    return _table("scikit-learn", systems, ours, theirs)


def _correlations(n: int) -> dict[str, float]:
    rng = np.random.default_rng(1)
    theirs = {
        "pearson": lambda gold, given: stats.pearsonr(given, gold).statistic,
        "spearman": lambda gold, given: stats.spearmanr(given, gold).statistic,
    }
    systems = []
    for i in range(n):
        size = rng.integers(3, 2000)
        gold = np.round(5 * rng.random(size), int(rng.integers(3)))  # STS-B's labels have ties
        given = gold + rng.normal(scale=5 * rng.random(), size=size)
        systems.append((np.full(size, 2.5) if i % 10 == 0 else np.round(given, i % 4), gold))
    ours = {name: METRICS[name].value for name in theirs}
    return _table("scipy", systems, ours, theirs)


def _table(
    source: str,
    systems: list[tuple[np.ndarray, np.ndarray]],
    ours: dict[str, Callable[..., float]],
    theirs: dict[str, Callable[..., float]],
) -> dict[str, float]:
    """Print and return the largest difference of each metric; nan on both sides is none."""
    found = {}
    head = f"{'metric':<12} {'against':<14} {'systems':>8} {'undefined':>10}"
    print(f"{head} {'largest difference':>20}")
    for name, reference in theirs.items():
        differences, undefined = [0.0], 0
        for given, gold in systems:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of constants and missing classes
                expected = float(reference(gold, given))
            value = ours[name](given.astype(float), gold.astype(float))
            if math.isnan(expected) and math.isnan(value):
                undefined += 1
            else:
                difference = abs(value - expected)
                differences.append(math.inf if math.isnan(difference) else difference)
        found[f"{name}_max_abs_difference"] = max(differences)
        row = f"{name:<12} {source:<14} {len(systems):>8} {undefined:>10}"
        print(f"{row} {max(differences):>20.1e}")
    return found


def _spans(n: int) -> dict[str, float]:
    rng = random.Random(0)
    words = ["The", "a", "an", "cat", "Cat,", "U.S.", "the-end", "2,000", "é", "of", "!", "\n"]
    differences, spelled = [0.0], 0
    for _ in range(n):
        given, gold = (" ".join(rng.choices(words, k=rng.randrange(1, 7))) for _ in range(2))
        spelled += normalise_answer(given) != squad.normalize_answer(given)
        if normalise_answer(given) and normalise_answer(gold):
            expected = squad.f1_abstractive([given], [gold])
            differences.append(abs(token_f1(given, [gold]) - expected))
    print(f"{'squad f1':<12} {'official 1.1':<14} {n:>8} {'':>10} {max(differences):>20.1e}")
    print(f"{'':<12} texts normalised otherwise: {spelled}\n")
    return {"squad_f1_max_abs_difference": max(differences), "squad_normalised_otherwise": spelled}


class Harness:
    """Right or wrong as the harness's task file of GSM8K says."""

    def __init__(self) -> None:
        tasks = Path(lm_eval.__file__).parent / "tasks"
        config = yaml.safe_load((tasks / "gsm8k" / "gsm8k.yaml").read_text(encoding="utf-8"))
        self.filters = {}
        for entry in config["filter_list"]:
            options = {k: v for k, v in entry["filter"][0].items() if k != "function"}
            self.filters[entry["name"].split("-")[0]] = RegexFilter(**options)
        metric = config["metric_list"][0]
        keys = ("ignore_case", "ignore_punctuation", "regexes_to_ignore")
        self.options = {key: metric[key] for key in keys}
        self.until = config["generation_kwargs"]["until"]

    def is_correct(self, name: str, text: str, gold: str) -> bool:
        """Judge generated ``text`` by the filter called ``name``."""
        for stop in self.until:
            text = text.split(stop)[0]
        found = self.filters[name].apply([[text]], [{}])[0][0]
        answer = f"#### {gold}"  # gold comes as a whole rationale; the metric cuts it
        score = exact_match_fn(predictions=[found], references=[answer], **self.options)
        return bool(score["exact_match"])


def _is_correct(text: str, gold: str) -> bool:
    return same_number(extract_number(text.split("Question:")[0]), gold)


def _gsm8k_written() -> dict[str, Any]:
    harness = Harness()
    print("GSM8K: written answers (right +, wrong -); a reason where a filter judges otherwise")
    print(f"{'ours':<5} {'strict':<7} {'flexible':<9} {'gold':<6} answer")
    agree, unexplained = {"strict": 0, "flexible": 0}, 0
    for text, gold, reason in ANSWERS:
        ours = _is_correct(text, gold)
        theirs = {name: harness.is_correct(name, text, gold) for name in agree}
        for name in agree:
            agree[name] += theirs[name] == ours
        differs = any(right != ours for right in theirs.values())
        unexplained += differs and not reason
        marks = ["-+"[right] for right in (ours, theirs["strict"], theirs["flexible"])]
        line = f"{marks[0]:<5} {marks[1]:<7} {marks[2]:<9} {gold:<6} {text!r}"
        print(line + (f"   [{reason}]" if differs else ""))
    print()
    return {
        f"gsm8k_written_same_as_{name}": count / len(ANSWERS) for name, count in agree.items()
    } | {"gsm8k_written_unexplained": int(unexplained)}


def _gsm8k_gold(data: Path) -> dict[str, float]:
    """Judge the gold rationales: as our training words them, and with the harness's mark."""
    harness, examples = Harness(), get_task("gsm8k", data_dir=data).report_examples()
    ours = strict = flexible = 0
    for example in examples:
        ours += _is_correct(example.completion, example.answer)
        marked = f"{example.completion}\n#### {example.answer}"
        strict += harness.is_correct("strict", marked, example.answer)
        flexible += harness.is_correct("flexible", example.completion, example.answer)
    n = len(examples)
    print(f"GSM8K: gold rationales judged right, of {n}: ours {ours}, strict (with its mark added)")
    print(f"{strict}, flexible {flexible}")
    return {
        "gsm8k_gold_right_ours": ours / n,
        "gsm8k_gold_right_strict": strict / n,
        "gsm8k_gold_right_flexible": flexible / n,
    }


if __name__ == "__main__":
    main()
