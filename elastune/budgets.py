"""Sub-networks for the budgets of a recipe: knapsacks, points of the space, equal cuts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from elastune.allocate import CostOf, allocate, single_choice_losses, uniform_config
from elastune.cost import CostModel, model_cost
from elastune.errors import BadRecipe
from elastune.estimate_losses import estimate_choice_losses
from elastune.files import read_json, write_json
from elastune.heads import HEADS
from elastune.likelihood import batches_by_length
from elastune.objective import make_objective
from elastune.outcomes import MAX_TOKENS
from elastune.run import Run
from elastune.space import SearchSpace, SubnetConfig
from elastune.supernet import SuperNetwork

_BATCH_TOKENS = 2048
"""Of a batch whose gradients are taken: activations of a training step are alive."""
_SUBNETS = 16
"""In which losses are estimated: so many batches, where there are as many examples."""


def allocate_budgets(run: Run) -> None:
    """Choose a sub-network for each budget of the recipe, without training any again.

    Ranks stay at their largest: where the adapter is merged they cost nothing.
    """
    cfg = run.recipe.structure
    inputs = run.inputs("allocate")
    if cfg is None or not cfg.budgets or run.dir.is_done("allocate", inputs):
        return
    net = run.load_supernet()
    largest = net.space.largest()
    cuts = cuts_of_model(net.space)
    count = cost_model(run, net)

    def block_macs(config: SubnetConfig) -> float:
        return float(count(SubnetConfig({**largest, **config})).block_macs)

    full = full_block_macs(run) or block_macs(largest)
    losses = single_choices(run, net, cuts, cfg.probes) if "knapsack" in cfg.allocation else {}
    with run.dir.stage("allocate", inputs, run.dir.budgets):
        found: dict[str, dict[str, int]] = {}
        for budget in cfg.budgets:
            for how in cfg.allocation:
                if how == "knapsack":
                    config = allocate(cuts, losses, block_macs, budget * full)
                elif how == "points":
                    config = _nearest_point(run, budget)
                else:
                    config = uniform_config(cuts, block_macs, budget * full)
                found[budget_name(how, budget)] = {**largest, **config}
        write_json(run.dir.budgets, {"schema": 1, "full_block_macs": full, "subnets": found})


def budgeted(run: Run) -> dict[str, SubnetConfig]:
    """Return the sub-networks that were chosen for the recipe's budgets, by name."""
    if run.recipe.structure is None or not run.dir.is_done("allocate", run.inputs("allocate")):
        return {}
    found = read_json(run.dir.budgets)["subnets"]
    return {name: SubnetConfig(choices) for name, choices in found.items()}


def check_budgets(run: Run, model: PreTrainedModel, space: SearchSpace | None) -> None:
    """See that there are sub-networks for the recipe's budgets; the model ends as it was.

    Raises:
        BadRecipe: a budget is below what the smallest sub-network has of the blocks' MACs.
    """
    cfg = run.recipe.structure
    if cfg is None or not cfg.budgets or run.dir.is_done("allocate", run.inputs("allocate")):
        return
    if space is None:  # still to be generated, between bounds that the recipe gives
        return
    cuts = cuts_of_model(space)
    net = SuperNetwork(model, cuts)
    count = cost_model(run, net)
    net.unwrap()
    least = dict(cuts.smallest())
    if "uniform" in cfg.allocation:  # equal cuts leave no block out
        least |= {dim.name: 1 for dim in cuts.dims if dim.kind == "depth"}
    smallest = count(SubnetConfig(least)).block_macs / count(cuts.largest()).block_macs
    wrong = [budget for budget in cfg.budgets if budget < smallest]
    if wrong:
        raise BadRecipe(
            f"structure.budgets: {', '.join(map(str, wrong))} cannot be met, the smallest "
            f"sub-network has {smallest:.3f} of the blocks' MACs",
            try_="smaller choices in structure, or larger budgets",
        )


def single_choices(
    run: Run, net: SuperNetwork, cuts: SearchSpace, probes: int
) -> dict[str, dict[int, float]]:
    """Measure what each choice of the structure costs by itself, in nats per target."""
    largest = net.space.largest()
    objective, values = make_objective(
        net,
        run.tokenizer,
        run.task(run.recipe.task),
        run.splits.validation[:probes],
        cost_model(run, net),
        kind="loss",
        batch_tokens=run.recipe.evaluate.batch_tokens,
    )
    # A stage of its own: other budgets need no other measurements.
    inputs = run.inputs("single choices", probes)
    run.dir.is_done("single choices", inputs)  # refuses what changed since
    with (
        run.dir.stage("single choices", inputs, run.dir.single_choices),
        run.reporter.bar("single choices", "choices") as bar,
    ):
        return single_choice_losses(
            lambda config: objective(SubnetConfig({**largest, **config}))[values[0]],
            cuts,
            path=run.dir.single_choices,
            progress=bar,
        )


def estimated_choices(
    run: Run, net: SuperNetwork, probes: int, cost: str, cost_of: CostOf
) -> dict[str, dict[int, float]]:
    """Estimate what single choices cost, in nats per target, in sub-networks of all sizes.

    Args:
        run: whose validation examples are read.
        net: the super-network.
        probes: so many of the examples.
        cost: name of what ``cost_of`` counts.
        cost_of: says how large a sub-network is.
    """
    path = run.dir.estimated_losses(cost)
    inputs = run.inputs("single choices", "estimated", probes, cost)
    if not run.dir.is_done(f"estimated losses, {cost}", inputs):
        task = run.task(run.recipe.task)
        head = HEADS[task.head]
        length = getattr(task, "max_length", MAX_TOKENS)
        items = head.encode(run.splits.validation[:probes], run.tokenizer, length)
        lengths = [head.length(item) for item in items]
        tokens = min(_BATCH_TOKENS, max(sum(lengths) // _SUBNETS, 1))
        batches = [head.collate([items[i] for i in b]) for b in batches_by_length(lengths, tokens)]
        with (
            run.dir.stage(f"estimated losses, {cost}", inputs, path),
            run.reporter.bar("estimate losses", "batches") as bar,
        ):
            found = estimate_choice_losses(
                net, batches, head, cost_of=cost_of, progress=lambda n: bar(n, len(batches))
            )
            write_json(path, {"schema": 2, "cost": cost, "losses": found})
    losses = read_json(path)["losses"]
    return {name: {int(choice): of[choice] for choice in of} for name, of in losses.items()}


def cost_model(run: Run, net: SuperNetwork) -> CostModel:
    """Return what counts the cost of the run's sub-networks as they are saved."""
    # Adapters that keep zeros cost as much at every rank once they are merged; a search that minds
    # their cost means that of training and storing them.
    merged = run.recipe.merges and run.recipe.cuts_base
    return CostModel(net, run.recipe.evaluate.macs_length, merged=merged)


def full_block_macs(run: Run) -> float | None:
    """Return the MACs of all blocks, where the largest sub-network may be less than that."""
    structure = run.recipe.structure
    if structure is None or structure.generate is None:
        return None
    return float(model_cost(run.load_start(), run.recipe.evaluate.macs_length).block_macs)


def budget_name(how: str, budget: float) -> str:
    """Return what the sub-network for a budget is called, such as ``knapsack-75``."""
    return f"{how}-{100 * budget:.6g}"


def _nearest_point(run: Run, budget: float) -> SubnetConfig:
    """Return the point of the generated space whose target is nearest to a budget."""
    return min(run.generated.points, key=lambda point: abs(point.target - budget)).config


def cuts_of_model(space: SearchSpace) -> SearchSpace:
    """Return the dims that cut the model itself; zeros take no MACs away."""
    return SearchSpace([dim for dim in space.dims if dim.kind not in ("rank", "density")])


def space_ends(run: Run, model: PreTrainedModel, space: SearchSpace) -> dict[str, dict[str, Any]]:
    """Return what the largest, the heuristic and the smallest sub-network cost, untrained."""
    count = cost_model(run, run.untrained(model, space))
    ends = {
        "largest": space.largest(),
        "heuristic": space.heuristic(),
        "smallest": space.smallest(),
    }
    return {name: asdict(count(config)) for name, config in ends.items()}
