"""What sub-networks of a run cost and what the full model costs: by count, and by a table of times.

Latencies are measured once, choice by choice, and added up (`elastune.latency_table`): a search
asks for thousands.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from elastune.budgets import cost_model
from elastune.cost import model_cost
from elastune.errors import BadRecipe
from elastune.files import read_json, write_json
from elastune.latency import Conditions, measure_latency
from elastune.latency_table import LatencyTable
from elastune.run import Run
from elastune.space import SubnetConfig
from elastune.supernet import SuperNetwork

LATENCIES = ("latency_ms", "decode_latency_ms")


class SearchCosts:
    """Configuration -> cost by name: all counts, and latencies where a table is given."""

    def __init__(self, run: Run, net: SuperNetwork, table: LatencyTable | None = None) -> None:
        self._count = cost_model(run, net)
        self._table = table

    def __call__(self, config: SubnetConfig) -> dict[str, float]:
        """Return every cost of a sub-network; latencies in milliseconds."""
        found = {name: float(value) for name, value in vars(self._count(config)).items()}
        if self._table is not None:
            latency = self._table.predict(config)
            found["latency_ms"] = latency.prefill_ms
            if latency.decode_ms is not None:
                found["decode_latency_ms"] = latency.decode_ms
        return found


def search_costs(run: Run, net: SuperNetwork, names: Collection[str]) -> SearchCosts:
    """Return the costs of a run's sub-networks; the table of times is measured if it is needed.

    Args:
        run: keeps the table.
        net: its super-network; ends as it was.
        names: of the costs that are asked for.

    Raises:
        BadRecipe: a latency where nothing of the structure is elastic.
    """
    if not set(names) & set(LATENCIES):
        return SearchCosts(run, net)
    if net.structure is None:
        raise BadRecipe(
            "search by latency: only ranks are elastic, and merged adapters take no time",
            try_="search.cost=params, or a section structure",
        )
    inputs = run.inputs("latency table")
    if not run.dir.is_done("latency table", inputs):
        with run.dir.stage("latency table", inputs, run.dir.latency_table):
            run.reporter.say("measuring the latency of every choice on this device")
            conditions = Conditions(prompt_tokens=run.recipe.evaluate.macs_length)
            LatencyTable.measure(net, conditions).save(run.dir.latency_table)
    return SearchCosts(run, net, LatencyTable.load(run.dir.latency_table))


def full_costs(run: Run, names: Collection[str]) -> Mapping[str, float]:
    """Return what the model costs that the super-network begins as: 100 % of every limit.

    Counted and measured once in a run.
    """
    wants_latency = bool(set(names) & set(LATENCIES))
    inputs = run.inputs("full costs", wants_latency)
    if not run.dir.is_done("full costs", inputs):
        with run.dir.stage("full costs", inputs, run.dir.full_costs):
            model = run.load_start()
            length = run.recipe.evaluate.macs_length
            found = {name: float(v) for name, v in vars(model_cost(model, length)).items()}
            if wants_latency:
                latency = measure_latency(model, Conditions(prompt_tokens=length))
                found["latency_ms"] = latency.prefill_ms
                if latency.decode_ms_per_token is not None:
                    found["decode_latency_ms"] = latency.decode_ms_per_token
            write_json(run.dir.full_costs, {"schema": 1, "costs": found})
    costs: dict[str, float] = read_json(run.dir.full_costs)["costs"]
    return costs
