"""EFTNAS without the command line, on a decoder: a space made from importance, all weights trained.

    python examples/eftnas_in_python.py [--steps 40] [--out out]

Some ten minutes on two cores with the default 40 steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import elastune as et


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
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

    # What can go first, and what then: heads and channels, per MAC that is saved.
    texts = [example.prompt + example.completion for example in splits.calibration]
    rows = et.calibration_rows(texts, tokenizer, n_sequences=16, length=64, seed=0)
    scores = et.rank_in_rounds(model, rows, low=0.7, rounds=args.rounds)

    # One threshold on the scores for each of three sizes: together they are the space.
    made = et.space_from_importance(model, scores, points=[1.0, 0.85, 0.7], round_to=32)
    et.reorder_(model, scores)  # the best first; the model computes what it did
    et.drop_blocks_(model, made.removed_blocks)

    net = et.SuperNetwork(model, made.space, train_base=True)
    config = et.TrainConfig(
        max_steps=args.steps,
        batch_size=args.batch_size,
        update="full",
        full_learning_rate=5e-5,
        sampler="sandwich",
        distill={"teacher": "largest"},
    )
    examples = et.encode_all(splits.train, tokenizer, 256)
    sampler = et.SandwichSampler(made.space, seed=0)
    et.train(net, examples, sampler, config, folder=args.out / "supernet")

    cost = et.CostModel(net, 256)
    for point in made.points:
        small = et.extract_model(net, point.config)
        name = f"macs-{100 * point.target:.0f}"
        saved = et.save_subnetwork(small, tokenizer, args.out / name, origin="smollm2-135m")
        score = et.evaluate(small.model, tokenizer, task, report)
        count = cost(point.config)
        print(
            f"{name}: {score.metric} {score.value:.3f} ± {score.stderr:.3f}, "
            f"{count.params / 1e6:.1f} M parameters, {count.block_macs / 1e9:.2f} GMACs of blocks, "
            f"{saved.format}"
        )


if __name__ == "__main__":
    main()
