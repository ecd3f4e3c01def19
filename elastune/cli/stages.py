"""Commands of a run's stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elastune.cli.frame import (
    Json,
    Out,
    Set,
    Source,
    Update,
    checked,
    finish,
    opened,
    reported,
    show,
)
from elastune.errors import BadRecipe


def run(
    source: Source, out: Out = None, set_: Set = None, update: Update = False, json_: Json = False
) -> None:
    """Run a recipe from model to report; a killed run goes on where it stopped."""
    with reported(), opened(source, out, set_, update) as work:
        from elastune.methods import METHODS

        checked(work)
        METHODS[work.recipe.method](work)
        finish(work, json_)


def sparsify(
    source: Source, out: Out = None, set_: Set = None, update: Update = False, json_: Json = False
) -> None:
    """Make the base model sparse and save it to RUN/base."""
    with reported(), opened(source, out, set_, update) as work:
        from elastune.files import read_json
        from elastune.prepare import make_base
        from elastune.report import sparsity_table

        checked(work)
        make_base(work)
        report = read_json(work.dir.sparsity)
        show(report["total"] if json_ else sparsity_table(report))


def space(
    source: Source, out: Out = None, set_: Set = None, update: Update = False, json_: Json = False
) -> None:
    """Make the search space, and show what it holds and what its ends cost."""
    with reported(), opened(source, out, set_, update) as work:
        from elastune.budgets import space_ends
        from elastune.prepare import make_base
        from elastune.report import ends_table, space_table

        checked(work)
        make_base(work)
        model = work.load_sparse()
        found = work.space_of(model)
        if json_:
            show(found.to_dict())
            return
        show(space_table(found))
        show(ends_table(space_ends(work, model, found), work.recipe.evaluate.macs_length))


def train(
    source: Source, out: Out = None, set_: Set = None, update: Update = False, json_: Json = False
) -> None:
    """Train the super-adapter (and sparsify first, if that is not done)."""
    with reported(), opened(source, out, set_, update) as work:
        from elastune.prepare import make_base
        from elastune.stages import train_supernet

        checked(work)
        make_base(work)
        train_supernet(work)
        show({"supernet": str(work.dir.supernet)} if json_ else f"trained: {work.dir.supernet}")


def evaluate(
    source: Source,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Systems to score, such as best or sparse.")
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness besides, such as piqa,arc_easy."),
    ] = None,
    lm_eval_path: Annotated[
        Path | None, typer.Option(help="Folder of task files of your own for it.")
    ] = None,
    lm_eval_limit: Annotated[
        float | None, typer.Option(help="First so many examples of each; below 1, that part.")
    ] = None,
    lm_eval_fewshot: Annotated[
        int | None, typer.Option(help="Worked examples before each question.")
    ] = None,
    json_: Json = False,
) -> None:
    """Score baselines and sub-networks on the report examples, into RUN/metrics.json."""
    with reported(), opened(source, None, None, False) as work:
        from elastune.measure import measure, systems

        known = [system.name for system in systems(work)]
        for wrong in set(only or []) - set(known):
            raise BadRecipe(f"unknown system {wrong!r}; this run has {', '.join(known)}")
        more = []
        if lm_eval is not None:
            from elastune.measure_harness import harness_measurements

            more = harness_measurements(
                work,
                [name.strip() for name in lm_eval.split(",") if name.strip()],
                include_path=lm_eval_path,
                limit=lm_eval_limit,
                num_fewshot=lm_eval_fewshot,
            )
        measure(work, only, more)
        finish(work, json_)


def demo(out: Out = None, set_: Set = None, json_: Json = False) -> None:
    """Run Shears on a small real LLM: about ten minutes on two cores, no hub access."""
    recipe = Path(__file__).parent.with_name("demo.yaml")
    run(recipe, out or Path("runs/demo"), set_, False, json_)
