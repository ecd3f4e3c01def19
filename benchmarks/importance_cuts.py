"""Sub-networks that importance cuts out of a model, before any training.

For each kind of scores one threshold over all heads and channels gives a sub-network of each size,
and equal widths in every block, sorted by the same scores, give another. The sizes are parts of the
blocks' MACs. A decoder is calibrated on C4 and scored by perplexity on WikiText-2; with --task a
fine-tuned encoder is calibrated on training examples and scored on examples cut from them.

    python benchmarks/importance_cuts.py [--quick]
    python benchmarks/importance_cuts.py --model FINE_TUNED --task sst2 --parts 0.75 0.5 0.33 0.2
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from data_folder import add_data_option
from rich.console import Console
from rich.table import Table
from torch import Tensor

import elastune as et
from elastune.allocate import uniform_config
from elastune.calibration_text import calibration_texts
from elastune.errors import InvalidSpace
from elastune.heads import HEADS
from elastune.importance import UnitScores
from elastune.losses import head_loss
from elastune.models.blocks import PARTS, blocks
from elastune.space import ElasticDim

Measure = Callable[[Any], float]
METHODS = ("magnitude", "wanda", "taylor", "fisher", "fisher in rounds")


def main() -> None:
    args = _arguments()
    console = Console()
    if args.task:
        model, batches, head, measure = _classifier(args)
        name = "accuracy"
    else:
        model, batches, measure = _decoder(args)
        head, name = None, "perplexity"
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    dense = measure(model)
    print(f"dense: {name} {dense:.4g}", flush=True)
    rows: list[tuple[str, str, list[float | None], float]] = []
    for method in args.methods:
        started = time.monotonic()
        scores = _scores(model, method, batches, head, args)
        seconds = time.monotonic() - started
        et.reorder_(model, scores)
        for per_cost in (False, True) if "rounds" not in method else (False,):
            found = [_threshold(model, scores, part, per_cost, measure) for part in args.parts]
            rows.append((method, "per cost" if per_cost else "threshold", found, seconds))
            print(rows[-1], flush=True)
        rows.append((method, "equal widths", _equal(model, args.parts, measure), seconds))
        print(rows[-1], flush=True)
        model.load_state_dict(whole)
    _show(rows, name, dense, args, console)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", help="classification task that the model was fine-tuned on")
    parser.add_argument("--parts", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--calibration", type=int, default=0, help="rows or examples; 0: 24 or 512")
    parser.add_argument("--scored", type=int, default=0, help="pieces or examples; 0: 12 or 1000")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.calibration = args.calibration or (512 if args.task else 24)
    args.scored = args.scored or (1000 if args.task else 12)
    if args.quick:
        args.parts, args.rounds, args.calibration, args.scored = args.parts[1:2], 2, 2, 1
        args.methods = ["wanda", "fisher", "fisher in rounds"]
    return args


def _decoder(args: argparse.Namespace) -> tuple[Any, Tensor, Measure]:
    model, tokenizer = et.load_model(args.model)
    texts = calibration_texts("c4", args.data)
    rows = et.calibration_rows(texts, tokenizer, n_sequences=args.calibration, length=256, seed=0)
    task = et.get_task("wikitext2", data_dir=args.data, window=512)
    text = "".join(piece.completion for piece in task.report_examples())[:400_000]
    test = torch.tensor(tokenizer(text)["input_ids"][: args.scored * 512]).view(-1, 512)

    @torch.inference_mode()
    def perplexity(model: Any) -> float:
        total = 0.0
        for ids in test.split(2):
            hidden = model.base_model(input_ids=ids, use_cache=False)[0][:, :-1].flatten(0, 1)
            head = model.get_output_embeddings()
            total += float(head_loss(hidden, head.weight, head.bias, ids[:, 1:].flatten()))
        return math.exp(total / test[:, 1:].numel())

    return model, rows, perplexity


def _classifier(args: argparse.Namespace) -> tuple[Any, list[Any], Any, Measure]:
    task: Any = et.get_task(args.task, data_dir=args.data)
    model, tokenizer = et.load_model(args.model, head=task.head, num_labels=task.num_labels)
    splits = et.make_splits(
        task.train_examples(),
        {task.name: task.report_examples()},
        n_train=args.calibration,
        n_validation=args.scored,
        n_calibration=1,
        seed=0,
        leaks="drop",
    )
    head = HEADS[task.head]
    items = sorted(head.encode(splits.train, tokenizer, 128), key=head.length)
    batches = [head.collate(items[i : i + 32]) for i in range(0, len(items), 32)]

    def accuracy(model: Any) -> float:
        return et.evaluate(model, tokenizer, task, splits.validation).value

    return model, batches, head, accuracy


def _scores(
    model: Any, method: str, batches: Any, head: Any, args: argparse.Namespace
) -> UnitScores:
    if method == "fisher":
        return et.fisher_scores(model, batches, head=head)
    if method == "fisher in rounds":
        low = min(args.parts)
        return et.rank_in_rounds(model, batches, head=head, low=low, rounds=args.rounds)
    return et.structure_scores(model, batches, method, head=head)  # type: ignore[arg-type]


def _threshold(
    model: Any,
    scores: UnitScores,
    part: float,
    per_cost: bool,
    measure: Measure,
) -> float | None:
    """Cut a sorted model by one threshold; None where no threshold gives the size."""
    ordered = {name: score.sort(descending=True).values for name, score in scores.items()}
    try:
        made = et.space_from_importance(model, ordered, points=[part], per_cost=per_cost)
    except InvalidSpace:
        return None
    cut = model
    if made.removed_blocks:
        cut = et.drop_blocks_(copy.deepcopy(model), made.removed_blocks)
    net = et.SuperNetwork(cut, made.space)
    with net.active(made.points[0].config):
        found = measure(cut)
    net.unwrap()
    return found


def _equal(model: Any, parts: list[float], measure: Measure) -> list[float | None]:
    """Cut the same part of all halves of all blocks."""
    dims = [
        ElasticDim(
            f"layers.{block.index}.{part}",
            part,
            _sizes(block, part),
            tuple(f"{block.name}.{block.record.roles[role]}" for role in block.roles_of(part)),
        )
        for block in blocks(model)
        for part in PARTS
    ]
    net = et.SuperNetwork(model, et.SearchSpace(dims))
    count = et.CostModel(net, 128)
    full = count(net.space.largest()).block_macs
    found: list[float | None] = []
    for part in parts:
        config = uniform_config(net.space, lambda c: float(count(c).block_macs), part * full)
        with net.active(config):
            found.append(measure(model))
    net.unwrap()
    return found


def _sizes(block: Any, part: Any) -> tuple[int, ...]:
    per = block.heads_per_unit if part == "heads" else max(block.shape.ffn // 48, 1)
    full = block.shape.heads if part == "heads" else block.shape.ffn
    return tuple(sorted({*range(per, full, per), full}, reverse=True))


def _show(
    rows: list[tuple[str, str, list[float | None], float]],
    name: str,
    dense: float,
    args: argparse.Namespace,
    console: Console,
) -> None:
    table = Table(title=f"{name} by part of the blocks' MACs, nothing trained (dense {dense:.4g})")
    for column in ("scores", "cut", *(f"{part:.0%}" for part in args.parts), "s to score"):
        table.add_column(column, justify="left" if column in ("scores", "cut") else "right")
    for method, how, found, seconds in rows:
        texts = ["-" if value is None else f"{value:,.4g}" for value in found]
        table.add_row(method, how, *texts, f"{seconds:.0f}")
    console.print(table)
    figures = [
        {"scores": method, "cut": how, name: dict(zip(map(str, args.parts), found, strict=True))}
        for method, how, found, _ in rows
    ]
    print(
        json.dumps({"benchmark": "importance_cuts", "figures": {"dense": dense, "rows": figures}})
    )


if __name__ == "__main__":
    main()
