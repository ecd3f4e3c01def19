"""Latencies by a clock that the test winds, and tables of them."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import AUTO, fill_adapters, tiny_model

from elastune.build_space import lora_space
from elastune.build_structure import structure_space
from elastune.errors import BadArtifact, BadRecipe, InvalidSubnet
from elastune.latency import (
    Conditions,
    Latency,
    compare_latency,
    measure_latency,
    prefill_latency_ms,
)
from elastune.latency_table import LatencyTable, table_error
from elastune.space import SubnetConfig
from elastune.supernet import SuperNetwork

CONDITIONS = Conditions(batch=2, prompt_tokens=8, new_tokens=3, repeats=4, warmup=1)


class Work:
    """A clock that goes forward by the work done: a tiny model's own time is all noise.

    A token of a block takes 1 ms, 0.1 ms for each of its query heads, and 0.01 ms for each channel
    of its feed-forward; a token of the embedding takes 2 ms.
    """

    def __init__(self, model: Any, drift: float = 0.0) -> None:
        self.ms = 0.0
        self.drift = drift
        model.get_input_embeddings().register_forward_hook(lambda *call: self.add(call[2], 2.0))
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda *call: self.add(call[2], 1.0))
            layer.mlp.act_fn = _Counted(layer.mlp.act_fn, self, 0.01)
            layer.self_attn.o_proj.register_forward_hook(
                lambda module, args, out: self.add(args[0], 0.1 * args[0].shape[-1] / 8)
            )

    def add(self, hidden: torch.Tensor, ms: float) -> None:
        self.ms += ms * hidden.shape[0] * hidden.shape[1] * (1 + self.drift * self.ms)

    def seconds(self) -> float:
        return self.ms / 1000


class _Counted(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module, work: Work, ms: float) -> None:
        super().__init__()
        self.inner, self.ms = inner, ms
        self.__dict__["work"] = work

    def forward(self, x: torch.Tensor) -> Any:
        self.work.add(x, self.ms * x.shape[-1])
        return self.inner(x)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def wind(work: Work) -> None:
        monkeypatch.setattr("elastune.latency.time.perf_counter", work.seconds)
        monkeypatch.setattr("elastune.latency.time.process_time", lambda: work.seconds() / 2)

    return wind  # type: ignore[return-value]


def structure_net(**options: Any) -> SuperNetwork:
    model = tiny_model("llama", num_hidden_layers=4)
    space = lora_space(model, [4, 2]) + structure_space(
        model, ffn=[48, 32, 16], heads=[4, 2], depth=[1, 2], round_to=8, **options
    )
    net = SuperNetwork(model, space)
    fill_adapters(net)
    return net


def test_prefill_and_decoding_are_timed_apart_and_per_token(clock: Any) -> None:
    model = tiny_model("llama")
    clock(Work(model))
    found = measure_latency(model, CONDITIONS)
    per_token = 2 + 2 * (1 + 0.1 * 4 + 0.01 * 48)
    assert found.prefill_ms == pytest.approx(2 * 8 * per_token)
    assert found.decode_ms_per_token == pytest.approx(2 * per_token)
    assert len(found.prefill_samples_ms) == len(found.decode_samples_ms) == 4
    assert found.prefill_iqr_ms == pytest.approx(0, abs=1e-9)
    assert found.processor is not None
    assert found.processor.prefill_ms == pytest.approx(8 * per_token)


def test_median_and_spread_are_those_of_numpy() -> None:
    samples = (3.0, 1.0, 4.0, 1.5, 9.0)
    latency = Latency(samples, samples[:4], CONDITIONS, "cpu", 1)
    assert latency.prefill_ms == np.median(samples)
    assert latency.decode_ms_per_token == np.median(samples[:4])
    assert latency.prefill_iqr_ms == np.subtract(*np.percentile(samples, [75, 25]))
    assert latency.decode_iqr_ms == np.subtract(*np.percentile(samples[:4], [75, 25]))


def test_decoding_starts_with_the_prompt_in_the_cache_and_the_head_sees_one_token() -> None:
    model = tiny_model("llama")
    lengths: list[int] = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["past_key_values"].get_seq_length()),
        with_kwargs=True,
    )
    rows: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    measure_latency(model, Conditions(1, 8, 3, repeats=1, warmup=1))
    assert lengths == [0, 8, 9, 10] * 2
    assert rows == [1] * 8


@pytest.mark.parametrize("family", ["gpt2", "bloom", "mpt", "gemma2"])
def test_decoders_with_caches_of_their_own_are_measured(family: str) -> None:
    found = measure_latency(tiny_model(family), CONDITIONS)
    assert found.prefill_ms > 0
    assert found.decode_ms_per_token is not None


@pytest.mark.parametrize(("family", "head"), [("bert", "classifier"), ("vit", "base")])
def test_encoders_have_no_decoding(family: str, head: str) -> None:
    found = measure_latency(tiny_model(family, auto=AUTO[head]), CONDITIONS)
    assert found.prefill_ms > 0
    assert found.decode_ms_per_token is None
    assert found.decode_iqr_ms is None


def test_models_take_turns_and_ratios_within_a_round_survive_drift(clock: Any) -> None:
    net = structure_net()
    work = Work(net.model, drift=5e-4)  # the machine ends much slower than it began
    clock(work)
    before = net.config
    configs = {"full": net.space.largest(), "small": net.space.smallest()}
    found = compare_latency({name: (net, c) for name, c in configs.items()}, CONDITIONS)
    assert net.config is before
    assert max(found["full"].prefill_samples_ms) > 1.3 * min(found["full"].prefill_samples_ms)
    full = 2 + 4 * (1 + 0.1 * 4 + 0.01 * 48)
    small = 2 + 2 * (1 + 0.1 * 2 + 0.01 * 16)
    speed_up = found["small"].prefill_speed_up(found["full"])
    assert speed_up == pytest.approx(full / small, rel=0.1)


def test_a_ratio_of_unequal_rounds_is_refused() -> None:
    one = Latency((1.0,), (), CONDITIONS, "cpu", 1)
    two = Latency((1.0, 2.0), (), CONDITIONS, "cpu", 1)
    with pytest.raises(BadRecipe, match="compare_latency"):
        one.prefill_speed_up(two)
    with pytest.raises(BadRecipe, match="rounds"):
        one.decode_speed_up(one)


def test_models_come_back_into_their_own_mode() -> None:
    model = tiny_model("llama").train()
    model.lm_head.eval()
    measure_latency(model, CONDITIONS)
    assert model.training
    assert not model.lm_head.training


@pytest.mark.parametrize("field", ["batch", "prompt_tokens", "repeats"])
def test_conditions_that_measure_nothing_are_refused(field: str) -> None:
    with pytest.raises(BadRecipe, match=f"{field} must be at least 1, got 0"):
        Conditions(**{field: 0})


def test_lengths_beyond_the_context_are_refused() -> None:
    with pytest.raises(BadRecipe, match="context of 64"):
        measure_latency(tiny_model("llama"), Conditions(prompt_tokens=60, new_tokens=5))


def test_prefill_latency_is_the_median_in_milliseconds(clock: Any) -> None:
    model = tiny_model("llama")
    clock(Work(model))
    per_token = 2 + 2 * (1 + 0.1 * 4 + 0.01 * 48)
    assert prefill_latency_ms(model, 24, repeats=3, warmup=1) == pytest.approx(24 * per_token)


def ms_of(config: SubnetConfig) -> float:
    """Return the milliseconds of a token, by the rates of `Work`."""
    total = 2.0
    for index in range(4):
        if config.get(f"layers.{index}.block") != 0:
            heads, ffn = config[f"layers.{index}.heads"], config[f"layers.{index}.ffn"]
            total += 1 + 0.1 * heads + 0.01 * ffn
    return total


@pytest.fixture
def measured_table(clock: Any) -> tuple[SuperNetwork, LatencyTable]:
    net = structure_net()
    clock(Work(net.model))
    return net, LatencyTable.measure(net, CONDITIONS)


def test_a_table_predicts_times_that_add_up(
    measured_table: tuple[SuperNetwork, LatencyTable],
) -> None:
    net, table = measured_table
    for seed in range(10):
        config = net.space.sample(np.random.default_rng(seed))
        if seed == 0:
            config = net.space.smallest()
        found = table.predict(config)
        assert found.prefill_ms == pytest.approx(2 * 8 * ms_of(config))
        assert found.decode_ms == pytest.approx(2 * ms_of(config))


def test_the_error_of_a_table_is_that_of_measured_sub_networks(
    measured_table: tuple[SuperNetwork, LatencyTable],
) -> None:
    net, table = measured_table
    configs = [net.space.sample(np.random.default_rng(seed)) for seed in range(5)]
    exact = table_error(table, net, configs)
    assert exact.n == 5
    assert exact.decode is not None
    assert exact.prefill.maximum == pytest.approx(0, abs=1e-9)
    assert exact.decode.spearman == pytest.approx(1)

    halved = {
        name: {choice: (p / 2, d) for choice, (p, d) in rows.items()}
        for name, rows in table.dims.items()
    }
    wrong = LatencyTable(table.largest, True, halved, table.blocks, table.measured)
    full = ms_of(net.space.largest())
    gaps = [abs((full + ms_of(c)) / 2 / ms_of(c) - 1) for c in configs]
    found = table_error(wrong, net, configs).prefill
    assert found.median == pytest.approx(statistics.median(gaps))
    assert found.maximum == pytest.approx(max(gaps))
    assert math.isnan(table_error(table, net, configs[:1]).prefill.spearman)


def test_adapters_are_off_while_a_table_is_measured_and_back_afterwards() -> None:
    net = structure_net()
    config = net.space.heuristic()
    net.activate(config)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        before = net(input_ids=ids).logits
        LatencyTable.measure(net, Conditions(1, 8, 0, repeats=1, warmup=0))
        assert net.config == config
        assert torch.equal(net(input_ids=ids).logits, before)


def test_dims_that_blocks_share_are_predicted_block_by_block(clock: Any) -> None:
    net = structure_net(shared=True)
    clock(Work(net.model))
    table = LatencyTable.measure(net, CONDITIONS)
    config = SubnetConfig({**net.space.smallest(), "layers.1.block": 1})
    per_token = 2 + 3 * (1 + 0.1 * 2 + 0.01 * 16)
    assert table.predict(config).prefill_ms == pytest.approx(2 * 8 * per_token)


def test_a_table_is_the_same_once_saved_and_loaded(
    measured_table: tuple[SuperNetwork, LatencyTable], tmp_path: Path
) -> None:
    net, table = measured_table
    table.save(tmp_path / "latency.json")
    loaded = LatencyTable.load(tmp_path / "latency.json")
    assert loaded == table
    assert loaded.predict(net.space.heuristic()) == table.predict(net.space.heuristic())
    assert {"device", "dtype", "threads", "conditions", "clock", "versions"} <= set(loaded.measured)


@pytest.mark.parametrize("change", [{"schema": 99}, {"dims": 3}, {"largest": [1]}, {"blocks": [1]}])
def test_a_file_that_is_no_table_is_refused(
    measured_table: tuple[SuperNetwork, LatencyTable], tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "latency.json"
    measured_table[1].save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadArtifact, match="not a latency table"):
        LatencyTable.load(path)


def test_what_a_table_has_not_measured_is_refused(
    measured_table: tuple[SuperNetwork, LatencyTable],
) -> None:
    net, table = measured_table
    with pytest.raises(InvalidSubnet, match="measure a table for this space"):
        table.predict(SubnetConfig({**net.space.largest(), "layers.0.ffn": 24}))
    plain = tiny_model("llama")
    with pytest.raises(BadRecipe, match="no dim cuts the model"):
        LatencyTable.measure(SuperNetwork(plain, lora_space(plain, [4, 2])))
    with pytest.raises(BadRecipe, match="no sub-network"):
        table_error(table, net, [])


def test_a_prediction_takes_microseconds(
    measured_table: tuple[SuperNetwork, LatencyTable],
) -> None:
    net, table = measured_table
    config = net.space.heuristic()
    seconds = []
    for _ in range(50):
        started = time.thread_time()
        table.predict(config)
        seconds.append(time.thread_time() - started)
    assert statistics.median(seconds) < 200e-6
