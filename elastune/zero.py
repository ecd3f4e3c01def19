"""DeepSpeed's ZeRO for what trains: its optimizer states in shards (stage 1), gradients too (2).

DeepSpeed sees the trained parameters alone, as a list: the model runs as ever, whatever
sub-network is active in it, and each draw's loss goes backward through DeepSpeed, which sums up the
gradients of a step and updates the weights at its end. Checkpoints hold the states whole, as those
of torch's AdamW, so that a run goes on with any number of processes, with or without DeepSpeed.

Source: Rajbhandari et al. 2020 (ZeRO).
"""

from __future__ import annotations

import importlib.metadata
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elastune import processes
from elastune.errors import BadRecipe
from elastune.space import SearchSpace

_NEEDED = (0, 19)
"""The first DeepSpeed that can leave it to its caller when a step is complete."""

_COUNT = "step"
"""The one state that is no tensor of a parameter's shape."""
_NEVER = 2**31


def check_zero(
    parameters: Sequence[nn.Parameter], space: SearchSpace | None, sampler: Any, precision: str
) -> None:
    """Refuse what ZeRO would train to other weights than one process.

    Its shards are flat: a parameter that no draw of a step used has a gradient of zero there, and
    moves on by its momentum, where it has none elsewhere, and stays.

    Raises:
        BadRecipe: a step may leave parameters unused; they are not in float32; losses would be
            scaled for float16; DeepSpeed is old.
    """
    version = importlib.metadata.version("deepspeed")
    if tuple(int(part) for part in version.split(".")[:2]) < _NEEDED:
        raise BadRecipe(
            f"DeepSpeed {version} cannot train several sub-networks in a step",
            try_="pip install -U deepspeed",
        )
    absent = [] if space is None else [dim.name for dim in space.dims if 0 in dim.choices]
    if absent and not getattr(sampler, "begins_with_largest", False):
        raise BadRecipe(
            f"DeepSpeed was asked for, and a step may leave out what {absent[0]} stands for: "
            "its weights would not stay where they are",
            try_="train.sampler=sandwich, whose every step has the largest sub-network, or "
            "accelerate launch --multi_gpu or --use_fsdp",
        )
    if precision == "fp16":
        raise BadRecipe(
            "DeepSpeed was asked for, which would scale losses for train.precision=fp16 itself",
            try_="train.precision=bf16 or fp32",
        )
    others = {str(p.dtype).removeprefix("torch.") for p in parameters if p.dtype != torch.float32}
    if others:
        raise BadRecipe(
            f"DeepSpeed was asked for, and trains float32 weights; these are {', '.join(others)}",
            try_="dtype=float32; train.precision=bf16 computes in bfloat16 all the same",
        )


class ZeroOptimizer(torch.optim.Optimizer):
    """Stands for an optimizer whose states, and at stage 2 gradients, are in shards.

    Args:
        optimizer: AdamW of the trained parameters, which has no states yet.
        stage: of ZeRO, 1 or 2.
        max_grad_norm: gradients are clipped to this norm over all processes; 0: not at all.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, stage: int, max_grad_norm: float) -> None:
        # No call of the base class: states and groups are those of the optimizer behind it.
        self._given = [{**group, "params": [*group["params"]]} for group in optimizer.param_groups]
        self._whole: dict[int, dict[str, Tensor]] = {}
        self._engine = _engine(optimizer, stage, max_grad_norm)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups whose learning rates count; DeepSpeed has none of those without parameters."""
        live = iter(self._engine.optimizer.param_groups)
        return [next(live) if given["params"] else given for given in self._given]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """This process's part of the states, by flat shard."""
        return self._engine.optimizer.optimizer.state  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the step; all processes call it as often."""
        self._engine.backward(self._engine(loss), scale_wrt_gas=False)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Average over processes, clip, update, and forget the gradients."""
        self._engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: `step` does."""

    def gather(self) -> None:
        """Bring the states together in process 0, for `state_dict`; all processes call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._whole = {}
        self._link()
        for number, parameter, shard in self._parameters():
            for name, part in sorted(self.state.get(shard, {}).items()):
                whole = part if name == _COUNT else safe_get_full_optimizer_state(parameter, name)
                if processes.is_main():
                    self._whole.setdefault(number, {})[name] = whole.detach().cpu().clone()

    def state_dict(self) -> dict[str, Any]:
        """Return what torch's optimizer would: whole states, as `gather` found them."""
        groups, start = [], 0
        for group, given in zip(self.param_groups, self._given, strict=True):
            stop = start + len(given["params"])
            groups.append({**group, "params": list(range(start, stop))})
            start = stop
        return {"state": self._whole, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this process's part of whole states, from however many processes."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for group, given in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in given.items() if name != "params"})
        if not state_dict["state"]:
            return
        first = next(iter(state_dict["state"].values()))
        for _, shard in self._shards():
            self.state[shard] = {
                name: value.clone() if name == _COUNT else torch.zeros_like(shard)
                for name, value in first.items()
            }
        self._link()
        for number, parameter, _ in self._parameters():
            for name, value in state_dict["state"].get(number, {}).items():
                if name != _COUNT:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the parameters."""
        self._engine.destroy()

    def _shards(self) -> list[tuple[list[nn.Parameter], Tensor]]:
        """Return each group's parameters, and this process's part of them, end to end."""
        owners = [given["params"] for given in self._given if given["params"]]
        return [*zip(owners, self._engine.optimizer.single_partition_of_fp32_groups, strict=True)]

    def _parameters(self) -> Iterator[tuple[int, nn.Parameter, Tensor]]:
        """Yield each parameter's number and itself, and the shard that it is in."""
        found = ((one, shard) for parameters, shard in self._shards() for one in parameters)
        yield from ((number, *pair) for number, pair in enumerate(found))

    def _link(self) -> None:
        """Tell each parameter where its states are; DeepSpeed does so for its first group alone."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for parameters, shard in self._shards():
            lazy_init_hp_params_optimizer_state(parameters, shard, self.state)


class _Trained(nn.Module):
    """What DeepSpeed takes for the model: what trains, and the identity."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.parameters_ = nn.ParameterList(parameters)

    def forward(self, loss: Tensor) -> Tensor:
        return loss


def _engine(optimizer: torch.optim.Optimizer, stage: int, max_grad_norm: float) -> Any:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it writes to the standard output
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # of no effect: losses come scaled
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step is complete when we say so
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": _NEVER,
    }
    trained = _Trained([p for group in optimizer.param_groups for p in group["params"]])
    engine, *_ = deepspeed.initialize(
        model=trained, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return engine
