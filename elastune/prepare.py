"""The stages before a super-network: what matters most in a model, and the space made from it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from elastune.allocate import single_choice_losses
from elastune.config import GenerateConfig, ImportanceConfig, StructureConfig
from elastune.cost import CostModel
from elastune.files import write_json
from elastune.generate_space import candidate_space, space_from_importance, space_from_losses
from elastune.generated import GeneratedSpace
from elastune.importance.movement import MovementPruning, MovementSettings
from elastune.importance.ranking import Ranking
from elastune.importance.structure import UnitScores, structure_scores
from elastune.importance.taylor import taylor_scores
from elastune.objective import make_objective
from elastune.processes import together
from elastune.rank_in_rounds import rank_in_rounds
from elastune.reorder import reorder_
from elastune.run import Run
from elastune.sampling import FixedSampler
from elastune.space import SubnetConfig
from elastune.stages import fit, sparsify, train_baseline
from elastune.supernet import SuperNetwork

_BATCH_TOKENS = 4096


def make_base(run: Run) -> None:
    """Do all that comes before a super-network; stages that are done are skipped."""
    if run.recipe.start != "model":
        train_baseline(run, run.recipe.start)
    score_importance(run)
    generate_space(run)
    sparsify(run)


def score_importance(run: Run) -> None:
    """Score heads and channels on training examples; skipped where no recipe asks for it."""
    cfg = run.recipe.importance
    inputs = run.inputs("importance")
    if cfg is None or run.dir.is_done("importance", inputs):
        return
    outputs = [run.dir.importance] + ([run.dir.movement] if cfg.method == "movement" else [])
    with run.dir.stage("importance", inputs, *outputs):
        ranking = _ranking(run, run.load_start(), cfg)
        ranking.save(
            run.dir.importance,
            {
                "model": run.recipe.model,
                "start": run.recipe.start,
                "task": run.recipe.task.name,
                "seed": run.recipe.seed,
                "importance": cfg.model_dump(mode="json"),
            },
        )


def _ranking(run: Run, model: PreTrainedModel, cfg: ImportanceConfig) -> Ranking:
    """Score units, or the single weights that they consist of."""
    if cfg.method == "magnitude":
        return Ranking.of_units(structure_scores(model, method="magnitude"))
    if cfg.method == "movement":
        return Ranking.of_weights(model, together(_movement, run), cfg.tie)
    batches = _batches(run, cfg)
    if cfg.method == "fisher":
        return Ranking.of_units(_fisher(run, model, batches, cfg))
    with run.reporter.bar(f"importance ({cfg.method})", "batches") as bar:

        def show(done: int) -> None:
            bar(done, len(batches))

        if cfg.method == "taylor":
            weights = taylor_scores(model, batches, head=run.head, progress=show)
            return Ranking.of_weights(model, weights, cfg.tie)
        scores = structure_scores(model, batches, cfg.method, head=run.head, progress=show)
    return Ranking.of_units(scores)


def _batches(run: Run, cfg: ImportanceConfig) -> list[dict[str, Any]]:
    """Return batches of training examples of like length."""
    head = run.head
    examples = run.splits.train[: cfg.examples]
    items = head.encode(examples, run.tokenizer, run.recipe.train.max_length)
    groups: list[list[Any]] = []
    for item in sorted(items, key=head.length):  # the longest of a batch is its last
        if not groups or head.length(item) * (len(groups[-1]) + 1) > _BATCH_TOKENS:
            groups.append([])
        groups[-1].append(item)
    return [head.collate(group) for group in groups]


def _fisher(
    run: Run, model: PreTrainedModel, batches: list[dict[str, Any]], cfg: ImportanceConfig
) -> UnitScores:
    """Score in rounds, down to the smallest sub-network of the recipe."""
    structure = run.recipe.structure
    generate = None if structure is None else structure.generate
    low = 0.2 if generate is None else generate.range[0]
    with run.reporter.bar("importance (fisher)", "rounds") as bar:
        return rank_in_rounds(
            model,
            batches,
            head=run.head,
            low=min(low, 0.99),
            rounds=cfg.rounds,
            cost="macs" if generate is None else generate.cost,
            tokens=run.recipe.evaluate.macs_length,
            progress=bar,
        )


def _movement(run: Run) -> dict[str, Tensor]:
    """Learn the scores of weights in a fine-tuning run, of a model of its own."""
    assert run.recipe.importance is not None
    own = run.recipe.importance.movement
    training = run.train_config.model_copy(
        update={
            "epochs": own.epochs,
            "max_steps": own.max_steps,
            "learning_rate": own.learning_rate,
            "update": "adapter",  # its learning rate is the one that counts
        }
    )
    settings = MovementSettings(
        warmup=own.warmup,
        regularisation=own.regularisation,
        score_learning_rate=own.score_learning_rate,
        block_size=own.block_size,
    )
    net = MovementPruning(run.load_start(), settings)
    fit(run, net, FixedSampler(), training, run.dir.movement, "importance (movement)")
    try:
        return net.scores()
    finally:
        net.unwrap()


def generate_space(run: Run) -> None:
    """Make the search space from what matters; skipped where the recipe writes it by hand."""
    structure = run.recipe.structure
    inputs = run.inputs("generate")
    if structure is None or structure.generate is None or run.dir.is_done("generate", inputs):
        return
    ranking = Ranking.load(run.dir.importance)
    model = run.load_start()
    by_threshold = structure.generate.by == "importance"
    outputs = [run.dir.generated] + ([] if by_threshold else [run.dir.generated_choices])
    with run.dir.stage("generate", inputs, *outputs):
        if by_threshold:
            found = _by_threshold(run, model, ranking, structure, structure.generate)
        else:
            reorder_(model, ranking.order)
            found = _by_knapsack(run, model, structure, structure.generate)
        write_json(run.dir.generated, found.to_dict())
    run.reporter.say(f"generated: {found.space!r}")
    if found.removed_blocks:
        numbers = ", ".join(map(str, found.removed_blocks))
        run.reporter.say(f"blocks {numbers} are in no point, and leave the base")


def _by_threshold(
    run: Run,
    model: PreTrainedModel,
    ranking: Ranking,
    structure: StructureConfig,
    cfg: GenerateConfig,
) -> GeneratedSpace:
    return space_from_importance(
        model,
        ranking.keep,
        cost=cfg.cost,
        low=cfg.range[0],
        high=cfg.range[1],
        points=cfg.points,
        tolerance=cfg.tolerance,
        tokens=run.recipe.evaluate.macs_length,
        round_to=structure.round_to,
        discard=cfg.discard,
        per_cost=cfg.per_cost,
    )


def _by_knapsack(
    run: Run, model: PreTrainedModel, structure: StructureConfig, cfg: GenerateConfig
) -> GeneratedSpace:
    """Measure single cuts of a model that is sorted, on validation examples."""
    candidates = candidate_space(model, round_to=structure.round_to)
    net = SuperNetwork(model, candidates)
    count = CostModel(net, run.recipe.evaluate.macs_length)
    objective, values = make_objective(
        net,
        run.tokenizer,
        run.task(run.recipe.task),
        run.splits.validation[: structure.probes],
        count,
        kind="loss",
        batch_tokens=run.recipe.evaluate.batch_tokens,
    )
    with run.reporter.bar("single choices", "choices") as bar:
        losses = single_choice_losses(
            lambda config: objective(config)[values[0]],
            candidates,
            path=run.dir.generated_choices,
            progress=bar,
        )
    in_blocks = sum(p.numel() for block in net.blocks for p in block.module.parameters())
    outside = count(candidates.largest()).params - in_blocks

    def cost(config: SubnetConfig) -> float:
        found = count(config)
        return float(found.block_macs if cfg.cost == "macs" else found.params - outside)

    return space_from_losses(
        candidates,
        losses,
        cost,
        low=cfg.range[0],
        high=cfg.range[1],
        points=cfg.points,
        tolerance=cfg.tolerance,
        unit=cfg.cost,
    )
