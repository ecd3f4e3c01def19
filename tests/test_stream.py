"""Checkpoints pruned and reordered block by block from disk, against the model in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import tiny_tokenizer
from tiny_models import VARIANTS, heads_of, stir, tiny_variant, token_ids

from elastune.errors import BadArtifact, BadRecipe, UnsupportedModel
from elastune.importance.fisher import fisher_scores
from elastune.importance.streamed import streamed_scores
from elastune.importance.structure import structure_scores
from elastune.memory import peak_memory
from elastune.models import load_model, save_model
from elastune.models.blocks import blocks
from elastune.models.families import known_model_types
from elastune.models.streamed import StreamedModel
from elastune.reorder import reorder_
from elastune.sparsify import Method, Sparsity, sparsify_, sparsity_report
from elastune.stream import reorder_checkpoint, sparsify_checkpoint

ROWS = torch.tensor(token_ids(*[16] * 6))
HALF = Sparsity.parse(0.5)
READERS = [n for n in (*known_model_types(), *VARIANTS) if n not in ("vit", "deberta-convolution")]


def checkpoint(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """Write a tiny model with the head of a language model, if its family has one."""
    model_type = VARIANTS.get(name, (name, {}))[0]
    head = "causal-lm" if "causal-lm" in heads_of(model_type) else "base"
    save_model(stir(tiny_variant(name, head, **changes)), tiny_tokenizer(), folder)
    return folder


def assert_same_weights(found: Path, expected: Any) -> None:
    loaded, _ = load_model(found)
    state = loaded.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value), name


FAST = ("qwen3", "gpt2", "falcon", "bloom", "opt", "deberta-v2", "gemma3_text", "distilbert")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in READERS]
)
def test_streaming_prunes_as_in_memory_in_every_family(name: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "dense", name)
    expected, _ = load_model(source)
    sparsify_(expected, "wanda", HALF, ROWS)
    report = sparsify_checkpoint(source, tmp_path / "sparse", "wanda", HALF, ROWS)
    assert_same_weights(tmp_path / "sparse", expected)
    assert report == sparsity_report(expected, method="wanda", sparsity=HALF)


@pytest.mark.parametrize("states", ["memory", "disk"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_method_gives_the_bits_it_gives_in_memory(
    method: Method, states: Any, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "dense", "qwen3", num_hidden_layers=3)
    pattern = Sparsity.parse(pattern="2:4")
    expected, _ = load_model(source)
    sparsify_(expected, method, pattern, ROWS)
    steps = []
    sparsify_checkpoint(
        source,
        tmp_path / "sparse",
        method,
        pattern,
        ROWS,
        states=states,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert_same_weights(tmp_path / "sparse", expected)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    names = {file.name for file in (tmp_path / "sparse").iterdir()}
    assert not [name for name in names if name.startswith((".", "shard"))]


@pytest.mark.parametrize("tied", [True, False])
def test_shards_and_tied_embeddings_are_read_and_written(tied: bool, tmp_path: Path) -> None:
    model = tiny_variant("llama", "causal-lm", tie_word_embeddings=tied, num_hidden_layers=3)
    source = tmp_path / "dense"
    tiny_tokenizer().save_pretrained(source)
    model.save_pretrained(source, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    expected, _ = load_model(source)
    sparsify_(expected, "wanda", HALF, ROWS)
    sparsify_checkpoint(source, tmp_path / "sparse", "wanda", HALF, ROWS)
    assert_same_weights(tmp_path / "sparse", expected)
    index = json.loads((tmp_path / "sparse" / "model.safetensors.index.json").read_text())
    files = {n: load_file(tmp_path / "sparse" / n) for n in set(index["weight_map"].values())}
    assert len(files) == 3 + (1 if tied else 2)  # blocks, what is around them, the head
    assert all(name in files[file] for name, file in index["weight_map"].items())
    assert ("lm_head.weight" in index["weight_map"]) is not tied


def test_settings_and_tokenizer_are_those_of_the_model_in_memory(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "dense")
    model, tokenizer = load_model(source, dtype="bfloat16")
    sparsify_(model, "wanda", HALF, ROWS)
    save_model(model, tokenizer, tmp_path / "memory")
    sparsify_checkpoint(source, tmp_path / "sparse", "wanda", HALF, ROWS, dtype="bfloat16")
    written = {file.name for file in (tmp_path / "sparse").iterdir()}
    for file in (tmp_path / "memory").iterdir():
        if file.suffix != ".safetensors":
            assert file.name in written
            assert (tmp_path / "sparse" / file.name).read_text() == file.read_text(), file.name
    assert load_model(tmp_path / "sparse", dtype="bfloat16")[0].dtype == torch.bfloat16
    stored = load_file(sorted((tmp_path / "sparse").glob("*.safetensors"))[0])
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "gpt2", "falcon"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("bloom", "opt", "gemma2")),
    ],
)
@pytest.mark.parametrize("method", ["wanda", "magnitude", "taylor"])
@pytest.mark.filterwarnings("ignore:magnitude removes")
def test_heads_and_channels_are_scored_and_sorted_as_in_memory(
    name: str, method: Any, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "dense", name)
    expected, _ = load_model(source)
    scores = structure_scores(expected, ROWS, method, tokens_per_batch=2048)
    found = reorder_checkpoint(source, tmp_path / "sorted", ROWS, method)
    assert list(found) == list(scores)
    assert all(torch.equal(found[key], score) for key, score in scores.items())
    reorder_(expected, scores)
    assert_same_weights(tmp_path / "sorted", expected)


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        pytest.param("gpt_neox", marks=pytest.mark.slow),
        "falcon-multi-query",
        pytest.param("gemma3_text", marks=pytest.mark.slow),
    ],
)
def test_scores_that_follow_a_loss_go_back_block_by_block(
    name: str, on_disk: bool, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "dense", name, num_hidden_layers=3)
    model, _ = load_model(source)
    (tmp_path / "states").mkdir()
    folder = tmp_path / "states" if on_disk else None
    streamed = StreamedModel(source, whole_head=True)
    options: Any = {"tokens_per_batch": 32}  # several batches
    for method in ("fisher", "taylor", "wanda"):
        found = streamed_scores(streamed, ROWS, method, folder=folder, **options)
        expected = (
            fisher_scores(model, ROWS, **options)
            if method == "fisher"
            else structure_scores(model, ROWS, method, **options)  # type: ignore[arg-type]
        )
        assert found.keys() == expected.keys()
        for key, score in expected.items():
            assert torch.equal(found[key], score), (method, key)
    assert all(
        p.device.type == "meta" for b in blocks(streamed.model) for p in b.module.parameters()
    )


def test_a_run_that_ends_early_leaves_the_old_target_and_the_next_one_a_whole_one(
    tmp_path: Path,
) -> None:
    source = checkpoint(tmp_path / "dense")
    target = tmp_path / "sparse"
    target.mkdir()
    (target / "old").write_text("as it was")

    def stop(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sparsify_checkpoint(source, target, "wanda", HALF, ROWS, progress=stop)
    assert [file.name for file in target.iterdir()] == ["old"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dense", "sparse"]
    sparsify_checkpoint(source, target, "wanda", HALF, ROWS)
    expected, _ = load_model(source)
    sparsify_(expected, "wanda", HALF, ROWS)
    assert_same_weights(target, expected)


def test_what_cannot_be_streamed_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "dense", "bert")
    with pytest.raises(BadArtifact, match=r"lacks 2 tensors .*classifier"):
        sparsify_checkpoint(
            source, tmp_path / "out", "wanda", HALF, ROWS, head="sequence-classification"
        )
    with pytest.raises(BadRecipe, match="wanda needs calibration text"):
        sparsify_checkpoint(source, tmp_path / "out", "wanda", HALF)
    with pytest.raises(BadRecipe, match=r"unknown importance 'wonda'.*wanda"):
        reorder_checkpoint(source, tmp_path / "out", ROWS, "wonda")  # type: ignore[arg-type]
    with pytest.raises(BadArtifact, match="no model at"):
        sparsify_checkpoint(tmp_path / "none", tmp_path / "out", "magnitude", HALF)
    convolution = checkpoint(tmp_path / "convolution", "deberta-convolution")
    with pytest.raises(UnsupportedModel, match="between blocks 0 and 1"):
        sparsify_checkpoint(convolution, tmp_path / "out", "wanda", HALF, ROWS)
    assert not (tmp_path / "out").exists()


def prepare_sparsify(source: str, target: str, streamed: bool) -> Callable[[], object]:
    """Return the pruning of a checkpoint, run in a process of its own."""
    rows = torch.randint(3, 64, (4, 32), generator=torch.Generator().manual_seed(0))

    def work() -> object:
        if streamed:
            return sparsify_checkpoint(source, Path(target), "wanda", HALF, rows)
        model, tokenizer = load_model(source)
        sparsify_(model, "wanda", HALF, rows)
        return save_model(model, tokenizer, target)

    return work


@pytest.mark.slow
def test_memory_stays_under_half_of_the_weights(tmp_path: Path) -> None:
    sizes: Any = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 64}
    source = checkpoint(
        tmp_path / "dense", "llama", **sizes, num_hidden_layers=12, num_attention_heads=8
    )
    weights_mb = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 2**20
    assert weights_mb > 150
    used = {}
    for streamed in (True, False):
        options = {
            "source": str(source),
            "target": str(tmp_path / f"out-{streamed}"),
            "streamed": streamed,
        }
        peak = peak_memory("test_stream:prepare_sparsify", options)
        used[streamed] = peak.peak_mb - peak.start_mb
    assert used[True] < weights_mb / 2
    assert used[False] > 0.9 * weights_mb
