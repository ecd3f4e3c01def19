"""Plain fine-tuning and LoRA of one encoder on one task, compared example by example.

    python examples/finetune_in_python.py --data-dir FOLDER

The folder holds glue/rte (docs/data.md); leave it out to read RTE from the hub. Takes some minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import elastune as et
from elastune.metrics import METRICS
from elastune.predictions import read_predictions

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data-dir", type=Path)
parser.add_argument("--n-train", type=int, default=800)
parser.add_argument("--out", type=Path, default=Path("out/rte"))
args = parser.parse_args()
out = args.out

task = et.get_task("rte", data_dir=args.data_dir)
splits = et.make_splits(
    task.train_examples(),
    {task.name: task.report_examples()},
    n_train=args.n_train,
    n_validation=8,
    n_calibration=0,
    seed=0,
    leaks="drop",
)
cfg = et.TrainConfig(epochs=2, batch_size=16, max_length=128, full_learning_rate=5e-5, seed=0)

for update in ("full", "lora"):
    model, tokenizer = et.load_model("minilm-l6", head=task.head, num_labels=task.num_labels)
    et.finetune(model, tokenizer, task, splits.train, cfg, folder=out / update, update=update)
    score = et.evaluate(
        model, tokenizer, task, splits.report[task.name], predictions=out / f"{update}.jsonl"
    )
    print(f"{update}: {score.metric} {score.value:.3f} ± {score.stderr:.3f} (n = {score.n})")

full, lora = (read_predictions(out / f"{update}.jsonl") for update in ("full", "lora"))
found = et.compare(METRICS[task.metric], full, lora)
print(
    f"full - lora: {found.difference:+.3f}, 95 % interval {found.low:+.3f} to {found.high:+.3f}, "
    f"p = {found.p:.2f}: {found.verdict}"
)
