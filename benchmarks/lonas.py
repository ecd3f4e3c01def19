"""LoNAS against LoRA at full size: what smaller sub-networks lose, and how much faster they are.

Runs recipes/lonas-smollm2-math.yaml twice, channels sorted by importance and in natural order
(finished runs are reused), then measures what its report does not: the loss of the gold rationales
of GSM8K's test set, paired example by example; prefill and decode latency of all systems side by
side; and the memory of a training step against that of a super-network whose weights all train.

    python benchmarks/lonas.py [--out runs/lonas] [--quick]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_folder import add_data_option
from rich.console import Console
from rich.table import Table

import elastune as et
from elastune.artifacts import RunDirectory
from elastune.budgets import allocate_budgets
from elastune.choose import chosen
from elastune.config import load_recipe
from elastune.console import ConsoleReporter
from elastune.data import encode_all
from elastune.finetune import net_space
from elastune.heads import HEADS
from elastune.latency import Conditions, compare_latency
from elastune.likelihood import example_losses
from elastune.measure import measure
from elastune.memory import peak_memory
from elastune.methods import lonas
from elastune.report import markdown_table, write_report
from elastune.run import Run
from elastune.stages import sparsify, train_supernet
from elastune.subnetwork import extract_model
from elastune.supernet import SuperNetwork
from elastune.tasks import get_task

RECIPE = Path(__file__).parent.parent / "recipes" / "lonas-smollm2-math.yaml"
REFERENCE = "dense+lora"
QUICK = [
    "train.max_steps=2",
    "train.batch_size=4",
    "data.n_validation=2",
    "structure.probes=2",
    "structure.ffn=[1.0, 0.5]",
    "structure.budgets=[0.75]",
    "structure.calibration={source: c4, n_sequences: 4, length: 128}",
    "evaluate.tasks=[{name: wikitext2, limit: 1}]",
]


def main() -> None:
    args = _arguments()
    console = Console()
    orders = ["wanda"] if args.quick else ["wanda", "natural"]
    runs = {order: _run(args, order, console) for order in orders}
    for order, run in runs.items():
        console.print(f"\norder {order}\n")
        console.print(markdown_table(run.dir.metrics()), markup=False, soft_wrap=True)
    losses = _losses(runs, 4 if args.quick else args.loss_examples)
    _show_losses(losses, console)
    figures: dict[str, Any] = {"losses": losses}
    figures["latency"] = _latencies(runs["wanda"], console, args.quick)
    figures["training_memory"] = _memory(args, console)
    print(json.dumps({"benchmark": "lonas", "figures": figures}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_option(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/lonas"))
    parser.add_argument("--loss-examples", type=int, default=48)
    parser.add_argument("--set", action="append", default=[], help="override of the recipe")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def _run(args: argparse.Namespace, order: str, console: Console) -> Run:
    overrides = [f"data.dir={args.data or 'null'}", *args.set]
    if order != "wanda":  # the baselines are those of the first run
        overrides += [f"structure.order={order}", "baselines=[]"]
        overrides += ["structure.allocation=[uniform]"]
    if args.quick:
        overrides += QUICK
    recipe = load_recipe(RECIPE, overrides)
    name = f"quick-{order}" if args.quick else order
    directory = RunDirectory(args.out / name)
    with directory.lock():
        directory.claim(recipe, update=True)
        run = Run(directory, recipe, ConsoleReporter(console))
        if order == "wanda":
            lonas(run)
        else:
            sparsify(run)
            train_supernet(run)
            allocate_budgets(run)
            measure(run, _of_interest(run, order))
        write_report(directory.root)
    return run


def _of_interest(run: Run, order: str) -> list[str]:
    """Return the systems of a run that are compared: of another order, its equal cuts."""
    names = [*run.recipe.baselines, *chosen(run)]
    return names if order == "wanda" else [name for name in names if name.startswith("uniform")]


def _systems(run: Run) -> dict[str, Callable[[], Any]]:
    """Return the systems of a run by name, each a function that makes its plain model."""
    made: dict[str, Callable[[], Any]] = {}
    for name in run.recipe.baselines:
        if name == "dense":
            made[name] = lambda: run.load_dense()[0]
        else:

            def merged(name: str = name) -> Any:
                net = run.load_baseline(name)
                return extract_model(net, net.space.largest()).model  # type: ignore[arg-type, union-attr]

            made[name] = merged
    net: list[SuperNetwork] = []
    for name, config in chosen(run).items():

        def cut(config: Any = config) -> Any:
            net.extend([] if net else [run.load_supernet()])
            return extract_model(net[0], config).model

        made[name] = cut
    return made


def _losses(runs: dict[str, Run], n_examples: int) -> dict[str, list[float]]:
    """Return system -> [loss, minus the reference, standard error], in nats a token."""
    run = runs["wanda"]
    task = get_task("gsm8k", data_dir=run.recipe.data.dir, tokenizer=run.tokenizer)
    examples = task.report_examples()[:n_examples]
    measured: dict[str, list[list[float]]] = {}
    for order, run in runs.items():
        cache = run.dir.root / f"gold_losses_{n_examples}.json"
        rows = json.loads(cache.read_text()) if cache.exists() else {}
        wanted = _of_interest(run, order)
        for name, make in _systems(run).items():
            if name in wanted and name not in rows:
                sums, counts = example_losses(make(), run.tokenizer, examples)
                rows[name] = [sums.tolist(), counts.tolist()]
                cache.write_text(json.dumps(rows))
        for name in wanted:
            label = name if order == "wanda" else f"{name}, {order} order"
            measured[label] = rows[name]
    return {name: _compared(row, measured[REFERENCE]) for name, row in measured.items()}


def _compared(mine: list[list[float]], theirs: list[list[float]]) -> list[float]:
    """Return the loss per token, its paired difference and the difference's standard error."""
    sums, counts = np.array(mine[0]), np.array(mine[1])
    reference = np.array(theirs[0])
    total = counts.sum()
    difference = float((sums - reference).sum() / total)
    # Ratio estimator over examples, which differ in length.
    residual = (sums - reference) - difference * counts
    return [float(sums.sum() / total), difference, float(np.sqrt((residual**2).sum()) / total)]


def _show_losses(losses: dict[str, list[float]], console: Console) -> None:
    table = Table(title=f"loss of GSM8K's gold rationales, paired difference to {REFERENCE}")
    for column in ("system", "nats a token", "difference", "stderr"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for name, (loss, difference, stderr) in losses.items():
        table.add_row(name, f"{loss:.4f}", f"{difference:+.4f}", f"{stderr:.4f}")
    console.print(table)


def _latencies(run: Run, console: Console, quick: bool) -> dict[str, Any]:
    """Measure all systems of a run in turns."""
    models = {name: make() for name, make in _systems(run).items() if name not in ("best",)}
    conditions = Conditions(1, 256, 8, 3 if quick else 9, 1 if quick else 2)
    found = compare_latency(models, conditions)
    dense = found["dense"]
    table = Table(title="latency, batch 1, 256 tokens of prompt (median of rounds in turns)")
    for column in ("system", "prefill ms", "times faster", "decode ms a token", "times faster"):
        table.add_column(column, justify="left" if column == "system" else "right")
    figures = {}
    for name, latency in found.items():
        faster = latency.prefill_speed_up(dense), latency.decode_speed_up(dense)
        table.add_row(
            name,
            f"{latency.prefill_ms:.1f} ± {latency.prefill_iqr_ms / 2:.1f}",
            f"{faster[0]:.2f}",
            f"{latency.decode_ms_per_token:.1f} ± {(latency.decode_iqr_ms or 0) / 2:.1f}",
            f"{faster[1]:.2f}",
        )
        figures[name] = {
            "prefill_ms": latency.prefill_ms,
            "decode_ms_per_token": latency.decode_ms_per_token,
            "prefill_speed_up": faster[0],
            "decode_speed_up": faster[1],
        }
    console.print(table)
    return figures


def _memory(args: argparse.Namespace, console: Console) -> dict[str, float]:
    """Measure the peak memory of training steps, each way in a process of its own."""
    table = Table(title="memory of three training steps of 8 problems, MB")
    for column in ("what trains", "model loaded", "peak", "training adds"):
        table.add_column(column, justify="left" if column.startswith("what") else "right")
    figures = {}
    for what in ("adapter", "full"):
        options = {"what": what, "data": str(args.data) if args.data else None}
        peak = peak_memory("lonas:training_work", options)
        added = peak.peak_mb - peak.start_mb
        table.add_row(what, *(f"{mb:,.0f}" for mb in (peak.start_mb, peak.peak_mb, added)))
        figures |= {f"{what}_peak_mb": peak.peak_mb, f"{what}_added_mb": added}
    console.print(table)
    return figures


def training_work(what: str, data: str | None) -> Callable[[], None]:
    """Prepare three optimizer steps of LoNAS, or of the same space with all weights trained."""
    recipe = load_recipe(RECIPE, [f"data.dir={data or 'null'}"])
    model, tokenizer = et.load_model(recipe.model)
    space = net_space(model, recipe.adapter, recipe.structure)
    full = what == "full"
    if full:
        space = et.SearchSpace([dim for dim in space.dims if dim.kind != "rank"])
    net = SuperNetwork(model, space, alpha=64, train_base=full)
    task = get_task("math_instruct", data_dir=recipe.data.dir, tokenizer=tokenizer)
    head = HEADS["causal-lm"]
    batch = head.collate(encode_all(task.train_examples()[:8], tokenizer, 384))

    def work() -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)
        rng = np.random.default_rng(0)
        with head.training(model):
            for config in (space.largest(), space.sample(rng), space.sample(rng)):
                net.activate(config)
                (head.loss(model, batch) / head.n_targets(batch)).backward()
                optimizer.step()
                optimizer.zero_grad()

    return work


if __name__ == "__main__":
    main()
