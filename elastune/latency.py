"""How long a model takes: measured, side by side with others, or predicted from a table.

A figure belongs to its conditions: device, threads, batch, length. Machines drift while they
measure, so that what is to be compared is measured in turns, round by round, and ratios are taken
within a round. Processor time is kept beside wall time: on a CPU that other programs use too, it is
what can still be compared. `elastune.latency_table` predicts.

Prefill is one forward pass over a prompt that fills the cache, with the logits of the last token
alone; decoding is one token at a time after it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from elastune.decoding import evaluating, forward_parameters
from elastune.errors import BadRecipe
from elastune.models.architecture import type_of
from elastune.models.families import record_for
from elastune.space import SubnetConfig
from elastune.supernet import SuperNetwork

Measured = PreTrainedModel | SuperNetwork | tuple[SuperNetwork, SubnetConfig]
"""A plain model, a super-network as it is active, or with a configuration to be activated."""


@dataclass(frozen=True)
class Conditions:
    """What a latency is measured under.

    Attributes:
        batch: sequences at once.
        prompt_tokens: length of the prompts.
        new_tokens: steps that decoding is the mean of, the first with ``prompt_tokens`` in the
            cache; 0 leaves decoding out.
        repeats: rounds that are kept.
        warmup: rounds before them.

    Raises:
        BadRecipe: a number below what it can be.
    """

    batch: int = 1
    prompt_tokens: int = 256
    new_tokens: int = 8
    repeats: int = 7
    warmup: int = 2

    def __post_init__(self) -> None:
        least = {"batch": 1, "prompt_tokens": 1, "new_tokens": 0, "repeats": 1, "warmup": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise BadRecipe(f"{name} must be at least {bound}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Latency:
    """Measured times, in milliseconds for the whole batch.

    Attributes:
        prefill_samples_ms: of every round.
        decode_samples_ms: per token, of every round; empty where nothing was decoded.
        conditions: what they were measured under.
        device: ``"cpu"`` or the name of the GPU.
        threads: of the CPU, within an operation.
        processor: the same rounds in processor time, all threads together; None on a GPU.
    """

    prefill_samples_ms: tuple[float, ...]
    decode_samples_ms: tuple[float, ...]
    conditions: Conditions
    device: str
    threads: int
    processor: Latency | None = None

    @property
    def prefill_ms(self) -> float:
        """The median time until the logits of the prompt's last token."""
        return statistics.median(self.prefill_samples_ms)

    @property
    def prefill_iqr_ms(self) -> float:
        """The spread: third quartile less first."""
        return _iqr(self.prefill_samples_ms)

    @property
    def decode_ms_per_token(self) -> float | None:
        """The median time of one token for each sequence of the batch."""
        return statistics.median(self.decode_samples_ms) if self.decode_samples_ms else None

    @property
    def decode_iqr_ms(self) -> float | None:
        """The spread: third quartile less first."""
        return _iqr(self.decode_samples_ms) if self.decode_samples_ms else None

    def prefill_speed_up(self, other: Latency) -> float:
        """Return how many times faster than ``other``: the median of the rounds' ratios.

        Raises:
            BadRecipe: not measured side by side.
        """
        return _ratio(other.prefill_samples_ms, self.prefill_samples_ms)

    def decode_speed_up(self, other: Latency) -> float:
        """Return how many times faster than ``other`` a token is decoded, likewise."""
        return _ratio(other.decode_samples_ms, self.decode_samples_ms)


def _iqr(samples: Sequence[float]) -> float:
    if len(samples) < 2:
        return 0.0
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return third - first


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    if len(theirs) != len(ours) or not ours:
        raise BadRecipe(
            f"{len(theirs)} and {len(ours)} rounds were measured: no ratio within a round",
            try_="measure both in one call of compare_latency",
        )
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def measure_latency(model: Measured, conditions: Conditions | None = None) -> Latency:
    """Measure one model; encoders have no decoding.

    Raises:
        BadRecipe: longer than the model's context.
        UnsupportedModel: unknown family.
    """
    return compare_latency({"model": model}, conditions)["model"]


def compare_latency(
    models: Mapping[str, Measured], conditions: Conditions | None = None
) -> dict[str, Latency]:
    """Measure several models in turns, every other round in the opposite order.

    Args:
        models: name -> model; super-networks end as they were.
        conditions: the same for all.

    Returns:
        Name -> latency; ratios within a round are `Latency.prefill_speed_up`.
    """
    conditions = conditions or Conditions()
    plain = {name: _model_of(model) for name, model in models.items()}
    for model in plain.values():
        _check_length(model, conditions)
    samples: dict[str, list[_Sample]] = {name: [] for name in models}
    with ExitStack() as modes, torch.inference_mode():
        for model in {id(model): model for model in plain.values()}.values():
            modes.enter_context(evaluating(model))
        for number in range(conditions.warmup + conditions.repeats):
            names = list(models)
            for name in names if number % 2 == 0 else reversed(names):
                sample = _round(models[name], conditions)
                if number >= conditions.warmup:
                    samples[name].append(sample)
    return {name: _latency(plain[name], rows, conditions) for name, rows in samples.items()}


def prefill_latency_ms(
    model: PreTrainedModel, tokens: int, *, repeats: int = 7, warmup: int = 2
) -> float:
    """Measure one forward pass over ``tokens`` tokens, batch 1: the median, in milliseconds."""
    conditions = Conditions(1, tokens, 0, repeats, warmup)
    return measure_latency(model, conditions).prefill_ms


def device_name(device: torch.device) -> str:
    """Return ``"cpu"``, or what the GPU calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class _Sample(NamedTuple):
    """Milliseconds of one round: wall time and processor time."""

    prefill: tuple[float, float]
    decode: tuple[float, float] | None
    """Per token."""


def _latency(model: PreTrainedModel, rows: Sequence[_Sample], conditions: Conditions) -> Latency:
    def of(clock: int, processor: Latency | None) -> Latency:
        return Latency(
            tuple(row.prefill[clock] for row in rows),
            tuple(row.decode[clock] for row in rows if row.decode is not None),
            conditions,
            device_name(model.device),
            torch.get_num_threads(),
            processor,
        )

    return of(0, None if model.device.type == "cuda" else of(1, None))


def _model_of(measured: Measured) -> PreTrainedModel:
    net = measured[0] if isinstance(measured, tuple) else measured
    return net.model if isinstance(net, SuperNetwork) else net


def _check_length(model: PreTrainedModel, conditions: Conditions) -> None:
    length = conditions.prompt_tokens + conditions.new_tokens
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise BadRecipe(
            f"{conditions.prompt_tokens} tokens and {conditions.new_tokens} new ones do not fit "
            f"into the model's context of {longest}",
            try_="fewer prompt tokens or new tokens",
        )


def _round(measured: Measured, conditions: Conditions) -> _Sample:
    """Measure one prefill and the decoding after it."""
    if not isinstance(measured, tuple):
        return _time(_model_of(measured), conditions)
    net, config = measured
    with net.active(config):
        return _time(net.model, conditions)


def _time(model: PreTrainedModel, conditions: Conditions) -> _Sample:
    """Time one prefill and the decoding after it."""
    is_decoder = record_for(type_of(model)).kind == "decoder"
    inputs = _inputs(model, conditions)
    options: dict[str, object] = {}
    if "logits_to_keep" in forward_parameters(model):
        options["logits_to_keep"] = 1
    if is_decoder:
        options["use_cache"] = True
    started = _now(model.device)
    out = model(**inputs, **options)
    prefill = _since(started, model.device)
    if not is_decoder or conditions.new_tokens == 0:
        return _Sample(prefill, None)
    cache = out.past_key_values
    token = inputs["input_ids"][:, -1:]
    started = _now(model.device)
    for _ in range(conditions.new_tokens):
        model(input_ids=token, past_key_values=cache, **options)
    wall, processor = _since(started, model.device)
    return _Sample(prefill, (wall / conditions.new_tokens, processor / conditions.new_tokens))


def _now(device: torch.device) -> tuple[float, float]:
    """Return wall and processor time in seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def _since(started: tuple[float, float], device: torch.device) -> tuple[float, float]:
    """Return milliseconds gone by."""
    wall, processor = _now(device)
    return (wall - started[0]) * 1000, (processor - started[1]) * 1000


def _inputs(model: PreTrainedModel, conditions: Conditions) -> dict[str, Tensor]:
    """Return random tokens, or pictures of the model's own size."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size
        pixels = torch.randn(conditions.batch, config.num_channels, size, size, generator=generator)
        return {"pixel_values": pixels.to(model.device, model.dtype)}
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    shape = (conditions.batch, conditions.prompt_tokens)
    ids = torch.randint(0, vocabulary, shape, generator=generator)
    return {"input_ids": ids.to(model.device)}
