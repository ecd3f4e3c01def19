"""Movement pruning against the formulas, worked out naively on plain copies of the model."""

from __future__ import annotations

import math
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import encoded, stir, tiny_model, tiny_net, tiny_variant, token_ids
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from elastune.config import TrainConfig
from elastune.elastic.linear import make_sliceable
from elastune.errors import BadRecipe, UnsupportedModel
from elastune.heads import SequenceClassification
from elastune.heads.sequence_classification import EncodedText
from elastune.importance.base import Importance, SharedScores
from elastune.importance.movement import MovementPruning, MovementSettings
from elastune.importance.scored_linear import Grid, ScoredLinear
from elastune.importance.structure import units_from_weights
from elastune.learn_scores import movement_scores
from elastune.linears import is_transposed
from elastune.sampling import FixedSampler
from elastune.train import ScheduledTrainee, TrainResult, train

ROWS = torch.tensor(token_ids(*[12] * 4))
LABELS = torch.tensor([0, 1, 1, 0])
#: Blocks that do not divide the tiny models' 32 and 48.
UNEVEN = MovementSettings(block_size=7)


def scored(name: str = "bert", settings: MovementSettings = UNEVEN, seed: int = 0) -> Any:
    """Return a trainee over a tiny classifier, with scores as training might have left them."""
    model = stir(tiny_variant(name, "classifier"))
    net = MovementPruning(model, settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in net.layers.values():
            layer.movement_scores.normal_(generator=generator).sub_(0.3)
    return net


def naive_expand(scores: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    rows = [
        [float(scores[i // block[0], j // block[1]]) for j in range(shape[1])]
        for i in range(shape[0])
    ]
    return torch.tensor(rows)


def loss_of(model: Any) -> Tensor:
    return cross_entropy(model(input_ids=ROWS).logits, LABELS, reduction="sum")


@pytest.mark.parametrize("shape", [(6, 4), (7, 5), (3, 9)])
@pytest.mark.parametrize("kind", ["block", "row", "column", "weight"])
def test_a_grid_expands_multiplies_and_sums_as_a_loop_does(
    kind: Any, shape: tuple[int, int]
) -> None:
    grid = Grid.of(shape, kind, 4)
    assert grid.block == {
        "block": (min(4, shape[0]), min(4, shape[1])),
        "row": (1, shape[1]),
        "column": (shape[0], 1),
        "weight": (1, 1),
    }[kind]  # fmt: skip
    values, weight = torch.randn(grid.size), torch.randn(shape)
    expanded = naive_expand(values, shape, grid.block)
    torch.testing.assert_close(grid.expand(values), expanded)
    torch.testing.assert_close(grid.multiply(weight, values), weight * expanded)
    sums, counts = torch.zeros(grid.size), torch.zeros(grid.size)
    for i in range(shape[0]):
        for j in range(shape[1]):
            sums[i // grid.block[0], j // grid.block[1]] += weight[i, j]
            counts[i // grid.block[0], j // grid.block[1]] += 1
    torch.testing.assert_close(grid.sum(weight), sums)
    assert grid.counts().tolist() == counts.tolist()


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "phi3"])
def test_outputs_are_those_of_the_masked_weights_and_gradients_pass_straight_through(
    name: str,
) -> None:
    net = scored(name)
    net.begin_step(0.6)
    plain = deepcopy(tiny_variant(name, "classifier")).eval()
    own = {n: p for n, p in net.model.named_parameters() if "movement_scores" not in n}
    plain.load_state_dict({k: v for k, v in net.model.state_dict().items() if k in own}, False)
    expanded = {}
    for path, layer in net.layers.items():
        kept = naive_expand(layer.movement_scores.detach(), layer.grid.shape, layer.grid.block) > 0
        expanded[path] = kept.T if is_transposed(layer) else kept
        assert 0.05 < float(kept.float().mean()) < 0.95
        with torch.no_grad():
            plain.get_submodule(path).weight.mul_(expanded[path])
    loss_of(net.model).backward()
    loss = loss_of(plain)
    loss.backward()
    assert float(loss_of(net.model).detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    for path, layer in net.layers.items():
        slope = plain.get_submodule(path).weight.grad  # dL/dW'
        torch.testing.assert_close(layer.weight.grad, slope * expanded[path], rtol=1e-4, atol=1e-6)
        product = (slope * layer.weight).detach()
        product = product.T if is_transposed(layer) else product
        rows, columns = layer.grid.block
        for r, c in np.ndindex(*layer.grid.size):
            tile = product[r * rows : (r + 1) * rows, c * columns : (c + 1) * columns]
            found = float(layer.movement_scores.grad[r, c])
            assert found == pytest.approx(float(tile.sum()), rel=1e-3, abs=1e-5)
    for bias in (n for n in own if n.endswith("bias")):
        torch.testing.assert_close(own[bias].grad, plain.get_parameter(bias).grad)


def test_structures_are_blocks_of_attention_rows_in_and_columns_out_of_the_feed_forward() -> None:
    net = MovementPruning(tiny_variant("llama", "causal-lm"), MovementSettings(block_size=16))
    sizes = {path.rsplit(".")[-1]: layer.grid.size for path, layer in net.layers.items()}
    assert sizes == {
        "q_proj": (2, 2),
        "k_proj": (1, 2),
        "v_proj": (1, 2),
        "o_proj": (2, 2),
        "gate_proj": (48, 1),
        "up_proj": (48, 1),
        "down_proj": (1, 48),
    }


def all_scores(net: MovementPruning) -> np.ndarray[Any, Any]:
    """Return the score of every weight, sorted."""
    return np.sort(np.concatenate([s.numpy().ravel() for s in net.scores().values()]))


def test_the_threshold_climbs_by_a_cubic_from_a_first_sparsity_to_zero() -> None:
    net = scored(settings=MovementSettings(block_size=20, warmup=(0.2, 0.7), start_sparsity=0.05))
    net.begin_step(0.0)
    assert net.threshold == -math.inf
    assert all(bool(mask.all()) for mask in net.masks().values())
    net.begin_step(0.2)
    scores = all_scores(net)
    first = scores[int(len(scores) * 0.05)]
    assert first < -1
    assert net.threshold == pytest.approx(first)
    masks = torch.cat([mask.flatten() for mask in net.masks().values()])
    assert 0.05 <= float((~masks).float().mean()) <= 0.1
    with torch.no_grad():  # where it began stays, however the scores move on
        for layer in net.layers.values():
            layer.movement_scores.add_(1)
    for progress in (0.3, 0.45, 0.69, 0.7, 0.9):
        net.begin_step(progress)
        left = 1 - min((progress - 0.2) / 0.5, 1)
        assert net.threshold == pytest.approx(first * left**3, rel=1e-6, abs=1e-12)


def test_the_usual_first_sparsity_is_a_thousandth_of_all_weights() -> None:
    net = scored(settings=MovementSettings(*["weight"] * 3))
    net.begin_step(0.25)
    net.begin_step(0.2)
    masks = torch.cat([mask.flatten() for mask in net.masks().values()])
    assert int((~masks).sum()) == int(len(masks) * 0.001) + 1


def test_a_threshold_never_falls_where_all_scores_are_above_zero() -> None:
    net = scored()
    with torch.no_grad():
        for layer in net.layers.values():
            layer.movement_scores.abs_().add_(0.1)
    for progress in (0.2, 0.3, 0.8):
        net.begin_step(progress)
        assert net.threshold == 0
        assert all(bool(mask.all()) for mask in net.masks().values())


def test_two_percent_of_each_layers_structures_are_kept_at_least() -> None:
    net = scored()
    with torch.no_grad():
        for layer in net.layers.values():
            layer.movement_scores.sub_(100)
    net.begin_step(0.9)
    for layer in net.layers.values():
        scores = layer.movement_scores.detach().numpy()
        kept = layer.mask.numpy() > 0
        assert kept.sum() == math.ceil(0.02 * scores.size)
        assert np.array_equal(kept, scores > min(0, np.sort(scores.ravel())[-kept.sum() - 1]))


def test_the_cap_is_the_98th_percentile() -> None:
    net = scored(settings=MovementSettings(*["weight"] * 3))
    with torch.no_grad():
        for layer in net.layers.values():
            layer.movement_scores.sub_(100)
    net.begin_step(0.9)
    for layer in net.layers.values():
        scores = layer.movement_scores.detach().numpy().astype(np.float64)
        assert np.array_equal(layer.mask.numpy() > 0, scores > np.quantile(scores, 0.98))


@pytest.mark.parametrize(("progress", "growth"), [(0.1, 0), (0.35, 1 - 0.5**3), (0.6, 1), (1, 1)])
def test_the_penalty_is_the_mean_over_layers_of_half_the_size_times_the_mean_sigmoid(
    progress: float, growth: float
) -> None:
    net = scored()
    net.begin_step(progress)
    terms = []
    for layer in net.layers.values():
        sigmoids = [1 / (1 + math.exp(-s)) for s in layer.movement_scores.flatten().tolist()]
        terms.append(0.5 * math.prod(layer.grid.block) * sum(sigmoids) / len(sigmoids))
    expected = 0.02 * growth * sum(terms) / len(terms)
    assert float(net.penalty().detach()) == pytest.approx(expected, rel=1e-5)


def items(count: int, length: int = 8) -> list[EncodedText]:
    ids = token_ids(*[length] * count)
    return [EncodedText({"input_ids": row}, number % 2, 0) for number, row in enumerate(ids)]


HEAD = SequenceClassification()
SETTINGS: dict[str, Any] = {
    "max_steps": 8,
    "batch_size": 2,
    "accumulation": 2,
    "learning_rate": 1e-2,
    "checkpoint_every": 2,
    "seed": 0,
}


def fit(net: MovementPruning, folder: Path, *, stop_at: int = 0, **changes: Any) -> TrainResult:
    def stop(done: int, total: int, facts: Any) -> None:
        if done == stop_at:
            raise Killed

    cfg = TrainConfig(**(SETTINGS | changes))
    return train(net, items(10), FixedSampler(), cfg, folder=folder, head=HEAD, progress=stop)


class Killed(Exception):
    """Stands for whatever ends a run."""


def test_it_is_a_scheduled_trainee() -> None:
    trainee: ScheduledTrainee = scored()
    assert isinstance(trainee, ScheduledTrainee)


def test_scores_have_their_own_rate_and_no_weight_decay(tmp_path: Path) -> None:
    settings = MovementSettings(score_learning_rate=0.1)
    net = scored(settings=settings)
    before = deepcopy(net.model.state_dict())
    with torch.no_grad():
        for layer in net.layers.values():
            layer.movement_scores.fill_(1.0)
    constant = {"max_steps": 1, "schedule": "constant", "warmup": 0.0}
    fit(net, tmp_path, learning_rate=1e-3, weight_decay=1.0, max_grad_norm=0.0, **constant)
    for path, layer in net.layers.items():
        # The first step of Adam is as long as the learning rate, whatever the gradient.
        moved = (layer.movement_scores - 1).abs().detach()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.1), rtol=1e-3, atol=1e-3)
        old = before[f"{path}.weight"] * (1 - 1e-3)  # weights do decay
        step = (layer.weight - old).abs().detach()
        assert float(step.max()) == pytest.approx(1e-3, rel=1e-2)


def test_by_default_scores_have_the_rate_of_the_weights(tmp_path: Path) -> None:
    net = MovementPruning(tiny_variant("bert", "classifier"))
    constant = {"max_steps": 1, "schedule": "constant", "warmup": 0.0}
    fit(net, tmp_path, learning_rate=3e-3, **constant)
    score = net.layers["bert.encoder.layer.1.output.dense"].movement_scores.abs()
    torch.testing.assert_close(score, torch.full_like(score, 3e-3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("stop_at", [1, 3, 7])
def test_a_resumed_run_ends_with_the_same_bits(stop_at: int, tmp_path: Path) -> None:
    """Stopped before the warm-up, in it (the threshold's start is read back), and after it."""
    options: dict[str, Any] = {"settings": MovementSettings(block_size=20, warmup=(0.2, 0.6))}
    changes: dict[str, Any] = {"checkpoint_every": 1 if stop_at == 1 else 2}
    whole = MovementPruning(tiny_variant("bert", "classifier", hidden_dropout_prob=0.2), **options)
    result = fit(whole, tmp_path / "whole", **changes)
    broken = MovementPruning(tiny_variant("bert", "classifier", hidden_dropout_prob=0.2), **options)
    with pytest.raises(Killed):
        fit(broken, tmp_path / "broken", stop_at=stop_at, **changes)
    again = MovementPruning(tiny_variant("bert", "classifier", hidden_dropout_prob=0.2), **options)
    torch.manual_seed(stop_at)
    assert fit(again, tmp_path / "broken", **changes).final_loss == result.final_loss
    left, right = whole.trained_state(), again.trained_state()
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert float(left["movement.threshold_start"]) < 0
    rows = [
        (tmp_path / name / "train.jsonl").read_text().splitlines() for name in ("whole", "broken")
    ]
    assert len(rows[0]) == len(rows[1]) == 8


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_scores_stay_after_the_warmup_and_weights_train_on(
    freeze: bool, tmp_path: Path
) -> None:
    settings = MovementSettings(warmup=(0.2, 0.5), freeze=freeze)
    net = MovementPruning(tiny_variant("bert", "classifier"), settings)
    seen: list[tuple[dict[str, Tensor], Tensor]] = []
    layer = net.layers["bert.encoder.layer.0.output.dense"]

    def note(done: int, total: int, facts: Any) -> None:
        seen.append((dict(net.scores()), layer.weight.detach().clone()))

    cfg = TrainConfig(**SETTINGS)
    train(net, items(10), FixedSampler(), cfg, folder=tmp_path, head=HEAD, progress=note)
    middle, end = seen[3][0], seen[-1][0]  # scores learn in steps 1 to 4 of 8
    assert all(torch.equal(middle[name], end[name]) for name in end) is freeze
    assert not torch.equal(seen[3][1], seen[-1][1])
    assert (float(net.penalty().detach()) == 0) is freeze


def test_channels_of_noise_end_below_those_that_tell_the_label(tmp_path: Path) -> None:
    """Half of the channels read dimensions of the embedding that are drawn anew at each call."""
    model = tiny_variant("bert", "classifier", num_hidden_layers=1, hidden_dropout_prob=0.0)
    layer = model.bert.encoder.layer[0]
    torch.manual_seed(0)
    with torch.no_grad():
        layer.attention.output.dense.weight.zero_()  # the feed-forward alone tells
        layer.intermediate.dense.weight[::2, 16:] = 0
        layer.intermediate.dense.weight[1::2, :16] = 0
    generator = torch.Generator().manual_seed(0)

    def disturb(module: nn.Module, args: Any) -> Any:
        noise = torch.randn((*args[0].shape[:-1], 16), generator=generator) * 2
        return (torch.cat([args[0][..., :16], noise], -1),)

    layer.intermediate.register_forward_pre_hook(disturb)
    examples = [
        EncodedText({"input_ids": [5 + number % 2, *row]}, number % 2, 0)
        for number, row in enumerate(token_ids(*[7] * 64))
    ]
    scores = movement_scores(
        model,
        examples,
        TrainConfig(max_steps=60, batch_size=16, learning_rate=3e-3, seed=0),
        folder=tmp_path,
        head=HEAD,
        movement=MovementSettings(warmup=(0.3, 0.7), regularisation=0.0),
    )
    channels = units_from_weights(model, scores)["layers.0.ffn"]
    signal, noise = channels[::2], channels[1::2]
    assert float((signal[:, None] > noise).float().mean()) > 0.8  # area under the ROC curve


def test_the_model_ends_plain_with_unmasked_trained_weights(tmp_path: Path) -> None:
    model = tiny_variant("gpt2", "causal-lm")
    kinds = [type(module) for module in model.modules()]
    names = list(dict(model.named_parameters()))
    before = deepcopy(model.state_dict())
    cfg = TrainConfig(**SETTINGS | {"max_steps": 3})
    data = encoded(9, 12, 5, 14, 7, 11, n_prompt=3)
    scores = movement_scores(model, data, cfg, folder=tmp_path)
    assert [type(module) for module in model.modules()] == kinds
    assert list(dict(model.named_parameters())) == names
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert not torch.equal(weight, before["transformer.h.0.mlp.c_fc.weight"])
    assert int((weight == 0).sum()) == 0
    assert {name: tuple(s.shape) for name, s in scores.items()} == {
        f"transformer.h.{i}.{path}.weight": shape
        for i in (0, 1)
        for path, shape in {
            "attn.c_attn": (96, 32),
            "attn.c_proj": (32, 32),
            "mlp.c_fc": (48, 32),
            "mlp.c_proj": (32, 48),
        }.items()
    }
    assert isinstance(scores, SharedScores)
    assert scores.blocks["transformer.h.1.mlp.c_proj.weight"] == (32, 1)
    assert set(units_from_weights(model, scores, tie="any")) == {
        f"layers.{i}.{part}" for i in (0, 1) for part in ("heads", "ffn")
    }
    assert not model.training


def test_a_run_that_failed_leaves_plain_layers(tmp_path: Path) -> None:
    model = tiny_variant("bert", "classifier")
    kinds = [type(module) for module in model.modules()]

    def stop(*_: Any) -> None:
        raise Killed

    importance: Importance = partial(
        movement_scores, cfg=TrainConfig(**SETTINGS), folder=tmp_path, head=HEAD, progress=stop
    )
    with pytest.raises(Killed):
        importance(model, items(10))
    assert [type(module) for module in model.modules()] == kinds
    assert not any("movement" in name for name, _ in model.named_parameters())


def test_layers_that_cannot_be_masked_leave_the_model_as_it_was() -> None:
    model = tiny_variant("bert", "classifier")
    make_sliceable(model.bert.encoder.layer[1].output.dense)
    with pytest.raises(UnsupportedModel, match="movement pruning cannot mask"):
        MovementPruning(model)
    assert not any(isinstance(module, ScoredLinear) for module in model.modules())
    with pytest.raises(UnsupportedModel, match=r"q_proj is a ElasticLoRALinear.*\ntry: the plain"):
        MovementPruning(tiny_net(tiny_model("llama")).model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention": "blocks"}, "did you mean 'block'"),
        ({"warmup": (0.0, 0.5)}, "begins after the first step"),
        ({"warmup": (0.6, 0.5)}, "0.6 to 0.5 is not within"),
        ({"keep": 1.5}, r"keep=1.5 is not within 0 and 1"),
        ({"block_size": 0}, "block_size=0"),
        ({"score_learning_rate": 0.0}, "not above 0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecipe, match=message):
        MovementSettings(**values)
