"""Speed of evaluation, and that it costs no answer: generation and log-likelihoods of choices.

Systems take turns, so that ratios hold when the machine's speed drifts; figures are medians.

- generation: `elastune.generate` against transformers' `generate` on the same prompts, sorted by
  length, in left-padded batches of as many rows; once stopping at the end-of-sequence token alone,
  once given the task's own stop (checked every step by `stopping_criteria`). The same answers are
  extracted from all texts. A text of ours must be what plain `generate` writes up to its stop.
  Twice: zero-shot, and after solved problems (few-shot), which all prompts begin with. An untuned
  model goes on long after its answer or gives none; `--adapter` measures a tuned one.
- choices: `elastune.predict` against lm-evaluation-harness' HFLM on the same model, real questions
  of HellaSwag and PIQA, tokenising included; HFLM with the batch size that it is fastest with.

    python benchmarks/evaluate.py [--quick] [--model smollm2-135m]
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from data_folder import add_data_option
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import StoppingCriteria, StoppingCriteriaList

from elastune.generate import end_of_sequence_ids, generate
from elastune.models import load_model
from elastune.predict.multiple_choice import predict_choices, scored_texts
from elastune.tasks import get_task
from elastune.tasks.base import MultipleChoiceExample

HARNESS_BATCHES = (1, 8, 32)
Timed = dict[str, list[tuple[float, float]]]
"""Wall and CPU seconds of each round."""


def main() -> None:
    args = _arguments()
    console = Console()
    model, tokenizer = load_model(args.model)
    if args.adapter:
        model = PeftModel.from_pretrained(model, str(args.adapter)).merge_and_unload().eval()
    figures = _generation(args, model, tokenizer, console, shots=0)
    few = _generation(args, model, tokenizer, console, shots=args.shots)
    figures |= {f"few_shot_{name}": value for name, value in few.items()}
    figures |= _choices(args, model, tokenizer, console)
    print(json.dumps({"benchmark": "evaluate", "figures": figures}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapter", type=Path, help="PEFT adapter on the model: a tuned one")
    parser.add_argument("--shots", type=int, default=3, help="solved problems before a prompt")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--questions", type=int, default=40, help="of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="2 prompts, 3 questions, 1 round")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.batch_size, args.max_new_tokens = 2, 2, 24
        args.questions, args.rounds = 3, 1
    return args


def _take_turns(systems: dict[str, Callable[[], Any]], rounds: int) -> tuple[Timed, dict[str, Any]]:
    """Run every system once per round; return their times and last results."""
    times: Timed = {name: [] for name in systems}
    results = {}
    for _ in range(rounds):
        for name, system in systems.items():
            wall, cpu = time.perf_counter(), time.process_time()
            results[name] = system()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times, results


def _ratios(times: Timed, name: str, ours: str, figure: str) -> dict[str, float]:
    """Return the median ratio of both clocks, and the spread of the wall's."""
    figures = {}
    for label, clock in (("", 0), ("_cpu", 1)):
        ratios = [a[clock] / b[clock] for a, b in zip(times[name], times[ours], strict=True)]
        figures[figure + label] = statistics.median(ratios)
        if not label:
            figures |= {f"{figure}_min": min(ratios), f"{figure}_max": max(ratios)}
    return figures


def _seconds(rows: Sequence[tuple[float, float]]) -> list[str]:
    """Return median, smallest and largest wall time, and the median CPU time."""
    wall, cpu = zip(*rows, strict=True)
    return [f"{value:.1f}" for value in (statistics.median(wall), min(wall), max(wall))] + [
        f"{statistics.median(cpu):.1f}"
    ]


# --- generation ---------------------------------------------------------------------------------


def _generation(
    args: argparse.Namespace, model: Any, tokenizer: Any, console: Console, shots: int
) -> dict[str, Any]:
    name = "gsm8k" if args.data else "reasoning_gym:gsm_symbolic"
    task = get_task(name, data_dir=args.data, template="qa" if shots else "alpaca")
    solved = [example.prompt + example.completion for example in task.train_examples()[:shots]]
    prompts = [
        "\n\n".join([*solved, example.prompt]) for example in task.report_examples()[: args.prompts]
    ]
    prompts.sort(key=len, reverse=True)

    def ours(batch_size: int = args.batch_size, **options: Any) -> list[str]:
        return generate(
            model,
            tokenizer,
            options.pop("prompts", prompts),
            max_new_tokens=args.max_new_tokens,
            is_finished=task.is_finished,
            batch_tokens=10**6,
            max_batch=batch_size,
            **options,
        )

    def theirs(stops: bool) -> list[str]:
        stop = task.is_finished if stops else None
        return _plain_generate(model, tokenizer, prompts, args, stop)

    systems = {
        "generate": lambda: theirs(False),
        "generate, same stop": lambda: theirs(True),
        "ours": ours,
    }
    if not args.quick:
        systems["ours, ties unsettled"] = lambda: ours(settle_ties=False)
    times, texts = _take_turns(systems, args.rounds)
    few = prompts[:: max(1, len(prompts) // 4)]
    alone = ours(1, prompts=few)
    table = Table(
        title=f"{name}, {shots} solved: {len(prompts)} prompts, {args.max_new_tokens} new tokens"
    )
    for column in ("system", "median s", "min s", "max s", "CPU s", "tokens", "same answers"):
        table.add_column(column, justify="right")
    same = {}
    for system, found in texts.items():
        pairs = list(zip(found, texts["ours"], strict=True))
        same[system] = statistics.mean(task.extract(a) == task.extract(b) for a, b in pairs)
        n_tokens = sum(len(tokenizer(text).input_ids) for text in found)
        table.add_row(system, *_seconds(times[system]), str(n_tokens), f"{same[system]:.3f}")
    console.print(table)
    prefixes = zip(texts["generate"], texts["ours"], strict=True)
    figures: dict[str, Any] = {}
    if not args.quick:
        figures = _ratios(times, "ours", "ours, ties unsettled", "cost_of_settling_ties")
    return figures | {
        **_ratios(times, "generate", "ours", "generation_over_transformers_generate"),
        **_ratios(times, "generate, same stop", "ours", "generation_over_generate_with_stopping"),
        "same_answers": same["generate"],
        "same_texts_up_to_the_stop": statistics.mean(long.startswith(s) for long, s in prefixes),
        "same_texts_at_batch_1": statistics.mean(
            texts["ours"][prompts.index(prompt)] == text
            for prompt, text in zip(few, alone, strict=True)
        ),
    }


class _Stop(StoppingCriteria):
    """The task's own stop, asked of every row at every step, as the documentation suggests."""

    def __init__(self, tokenizer: Any, n_prompt: int, is_finished: Callable[[str], bool]) -> None:
        self.tokenizer, self.n_prompt, self.is_finished = tokenizer, n_prompt, is_finished

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.n_prompt :], skip_special_tokens=True)
        return torch.tensor([self.is_finished(text) for text in texts], device=input_ids.device)


def _plain_generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    args: argparse.Namespace,
    is_finished: Callable[[str], bool] | None,
) -> list[str]:
    tokenizer.padding_side = "left"
    texts: list[str] = []
    for start in range(0, len(prompts), args.batch_size):
        batch = list(prompts[start : start + args.batch_size])
        inputs = tokenizer(
            batch, padding=True, return_tensors="pt", return_token_type_ids=False
        ).to(model.device)
        n_prompt = inputs.input_ids.shape[1]
        options: dict[str, Any] = {"eos_token_id": sorted(end_of_sequence_ids(model, tokenizer))}
        if is_finished is not None:
            options["stopping_criteria"] = StoppingCriteriaList(
                [_Stop(tokenizer, n_prompt, is_finished)]
            )
        with torch.inference_mode():
            ids = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=args.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                **options,
            )
        texts += tokenizer.batch_decode(
            ids[:, n_prompt:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    return texts


# --- choices ------------------------------------------------------------------------------------


def _choices(
    args: argparse.Namespace, model: Any, tokenizer: Any, console: Console
) -> dict[str, Any]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    examples = _questions(args)
    pairs = [pair for example in examples for pair in scored_texts(example)]

    def ours() -> list[float]:
        plan = predict_choices(model, tokenizer, None, examples, batch_tokens=8192, done=set())
        records = sorted(plan.records, key=lambda record: record["index"])
        return [value for record in records for value in record["loglikelihoods"]]

    def theirs(batch_size: int) -> list[float]:
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        return [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]

    trial, _ = _take_turns({str(n): lambda n=n: theirs(n) for n in HARNESS_BATCHES}, 1)
    best = min(HARNESS_BATCHES, key=lambda n: trial[str(n)][0][1])
    systems = {f"harness, batch {best}": lambda: theirs(best), "ours": ours}
    times, values = _take_turns(systems, args.rounds)
    table = Table(title=f"{len(examples)} questions, {len(pairs)} choices")
    for column in ("system", "median s", "min s", "max s", "CPU s"):
        table.add_column(column, justify="right")
    for name, row in (trial | times).items():
        label = f"harness, batch {name}, trial" if name in trial else name
        table.add_row(label, *_seconds(row))
    console.print(table)
    theirs_name, ours_name = systems
    given, expected = values[ours_name], values[theirs_name]
    return {
        **_ratios(times, theirs_name, ours_name, "loglik_over_lm_eval"),
        "loglik_max_difference": max(abs(a - b) for a, b in zip(given, expected, strict=True)),
        "same_choices": statistics.mean(
            a == b for a, b in zip(_best(examples, given), _best(examples, expected), strict=True)
        ),
    }


def _questions(args: argparse.Namespace) -> list[MultipleChoiceExample]:
    if args.data:
        found: list[Any] = []
        for name in ("hellaswag:likelihood", "piqa:likelihood"):
            task = get_task(name, data_dir=args.data)
            found += task.report_examples()[: args.questions]
        return found
    # Made up where there is no data: which of four texts goes on after a problem's first half.
    task = get_task("reasoning_gym:gsm_symbolic", template="none")
    halves = []
    for example in task.report_examples()[: 2 * args.questions]:
        words = example.key.split()
        halves.append((" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])))
    n = len(halves)
    return [
        MultipleChoiceExample(
            first, tuple(f" {halves[(i + k) % n][1]}" for k in range(4)), 0, first
        )
        for i, (first, _) in enumerate(halves)
    ]


def _best(examples: Sequence[MultipleChoiceExample], values: Sequence[float]) -> list[int]:
    """Return the likeliest choice of each question."""
    rest = iter(values)
    found = [[next(rest) for _ in example.choices] for example in examples]
    return [row.index(max(row)) for row in found]


if __name__ == "__main__":
    main()
