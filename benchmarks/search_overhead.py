"""What a trial costs besides its measurement: store and proposal, at 210 dims and 1,000 trials.

The objective takes no time, so all that is measured is overhead. ms_per_trial is the mean over all
trials of a journal file's search, of the slowest algorithm that was asked for; ms_at_the_end is the
mean over the last tenth, where the history is longest.

    python benchmarks/search_overhead.py [--quick] [--dims 210] [--trials 1000]
                                         [--algorithms random hill_climb] [--storages journal ...]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elastune.search import ALGORITHMS, Known, search
from elastune.space import ElasticDim, SearchSpace, SubnetConfig

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

STORAGES = ("memory", "journal", "sqlite", "postgresql")
VALUES = ("loss", "params")


def main() -> None:
    args = _arguments()
    space = rank_space(args.dims)
    shown = Table(title=f"{args.dims} dims of 3 choices, {args.trials} trials: ms a trial")
    for column in ("storage", "algorithm", "mean", "last tenth", "reading all"):
        shown.add_column(column, justify="right")
    figures: dict[str, float] = {}
    for kind in args.storages:
        with _storage(kind) as storage:
            if storage == "":
                continue
            for algorithm in args.algorithms:
                mean, end, again = overhead(space, storage, algorithm, args.trials)
                shown.add_row(kind, algorithm, f"{mean:.1f}", f"{end:.1f}", f"{again:.2f}")
                figures[f"{kind}_{algorithm}_ms"] = mean
                if kind == "journal":
                    figures["ms_per_trial"] = max(mean, figures.get("ms_per_trial", 0.0))
                    figures["ms_at_the_end"] = max(end, figures.get("ms_at_the_end", 0.0))
    Console().print(shown)
    print(json.dumps({"benchmark": "search_overhead", "figures": figures}))


def rank_space(n_dims: int) -> SearchSpace:
    """Return a space of ranks, of no model."""
    return SearchSpace(
        [ElasticDim(f"layers.{i}.ranks", "rank", (32, 24, 16), (f"m{i}",)) for i in range(n_dims)]
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, default=210)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--algorithms", nargs="+", choices=[*ALGORITHMS], default=None)
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=None)
    parser.add_argument("--quick", action="store_true", help="the journal alone, 500 trials")
    args = parser.parse_args()
    args.trials = min(args.trials, 500) if args.quick else args.trials
    if args.storages is None:
        args.storages = ["journal"] if args.quick else list(STORAGES)
    if args.algorithms is None:
        args.algorithms = [name for name in ("random", "hill_climb", "nsga2") if name in ALGORITHMS]
    return args


@contextlib.contextmanager
def _storage(kind: str) -> Iterator[Path | str | None]:
    """Yield what `search` takes; an empty text where it cannot be had."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "postgresql":
            from postgres_server import NoServer, postgres

            try:
                with postgres(fsync=True) as url:
                    yield url
            except NoServer as error:
                print(f"without PostgreSQL: {error}")
                yield ""
            return
        options = {"memory": None, "journal": folder / "j", "sqlite": f"sqlite:///{folder}/s.db"}
        yield options[kind]


def overhead(
    space: SearchSpace, storage: Path | str | None, algorithm: str, trials: int
) -> tuple[float, float, float]:
    """Return milliseconds a trial: of all, of the last tenth, and of reading all back."""

    def objective(config: SubnetConfig) -> dict[str, float]:
        choices = list(config.values())
        params = float(sum(choices))
        return {"loss": sum(c * (i % 7) for i, c in enumerate(choices)) / params, "params": params}

    options: Any = {"values": VALUES, "algorithm": algorithm, "study": algorithm}
    options["known"] = Known(VALUES, costs=lambda config: {"params": float(sum(config.values()))})
    ends: list[float] = []
    began = time.perf_counter()
    search(
        space,
        objective,
        trials=trials,
        storage=storage,
        progress=lambda *_: ends.append(time.perf_counter()),
        **options,
    )
    tenth = max(1, trials // 10)
    mean = (ends[-1] - began) / trials * 1000
    last = (ends[-1] - ends[-tenth - 1]) / tenth * 1000 if trials > tenth else mean
    began = time.perf_counter()
    if storage is not None:  # memory is gone
        search(space, objective, trials=trials, storage=storage, **options)
    return mean, last, (time.perf_counter() - began) / trials * 1000


if __name__ == "__main__":
    main()
