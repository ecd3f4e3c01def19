"""Sparsify a checkpoint block by block from disk: peak memory and time against doing it in memory.

Each way runs in fresh processes, in turns, on the same rows, and what both write is compared tensor
by tensor. Memory is the most that was resident above what the interpreter, its libraries and the
rows took before (VmHWM less VmRSS), activations included.

- weights_mb: the checkpoint's weights as they are loaded. block_mb: those of one block.
- memory_peak_mb, streamed_peak_mb; streamed_over_weights: the second over the weights. Goal: 0.5.
- wall and CPU time of the streamed way over the other.
- different_tensors: goal 0.

The second model is generated shard by shard: a Llama of random weights and `--blocks` blocks.

    python benchmarks/streaming.py [--quick] [--model smollm2-135m] [--blocks 20] [--method wanda]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from elastune.memory import peak_memory

WAYS = ("memory", "streamed")


def main() -> None:
    args = _arguments()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        scratch = Path(folder)
        sources = {"smollm2": args.model}
        if args.blocks:
            sources["generated"] = str(_generate(scratch / "generated", args.blocks, args.width))
        for name, source in sources.items():
            found = _compare(source, scratch, args)
            figures |= {f"{name}_{key}": value for key, value in found.items()}
            print(name, json.dumps(found))
    print(json.dumps({"benchmark": "streaming", "figures": figures}))


def _compare(source: str, scratch: Path, args: argparse.Namespace) -> dict[str, float]:
    """Prune one model both ways, in turns."""
    peaks: dict[str, list[float]] = {way: [] for way in WAYS}
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way in WAYS:
            options = {
                "source": source,
                "way": way,
                "target": str(scratch / way),
                "method": args.method,
                "sequences": args.sequences,
                "length": args.length,
            }
            found = peak_memory("streaming:prepare", options)
            peaks[way].append(found.peak_mb - found.start_mb)
            taken = json.loads((scratch / f"{way}.json").read_text())
            times[way].append((taken["wall"], taken["cpu"]))
    weights, block = _sizes(scratch / "streamed")
    mine, other = (statistics.median(peaks[way]) for way in ("streamed", "memory"))
    wall, cpu = (
        statistics.median(
            streamed[i] / memory[i]
            for streamed, memory in zip(times["streamed"], times["memory"], strict=True)
        )
        for i in (0, 1)
    )
    return {
        "weights_mb": weights,
        "block_mb": block,
        "memory_peak_mb": other,
        "streamed_peak_mb": mine,
        "memory_over_weights": other / weights,
        "streamed_over_weights": mine / weights,
        "streamed_over_memory_wall": wall,
        "streamed_over_memory_cpu": cpu,
        "streamed_cpu_s": statistics.median(cpu for _, cpu in times["streamed"]),
        "different_tensors": _different(scratch / "memory", scratch / "streamed"),
    }


def prepare(
    source: str, way: str, target: str, method: str, sequences: int, length: int
) -> Callable[[], None]:
    """Import what is needed, draw the rows, and return the pruning: run in a process of its own."""
    from elastune.models import load_model, save_model
    from elastune.sparsify import Sparsity, sparsify_
    from elastune.stream import sparsify_checkpoint

    outline, _ = load_model(source, device="meta")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, outline.config.vocab_size, (sequences, length), generator=generator)
    half = Sparsity.parse(0.5)

    def work() -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        if way == "memory":
            model, tokenizer = load_model(source)
            sparsify_(model, method, half, rows)  # type: ignore[arg-type]
            save_model(model, tokenizer, target)
        else:
            sparsify_checkpoint(source, Path(target), method, half, rows)  # type: ignore[arg-type]
        taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        Path(f"{target}.json").write_text(json.dumps(taken))

    return work


def _generate(folder: Path, n_blocks: int, width: int) -> Path:
    """Write a Llama of random weights, in memory one block at a time."""
    from transformers import AutoTokenizer, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from elastune.models.load import checkpoint_folder
    from elastune.models.shard_writer import ShardWriter

    torch.manual_seed(0)
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=n_blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=max(width // 256, 1),
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint_folder("smollm2-135m")).save_pretrained(folder)
    writer = ShardWriter(folder)
    for index in range(n_blocks):
        state = LlamaDecoderLayer(config, index).state_dict()
        writer.write({f"model.layers.{index}.{name}": value for name, value in state.items()})
    embeddings = torch.randn(config.vocab_size, width) * 0.02
    writer.write({"model.embed_tokens.weight": embeddings, "model.norm.weight": torch.ones(width)})
    writer.finish()
    return folder


def _sizes(folder: Path) -> tuple[float, float]:
    """Return the MB of a checkpoint's weights, and of its largest block's."""
    shards = sorted(folder.glob("*.safetensors"))
    sizes = [file.stat().st_size / 2**20 for file in shards]
    return sum(sizes), sizes[0]  # the first is a block


def _different(first: Path, second: Path) -> int:
    """Count tensors of two checkpoints that are not the same."""
    found = [_tensors(folder) for folder in (first, second)]
    wrong = found[0].keys() ^ found[1].keys()
    for name in found[0].keys() & found[1].keys():
        with safe_open(found[0][name], "pt") as one, safe_open(found[1][name], "pt") as other:
            if not torch.equal(one.get_tensor(name), other.get_tensor(name)):
                wrong.add(name)
    return len(wrong)


def _tensors(folder: Path) -> dict[str, Path]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--blocks", type=int, default=20, help="of the generated model; 0: none")
    parser.add_argument("--width", type=int, default=1024, help="hidden size of the generated one")
    parser.add_argument("--method", default="wanda", choices=("wanda", "sparsegpt", "magnitude"))
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", help="folder for what is written; by default the system's")
    parser.add_argument("--quick", action="store_true", help="4 x 128 tokens, 2 blocks, once")
    args = parser.parse_args()
    if args.quick:
        args.sequences, args.length, args.repeats = 4, 128, 1
        args.blocks, args.width = 2, 256
    return args


if __name__ == "__main__":
    main()
