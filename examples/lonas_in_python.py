"""LoNAS without the command line: an elastic base, and smaller models cut out of it.

    python examples/lonas_in_python.py [--steps 40] [--out out]

About five minutes on two cores with the default 40 steps.
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

    # The best heads and channels first; the model computes what it did.
    texts = [example.prompt + example.completion for example in splits.calibration]
    rows = et.calibration_rows(texts, tokenizer, n_sequences=8, length=128, seed=0)
    et.reorder_(model, et.structure_scores(model, rows, "wanda"))

    ranks = et.lora_space(model, ranks=(32, 28))
    widths = et.structure_space(model, ffn=[1.0, 0.75, 0.5], heads=[1.0, 0.67])
    space = ranks + widths
    net = et.SuperNetwork(model, space, alpha=64)
    examples = et.encode_all(splits.train, tokenizer, 256)
    config = et.TrainConfig(max_steps=args.steps, batch_size=args.batch_size, learning_rate=1e-3)
    sampler = et.RandomSampler(space, seed=0)
    et.train(net, examples, sampler, config, folder=args.out / "supernet")

    # Where to cut: what each choice loses alone, then the best sum of them that fits the budget.
    objective, _ = et.make_objective(
        net, tokenizer, task, splits.validation[:8], et.CostModel(net, 256), kind="loss"
    )
    cost = et.CostModel(net, 256, merged=True)
    largest = space.largest()

    def whole(cuts: et.SubnetConfig) -> et.SubnetConfig:
        return et.SubnetConfig({**largest, **cuts})

    losses = et.single_choice_losses(lambda cuts: objective(whole(cuts))["loss"], widths)
    budget = 0.75 * cost(largest).block_macs
    cuts = et.allocate(widths, losses, lambda cuts: cost(whole(cuts)).block_macs, budget)

    chosen = {"largest": largest, "heuristic": space.heuristic(), "budget-75": whole(cuts)}
    for name, subnet in chosen.items():
        small = et.extract_model(net, subnet)
        score = et.evaluate(small.model, tokenizer, task, report)
        size = et.model_cost(small.model, 256)
        saved = et.save_subnetwork(small, tokenizer, args.out / name)
        sizes = f"{size.params / 1e6:.1f} M parameters, {size.macs / 1e9:.1f} GMACs"
        print(f"{name}: {score.value:.1%} ± {score.stderr:.1%}, {sizes}; {saved.loads_with}")


if __name__ == "__main__":
    main()
