"""The named sub-networks of a run, and how they are written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastune.budgets import budget_name, budgeted
from elastune.errors import BadArtifact, BadRecipe
from elastune.export import save_compressed, save_subnetwork, snap_to_uniform
from elastune.export.card import adapter_card
from elastune.export.card_facts import run_facts
from elastune.extract import extract
from elastune.files import holding, read_json, write_text
from elastune.merge_report import merge_report
from elastune.run import Run
from elastune.search import SearchResult
from elastune.space import SearchSpace, SubnetConfig
from elastune.subnetwork import extract_model
from elastune.supernet import SuperNetwork

_FOLDER_NAME = re.compile(r"\w[\w.-]*")
ONLY_SCORED = ("front-", "random-best")
"""Sub-networks that are compared with the chosen ones, and written only when asked for."""


def chosen(run: Run) -> dict[str, SubnetConfig]:
    """Return the named sub-networks: largest, heuristic, smallest, and those of budgets and search.

    Of a search: the best within the limits, and within each budget; the best of a few random ones;
    members of the front, spread over its length. Plain fine-tuning has none.
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
        data = read_json(run.dir.trials)
        with holding(run.dir.trials):
            result = SearchResult.from_dict(data)
            if result.trials:
                best = result.best_within(_bounds(data))
                configs["best"] = best.config
                configs |= _best_within(run, result)
                configs |= _luckiest(data)
                configs |= _front(result, run.recipe.search.front, {*configs.values()})
    configs |= budgeted(run) | targeted(run)
    for name in configs:  # some come from files
        if not _FOLDER_NAME.fullmatch(name):
            raise BadArtifact(
                f"{run.dir.root} holds a sub-network called {name!r}, which is no name of a folder",
                try_="remove it from search/targets.json",
            )
    return configs


def targeted(run: Run) -> dict[str, SubnetConfig]:
    """Return the sub-networks that were chosen for targets after the search, by name."""
    if not run.dir.is_done("targets", run.inputs("train")):
        return {}
    with holding(run.dir.targets):
        found = read_json(run.dir.targets)["subnets"]
        return {name: SubnetConfig(row["config"]) for name, row in found.items()}


def _bounds(data: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return the limits of a finished search."""
    rows = data.get("about", {}).get("bounds", {})
    inf = float("inf")
    return {
        name: (-inf if low is None else low, inf if high is None else high)
        for name, (low, high) in rows.items()
    }


def _luckiest(data: Mapping[str, Any]) -> dict[str, SubnetConfig]:
    """Return the best of the random sub-networks that a search is compared with."""
    rows = data.get("about", {}).get("random", [])
    result = SearchResult.from_dict({"trials": rows})
    if all(trial.failed for trial in result.trials):
        return {}
    return {"random-best": result.best().config}


def _front(result: SearchResult, count: int, named: set[SubnetConfig]) -> dict[str, SubnetConfig]:
    """Return members of the front that have no name yet, spread over it by cost."""
    members = sorted(result.pareto(), key=lambda trial: tuple(trial.values.values())[::-1])
    members = [trial for trial in members if trial.config not in named]
    if count < len(members):
        places = [round(i * (len(members) - 1) / max(1, count - 1)) for i in range(count)]
        members = [members[place] for place in dict.fromkeys(places)]
    return {f"front-{trial.number}": trial.config for trial in members}


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
        if not all(trial.failed or trial.dropped for trial in fitting):
            best = result.best({"block_macs": limit})
            found[budget_name("best", budget)] = best.config
    return found


def extract_chosen(
    run: Run,
    configs: Mapping[str, SubnetConfig] | None = None,
    *,
    format: str | None = None,
    uniform: bool = False,
) -> list[Path]:
    """Write named sub-networks under ``subnets/`` and return their folders.

    Where only ranks are elastic, and merging keeps nothing, they are stock PEFT adapters for the
    base; else models of their own.

    Args:
        configs: name -> configuration; all that the run has chosen by default, those left out
            that are there to be compared with.
        format: of models; the recipe's by default.
        uniform: write the nearest with all blocks alike instead, as ``<name>-uniform``.

    Raises:
        BadRecipe: a format or ``uniform`` where adapters are written.
    """
    if configs is None:
        configs = {n: c for n, c in chosen(run).items() if not n.startswith(ONLY_SCORED)}
    recipe = run.recipe
    if not recipe.cuts_base and (uniform or (format is not None and not recipe.saves_models)):
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
    how_saved = format or (recipe.structure.format if recipe.structure else "auto")
    how = [[how_saved, recipe.merges]] if recipe.saves_models else []
    wanted = {name: run.inputs("train", config.to_json(), *how) for name, config in configs.items()}
    folders = [run.dir.subnets / name for name in configs]
    todo = {n: c for n, c in configs.items() if not run.dir.is_done(f"extract/{n}", wanted[n])}
    if not todo:
        return folders
    net = net or run.load_supernet()
    for name, config in todo.items():
        if not recipe.saves_models and not any(config.values()):
            run.reporter.say(f"{name}: every rank is 0, the base alone is this sub-network")
            continue
        if not any(shape is not None for shape in net.shapes(config)):
            run.reporter.say(f"{name}: every block is left out, there is nothing to write")
            continue
        folder = run.dir.subnets / name
        with run.dir.stage(f"extract/{name}", wanted[name], folder):
            if not recipe.saves_models:
                _save_adapter(run, net, name, config, folder)
                continue
            _save_model(run, net, name, config, folder, how_saved)
    return folders


def _save_adapter(
    run: Run, net: SuperNetwork, name: str, config: SubnetConfig, folder: Path
) -> None:
    """Write a sub-adapter, with a card that says what base it is for."""
    adapter, base = extract(net, config), str(run.dir.base.resolve())
    facts = run_facts(run.dir.root, name)
    text = adapter_card(
        adapter, net.model, folder=name, origin=run.recipe.model, base=base, facts=facts
    )
    adapter.save(folder, base=base)
    write_text(folder / "README.md", text)


def _save_model(
    run: Run, net: SuperNetwork, name: str, config: SubnetConfig, folder: Path, format: str
) -> None:
    """Write a sub-network that is a model of its own, and say what merging kept."""
    subnet = extract_model(net, config, merge=run.recipe.merges)
    if net.keep != "nothing":
        run.reporter.say(f"{name}: {merge_report(net, subnet)}")
    about: Any = {"origin": run.recipe.model, "facts": run_facts(run.dir.root, name)}
    if subnet.grids and format == "auto":
        saved = save_compressed(subnet, run.tokenizer, folder, **about)
    else:
        saved = save_subnetwork(subnet, run.tokenizer, folder, format=format, **about)
    run.reporter.say(f"{name}: {saved.format}, {saved.loads_with}")
    for note in saved.notes:
        run.reporter.say(f"{name}: {note}")


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
            f"{text!r} is neither {', '.join(named)}, best nor a JSON object of dim -> choice",
            try_="elastune runs RUN shows the names; JSON names every dim of RUN/space.json",
        )
    config = SubnetConfig.from_json(text)
    space.check(config)
    return config
