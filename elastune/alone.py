"""What a super-network is held against: the sub-networks of its budgets, each trained by itself.

They begin from the same pruned weights and see the same batches, teacher and number of steps. What
the super-network saves is their training, one for each size; what it may cost is quality.
"""

from __future__ import annotations

from elastune.budgets import budgeted
from elastune.processes import together
from elastune.run import Run
from elastune.sampling import FixedSampler
from elastune.space import SearchSpace, SubnetConfig
from elastune.stages import fit
from elastune.subnetwork import extract_model
from elastune.trained import load_trained
from elastune.whole_model import WholeModel

PREFIX = "alone-"


def alone(run: Run) -> dict[str, SubnetConfig]:
    """Return what is trained alone, by the names of its rows; nothing unless the recipe asks."""
    if "alone" not in run.recipe.baselines:
        return {}
    return {f"{PREFIX}{name}": config for name, config in budgeted(run).items()}


def alone_inputs(run: Run, config: SubnetConfig) -> str:
    """Return the hash of what the outcome depends on."""
    return run.inputs("alone", config.to_json())


def train_alone(run: Run) -> None:
    """Train each of them; those that are done are skipped."""
    for name, config in alone(run).items():
        inputs = alone_inputs(run, config)
        if run.dir.is_done(name, inputs):
            continue
        with run.dir.stage(name, inputs, run.dir.baseline(name)):
            together(_train_one, run, name, dict(config))


def _train_one(run: Run, name: str, config: dict[str, int]) -> None:
    net = _cut(run, SubnetConfig(config))
    rate = run.train_config.full_learning_rate
    cfg = run.train_config.model_copy(update={"learning_rate": rate})
    fit(run, net, FixedSampler(), cfg, run.dir.baseline(name), name)


def load_alone(run: Run, name: str, config: SubnetConfig) -> WholeModel:
    """Load what `train_alone` trained.

    Raises:
        BadArtifact: it is missing or damaged.
    """
    net = _cut(run, config)
    load_trained(net, run.dir.baseline(name))
    return net


def _cut(run: Run, config: SubnetConfig) -> WholeModel:
    """Cut a sub-network out of the base, before any training."""
    base = run.load_sparse()
    dims = [dim for dim in run.space_of(base).dims if dim.kind != "rank"]
    own = SubnetConfig({dim.name: config[dim.name] for dim in dims})
    return WholeModel(extract_model(run.untrained(base, SearchSpace(dims)), own).model)
