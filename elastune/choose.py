"""The stages that choose sub-networks of a trained super-network, and write the chosen ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from elastune.allocate import allocate, single_choice_losses, uniform_config
from elastune.cost import CostModel, model_cost
from elastune.errors import BadRecipe
from elastune.export import save_subnetwork, snap_to_uniform
from elastune.extract import extract
from elastune.files import read_json, write_json
from elastune.objective import make_objective
from elastune.run import Run
from elastune.search import SearchResult
from elastune.search import search as search_space
from elastune.space import SearchSpace, SubnetConfig
from elastune.subnetwork import extract_model
from elastune.supernet import SuperNetwork


def search(run: Run) -> SearchResult:
    """Score configurations on the validation examples; none where the recipe has no trials."""
    cfg = run.recipe.search
    if cfg.trials == 0:
        return SearchResult(())
    inputs = run.inputs("search")
    if run.dir.is_done("search", inputs):
        return SearchResult.from_dict(read_json(run.dir.trials))
    net = run.load_supernet()
    objective, values = make_objective(
        net,
        run.tokenizer,
        run.task(run.recipe.task),
        run.splits.validation,
        _cost_model(run, net),
        kind=cfg.objective,
        against=cfg.cost,
        batch_tokens=run.recipe.evaluate.batch_tokens,
    )
    with (
        run.dir.stage("search", inputs, run.dir.trials, run.dir.journal),
        run.reporter.bar(f"search ({cfg.algorithm})", "trials") as bar,
    ):
        result = search_space(
            net.space,
            objective,
            values=values,
            algorithm=cfg.algorithm,
            trials=cfg.trials,
            storage=run.dir.journal,
            seed=run.recipe.seed,
            start=[*budgeted(run).values()],
            progress=lambda done, total, trial: bar(
                done, total, f"{values[0]} {trial.values[values[0]]:.4f}"
            ),
        )
        write_json(run.dir.trials, result.to_dict())
    return result


def _cost_model(run: Run, net: SuperNetwork) -> CostModel:
    structure = run.recipe.structure
    merged = structure is not None and structure.merge
    return CostModel(net, run.recipe.evaluate.macs_length, merged=merged)


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
    cuts = _cuts(net.space)
    count = _cost_model(run, net)

    def block_macs(config: SubnetConfig) -> float:
        return float(count(SubnetConfig({**largest, **config})).block_macs)

    full = _full_block_macs(run) or block_macs(largest)
    losses = _single_choice_losses(run, net, cuts) if "knapsack" in cfg.allocation else {}
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
                found[_named(how, budget)] = {**largest, **config}
        write_json(run.dir.budgets, {"schema": 1, "full_block_macs": full, "subnets": found})


def _full_block_macs(run: Run) -> float | None:
    """Return the MACs of all blocks, where the largest sub-network may be less than that."""
    structure = run.recipe.structure
    if structure is None or structure.generate is None:
        return None
    return float(model_cost(run.load_start(), run.recipe.evaluate.macs_length).block_macs)


def _named(how: str, budget: float) -> str:
    return f"{how}-{100 * budget:.6g}"


def _nearest_point(run: Run, budget: float) -> SubnetConfig:
    """Return the point of the generated space whose target is nearest to a budget."""
    return min(run.generated.points, key=lambda point: abs(point.target - budget)).config


def budgeted(run: Run) -> dict[str, SubnetConfig]:
    """Return the sub-networks that were chosen for the recipe's budgets, by name."""
    if run.recipe.structure is None or not run.dir.is_done("allocate", run.inputs("allocate")):
        return {}
    found = read_json(run.dir.budgets)["subnets"]
    return {name: SubnetConfig(choices) for name, choices in found.items()}


def _cuts(space: SearchSpace) -> SearchSpace:
    """Return the dims that cut the model itself."""
    return SearchSpace([dim for dim in space.dims if dim.kind != "rank"])


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
    cuts = _cuts(space)
    net = SuperNetwork(model, cuts)
    count = _cost_model(run, net)
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


def _single_choice_losses(
    run: Run, net: SuperNetwork, cuts: SearchSpace
) -> dict[str, dict[int, float]]:
    """Measure what each choice of the structure costs by itself, in nats per target."""
    cfg = run.recipe.structure
    assert cfg is not None
    largest = net.space.largest()
    objective, values = make_objective(
        net,
        run.tokenizer,
        run.task(run.recipe.task),
        run.splits.validation[: cfg.probes],
        _cost_model(run, net),
        kind="loss",
        batch_tokens=run.recipe.evaluate.batch_tokens,
    )
    # A stage of its own: other budgets need no other measurements.
    with (
        run.dir.stage("single choices", run.inputs("single choices"), run.dir.single_choices),
        run.reporter.bar("single choices", "choices") as bar,
    ):
        return single_choice_losses(
            lambda config: objective(SubnetConfig({**largest, **config}))[values[0]],
            cuts,
            path=run.dir.single_choices,
            progress=bar,
        )


def chosen(run: Run) -> dict[str, SubnetConfig]:
    """Return the named sub-networks: largest, heuristic, smallest, best if searched, and budgets'.

    Plain fine-tuning has none.
    """
    if run.recipe.method == "finetune":
        return {}
    space = SearchSpace.from_dict(read_json(run.dir.space))
    configs = {
        "largest": space.largest(),
        "heuristic": space.heuristic(),
        "smallest": space.smallest(),
    }
    if run.dir.is_done("search", run.inputs("search")):
        result = SearchResult.from_dict(read_json(run.dir.trials))
        if result.trials:
            configs["best"] = result.best().config
            configs |= _best_within(run, result)
    return configs | budgeted(run)


def _best_within(run: Run, result: SearchResult) -> dict[str, SubnetConfig]:
    """Return the best trial within each of the recipe's budgets, where the search looked at them.

    A budget that no trial meets has none.
    """
    structure = run.recipe.structure
    if structure is None or run.recipe.search.cost != "block_macs" or not budgeted(run):
        return {}
    full = read_json(run.dir.budgets)["full_block_macs"]
    found = {}
    for budget in structure.budgets:
        limit = budget * full * (1 + structure.budget_slack)
        fitting = (t for t in result.trials if t.values["block_macs"] <= limit)
        if not all(trial.failed for trial in fitting):
            found[_named("best", budget)] = result.best({"block_macs": limit}).config
    return found


def extract_chosen(
    run: Run,
    configs: Mapping[str, SubnetConfig],
    *,
    format: str | None = None,
    uniform: bool = False,
) -> list[Path]:
    """Write named sub-networks under ``subnets/`` and return their folders.

    Where only ranks are elastic they are stock PEFT adapters for the base; else models of their
    own.

    Args:
        configs: name -> configuration.
        format: of models; the recipe's by default.
        uniform: write the nearest with all blocks alike instead, as ``<name>-uniform``.

    Raises:
        BadRecipe: a format or ``uniform`` where adapters are written.
    """
    structure = run.recipe.structure
    if structure is None and (format is not None or uniform):
        raise BadRecipe(
            "only ranks are elastic in this run: adapters have one format and no blocks to cut",
            try_="leave --format and --uniform out",
        )
    net = None
    if uniform:
        net = run.load_supernet()
        configs = {
            f"{name}-uniform": snap_to_uniform(net.space, config, net.model)
            for name, config in configs.items()
        }
    how = [] if structure is None else [[format or structure.format, structure.merge]]
    wanted = {name: run.inputs("train", config.to_json(), *how) for name, config in configs.items()}
    folders = [run.dir.subnets / name for name in configs]
    todo = {n: c for n, c in configs.items() if not run.dir.is_done(f"extract/{n}", wanted[n])}
    if not todo:
        return folders
    net = net or run.load_supernet()
    for name, config in todo.items():
        if net.structure is None and not any(config.values()):
            run.reporter.say(f"{name}: every rank is 0, the base alone is this sub-network")
            continue
        if not any(shape is not None for shape in net.shapes(config)):
            run.reporter.say(f"{name}: every block is left out, there is nothing to write")
            continue
        folder = run.dir.subnets / name
        with run.dir.stage(f"extract/{name}", wanted[name], folder):
            if structure is None:
                extract(net, config).save(folder, base=str(run.dir.base.resolve()))
                continue
            subnet = extract_model(net, config, merge=structure.merge)
            how_saved = format or structure.format
            origin = run.recipe.model
            saved = save_subnetwork(subnet, run.tokenizer, folder, format=how_saved, origin=origin)
            run.reporter.say(f"{name}: {saved.format}, {saved.loads_with}")
            for note in saved.notes:
                run.reporter.say(f"{name}: {note}")
    return folders


def named_config(space: SearchSpace, text: str) -> SubnetConfig:
    """Read a configuration given as largest, heuristic, smallest, or JSON.

    Raises:
        BadRecipe: none of these.
        InvalidSubnet: JSON, but not in the space.
    """
    named = {
        "largest": space.largest,
        "heuristic": space.heuristic,
        "smallest": space.smallest,
    }
    if text in named:
        return named[text]()
    if not text.lstrip().startswith("{"):
        raise BadRecipe(
            f"{text!r} is neither {', '.join(named)}, best nor a JSON object of dim -> choice"
        )
    config = SubnetConfig.from_json(text)
    space.check(config)
    return config
