"""The command line: one subcommand per stage, each importing what it needs only when called."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from elastune import processes
from elastune.cli import adapters, exporting, fitting, looking, searching, stages
from elastune.cli.frame import OUT, follow, reported
from elastune.version import __version__

app = typer.Typer(
    help="Compress and fine-tune Hugging Face transformers by weight-sharing architecture search.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_COMMANDS: dict[Callable[..., None], str] = {
    stages.run: "run recipes/shears.yaml --set model=Qwen/Qwen3-0.6B --set task=gsm8k",
    fitting.fit: "fit --model minilm-l6 --task sst2 --target 'latency<=0.6x' --max-drop 1.0",
    stages.sparsify: "sparsify recipes/shears.yaml --set sparsify.ratio=0.6 --out runs/sparse60",
    stages.space: "space recipes/lonas-smollm2-math.yaml",
    stages.train: "train recipes/shears.yaml --set train.epochs=1",
    searching.search: "search runs/shears --algorithm nsga2 --trials 200 --limit 'params<=80%'",
    searching.extract: "extract runs/shears --target 'latency<=0.5x'",
    searching.sweep: "sweep runs/lonas --cost params --parts 0.9,0.8,0.7",
    exporting.export: "export runs/shears --format gguf,onnx,openvino:int8",
    exporting.check: "check runs/shears/export/gguf",
    exporting.profile: "profile runs/shears/base runs/shears/export/onnx --plot speeds.png",
    adapters.adapter: "adapter my-lora --out my-lora-small --target 'params<=0.5x'",
    adapters.push: "push runs/shears/export/peft owner/name",
    stages.evaluate: "evaluate runs/shears --only best --lm-eval piqa,arc_easy",
    looking.report: "report runs/shears",
    looking.runs: "runs runs/shears runs/lonas --only best",
    stages.demo: "demo",
    looking.doctor: "doctor",
}
"""The commands in the order of ``--help``, with the example that each ends its own help with."""
for _command, _example in _COMMANDS.items():
    app.command(epilog=f"Example: elastune {_example}")(_command)
app.command(hidden=True)(searching.work)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        OUT.print(__version__, highlight=False)
        raise typer.Exit


def main() -> None:
    """Entry point of the console script."""
    # Threads that wait by spinning cost a multiple of the time as soon as a core is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # It warns of kernels for 4-bit weights whenever it is imported, whatever is to be done.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not processes.is_main():
        follow()
        return
    try:
        with reported():
            processes.join()
    except typer.Exit as end:  # no command is there to take it
        sys.exit(end.exit_code)
    try:
        app()
    finally:
        processes.release()
