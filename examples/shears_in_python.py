"""Shears without the command line: sparsify, train an elastic adapter, extract a part of it.

    python examples/shears_in_python.py [--steps 40] [--out out]

About three minutes on two cores with the default 40 steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import elastune as et


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--n-report", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()

    model, tokenizer = et.load_model("smollm2-135m")
    task = et.get_task(
        "reasoning_gym:chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=2, size=1200
    )
    report = task.report_examples()[: args.n_report]
    splits = et.make_splits(
        task.train_examples(),
        {task.name: task.report_examples()},
        n_train=max(64, args.steps * args.batch_size),
        n_validation=32,
        n_calibration=64,
        seed=0,
    )

    texts = [example.prompt + example.completion for example in splits.calibration]
    rows = et.calibration_rows(texts, tokenizer, n_sequences=8, length=128, seed=0)
    et.sparsify_(model, "wanda", et.Sparsity(0.5), rows)
    print(f"sparse, untuned: {et.evaluate(model, tokenizer, task, report).value:.1%}")

    space = et.lora_space(model, ranks=(32, 24, 16))
    net = et.SuperNetwork(model, space, alpha=64)
    examples = et.encode_all(splits.train, tokenizer, 256)
    config = et.TrainConfig(max_steps=args.steps, batch_size=args.batch_size, learning_rate=1e-3)
    sampler = et.RandomSampler(space, seed=0)
    et.train(net, examples, sampler, config, folder=args.out / "supernet")

    for name, subnet in {"largest": space.largest(), "heuristic": space.heuristic()}.items():
        with net.active(subnet):
            score = et.evaluate(net.model, tokenizer, task, report)
        print(f"{name}: {score.value:.1%} ± {score.stderr:.1%}")
        et.extract(net, subnet).save(args.out / name)
    et.save_model(net.unwrap(), tokenizer, args.out / "base")
    print(f"adapters and sparse base: {args.out}")


if __name__ == "__main__":
    main()
