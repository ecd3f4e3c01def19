"""Latency of any sub-network from a table that is measured once on this device.

What a block's choice saves is measured on the super-network itself, with all equal blocks at that
choice, and shared out among them: weights then come from memory as they do in use, which a block
timed alone would find in the cache. Savings are taken to add up; `table_error` tells how well they
do. Where a family keeps several projections in one matrix, the super-network copies what is active
of it at every step, which an extracted model does not.

Deviation from tables of single operators (ProxylessNAS, HAT): whole forward passes are timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import transformers

from elastune.cost import cuts_of
from elastune.errors import BadArtifact, BadRecipe, InvalidSubnet
from elastune.files import read_json, write_json
from elastune.latency import Conditions, Latency, compare_latency, device_name
from elastune.space import SubnetConfig
from elastune.supernet import SuperNetwork
from elastune.version import __version__

_SCHEMA = 1


class PredictedLatency(NamedTuple):
    """Milliseconds for the whole batch."""

    prefill_ms: float
    decode_ms: float | None
    """Per token; None where the table was measured without decoding."""


Saving = tuple[float, float]
"""Milliseconds of prefill and per decoded token that one block takes more (less: negative)."""


@dataclass(frozen=True)
class LatencyTable:
    """What each choice of each block adds to the latency of the largest sub-network.

    Of sub-networks whose adapter is merged.

    Attributes:
        largest: milliseconds of prefill and per decoded token.
        has_decode: whether decoding was measured.
        dims: name of a dim -> choice -> saving of one block.
        blocks: for each block, the dims that cut it: one that leaves it out whole, and others.
        measured: device, conditions, threads, versions.
    """

    largest: Saving
    has_decode: bool
    dims: Mapping[str, Mapping[int, Saving]]
    blocks: Sequence[tuple[str | None, tuple[str, ...]]]
    measured: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def measure(
        cls,
        net: SuperNetwork,
        conditions: Conditions | None = None,
        *,
        clock: Literal["wall", "processor"] = "wall",
    ) -> LatencyTable:
        """Measure a super-network's choices, equal blocks together; adapters are off meanwhile.

        Args:
            net: with dims of structure; ends as it was.
            conditions: `Conditions` of every measurement.
            clock: what a millisecond is; processor time, on a CPU alone, is for machines that
                other programs use too.

        Raises:
            BadRecipe: nothing of the structure is elastic.
        """
        if net.structure is None:
            raise BadRecipe(
                "no dim cuts the model itself: all sub-networks take the same time once merged",
                try_="a space of structure_space",
            )
        conditions = conditions or Conditions()
        groups = _groups(net)
        largest = net.space.largest()
        wanted = {"largest": largest}
        for number, group in enumerate(groups):
            for choice in group.choices[1:]:
                config = SubnetConfig({**largest, **dict.fromkeys(group.dims, choice)})
                wanted[f"{number}:{choice}"] = config
        found = _measured(net, wanted, conditions, clock)
        base = found["largest"]
        dims: dict[str, dict[int, Saving]] = {}
        for number, group in enumerate(groups):
            table = {group.choices[0]: (0.0, 0.0)}
            for choice in group.choices[1:]:
                table[choice] = _saving(base, found[f"{number}:{choice}"], group.n_blocks)
            dims.update(dict.fromkeys(group.dims, table))
        cuts = [cuts_of(block, net.space) for block in net.blocks]
        rows = [
            (
                found_cuts["depth"].name if "depth" in found_cuts else None,
                tuple(dim.name for kind, dim in found_cuts.items() if kind != "depth"),
            )
            for found_cuts in cuts
        ]
        full = (base.prefill_ms, base.decode_ms_per_token or 0.0)
        about = _about(net, base, conditions) | {"clock": clock}
        return cls(full, bool(base.decode_samples_ms), dims, rows, about)

    def predict(self, config: SubnetConfig) -> PredictedLatency:
        """Return the latency of a sub-network, from sums alone.

        Raises:
            InvalidSubnet: a dim or choice that the table does not have.
        """
        prefill, decode = self.largest
        dims = self.dims
        try:
            for depth, cuts in self.blocks:
                if depth is not None and config[depth] == 0:
                    saving = dims[depth][0]
                    prefill += saving[0]
                    decode += saving[1]
                    continue
                for name in cuts:
                    saving = dims[name][config[name]]
                    prefill += saving[0]
                    decode += saving[1]
        except KeyError as error:
            raise InvalidSubnet(
                f"the latency table has nothing for {error} of {config.short()}",
                try_="measure a table for this space",
            ) from None
        return PredictedLatency(prefill, decode if self.has_decode else None)

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        write_json(Path(path), {"schema": _SCHEMA, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            BadArtifact: missing, or no such table.
        """
        data = read_json(Path(path))
        try:
            if data["schema"] != _SCHEMA:
                raise ValueError(f"schema {data['schema']}, this version reads {_SCHEMA}")
            dims = {
                str(name): {int(choice): (float(p), float(d)) for choice, (p, d) in table.items()}
                for name, table in data["dims"].items()
            }
            rows = [(depth, tuple(cuts)) for depth, cuts in data["blocks"]]
            prefill, decode = data["largest"]
            full = (float(prefill), float(decode))
            return cls(full, bool(data["has_decode"]), dims, rows, dict(data["measured"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadArtifact(
                f"{path} is not a latency table: {error!r}", try_="measure it again"
            ) from error


class PredictionError(NamedTuple):
    """How far predicted milliseconds are from measured ones."""

    median: float
    """Of |predicted / measured - 1|."""
    maximum: float
    spearman: float
    """Rank correlation; NaN for fewer than three sub-networks."""


class TableError(NamedTuple):
    """How well a table predicts."""

    n: int
    """Sub-networks measured."""
    prefill: PredictionError
    decode: PredictionError | None


def table_error(
    table: LatencyTable,
    net: SuperNetwork,
    configs: Sequence[SubnetConfig],
    conditions: Conditions | None = None,
) -> TableError:
    """Compare predictions with measurements of the same sub-networks.

    The largest is measured in turns with them, and all predictions scaled by it: what the machine
    has become slower or faster since the table was measured is not the table's fault.

    Args:
        table: measured under the same batch and lengths.
        net: the super-network; adapters are off meanwhile.
        configs: at least one sub-network.
        conditions: those of the table by default.
    """
    if not configs:
        raise BadRecipe(
            "no sub-network was given to compare predictions with", try_="a list of SubnetConfig"
        )
    conditions = conditions or Conditions(**table.measured["conditions"])
    wanted = {"largest": net.space.largest()} | {str(i): c for i, c in enumerate(configs)}
    found = _measured(net, wanted, conditions, table.measured["clock"])
    base = found.pop("largest")
    guesses = [table.predict(config) for config in configs]
    prefill_scale = base.prefill_ms / table.largest[0]
    prefill = _error(
        [guess.prefill_ms * prefill_scale for guess in guesses],
        [base.prefill_ms / latency.prefill_speed_up(base) for latency in found.values()],
    )
    if not table.has_decode or base.decode_ms_per_token is None:
        return TableError(len(configs), prefill, None)
    decode_ms = base.decode_ms_per_token
    decode_scale = decode_ms / table.largest[1]
    decode = _error(
        [(guess.decode_ms or 0.0) * decode_scale for guess in guesses],
        [decode_ms / latency.decode_speed_up(base) for latency in found.values()],
    )
    return TableError(len(configs), prefill, decode)


def _error(predicted: Sequence[float], measured: Sequence[float]) -> PredictionError:
    from scipy.stats import spearmanr

    gaps = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
    rank = float("nan")
    if len(measured) > 2 and np.ptp(predicted) > 0 and np.ptp(measured) > 0:
        rank = float(spearmanr(predicted, measured).statistic)
    return PredictionError(statistics.median(gaps), max(gaps), rank)


@dataclass
class _Group:
    """Dims of blocks that are alike, so that one measurement serves all."""

    choices: tuple[int, ...]
    dims: list[str] = field(default_factory=list)
    n_blocks: int = 0


def _groups(net: SuperNetwork) -> list[_Group]:
    """Return the dims of structure, those of like blocks together."""
    found: dict[Any, _Group] = {}
    seen: dict[str, _Group] = {}
    kinds = getattr(net.model.config, "layer_types", None)
    for block in net.blocks:
        for kind, dim in cuts_of(block, net.space).items():
            if dim.name not in seen:
                layer = kinds[block.index] if kinds else None
                key = (kind, dim.choices, block.shape, layer)
                group = found.setdefault(key, _Group(dim.choices))
                group.dims.append(dim.name)
                seen[dim.name] = group
            seen[dim.name].n_blocks += 1
    return list(found.values())


def _measured(
    net: SuperNetwork, wanted: Mapping[str, SubnetConfig], conditions: Conditions, clock: str
) -> dict[str, Latency]:
    """Measure sub-networks in turns, without their adapters."""
    with _without_adapters(net):
        found = compare_latency({name: (net, c) for name, c in wanted.items()}, conditions)
    if clock == "wall":
        return found
    by_processor = {name: lat.processor for name, lat in found.items() if lat.processor is not None}
    if clock != "processor" or len(by_processor) < len(found):
        raise BadRecipe(f"clock is 'wall', or on a CPU 'processor'; got {clock!r}")
    return by_processor


@contextmanager
def _without_adapters(net: SuperNetwork) -> Iterator[None]:
    """Take the adapters off, as if they were merged."""
    for name, adapter in net.adapters.items():
        net.model.set_submodule(name, adapter.base)
    try:
        yield
    finally:
        for name, adapter in net.adapters.items():
            net.model.set_submodule(name, adapter)


def _saving(base: Latency, other: Latency, n_blocks: int) -> Saving:
    """Return what one of several blocks adds to ``base``, from ratios within the rounds."""
    prefill = base.prefill_ms * (1 / other.prefill_speed_up(base) - 1)
    if base.decode_ms_per_token is None:
        return prefill / n_blocks, 0.0
    decode = base.decode_ms_per_token * (1 / other.decode_speed_up(base) - 1)
    return prefill / n_blocks, decode / n_blocks


def _about(net: SuperNetwork, base: Latency, conditions: Conditions) -> dict[str, Any]:
    """Return what a table's figures belong to."""
    return {
        "device": device_name(net.model.device),
        "dtype": str(net.model.dtype).removeprefix("torch."),
        "attention": getattr(net.model.config, "_attn_implementation", None),
        "threads": base.threads,
        "conditions": asdict(conditions),
        "prefill_iqr_ms": base.prefill_iqr_ms,
        "decode_iqr_ms": base.decode_iqr_ms,
        "versions": {
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "elastune": __version__,
        },
    }
