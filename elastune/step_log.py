"""What a training tells as it goes: a row of train.jsonl per step, progress, whole checkpoints."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from elastune.files import holding, write_json, write_text
from elastune.processes import is_main, wait
from elastune.seals import seal
from elastune.space import SearchSpace

_LOG = logging.getLogger(__name__)

COMPLETE = "complete"
"""Name of the file that marks a checkpoint as written to its end; it holds its files' seals."""

Progress = Callable[[int, int, dict[str, float]], None]
"""Called after each step with (steps done, steps in all, {"loss", "tokens_per_s"})."""


class NothingLeft(Exception):
    """The checkpoint to go on from is of the last step; the stock loop would train one more."""


class StepLog(TrainerCallback):
    """Writes train.jsonl, marks checkpoints complete and tells the progress."""

    def __init__(self, path: Path, space: SearchSpace | None, progress: Progress | None) -> None:
        self.path = path
        self.space = space
        self.progress = progress
        self.last_loss = math.nan
        self.tokens = 0
        self._row: dict[str, Any] = {}
        self._started = time.monotonic()

    def add(self, loss: float, tokens: int, draws: Sequence[Any]) -> None:
        """Add a micro-batch to the row of the current step."""
        row = self._row
        row["loss"] = row.get("loss", 0.0) + loss
        row["tokens"] = row.get("tokens", 0) + tokens
        if self.space is not None:
            configs = [list(self.space.encode(draw.config)) for draw in draws]
            row.setdefault("configs", []).extend(c for c in configs if c not in row["configs"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Forget rows of steps that a killed run made after its last checkpoint."""
        kept: list[str] = []
        with holding(self.path, try_="delete it; the training goes on, and its log from here"):
            rows = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            # What a kill tore, and what no step before the checkpoint wrote, is not read.
            for row in rows[: state.global_step]:
                told = json.loads(row)
                self.tokens += int(told["tokens"])
                self.last_loss = float(told["loss"])
                kept.append(row)
        wait()  # all have read before it changes
        if is_main():
            if len(kept) < state.global_step:
                _LOG.warning(
                    "%s has lost %d of the %d steps before the checkpoint; the training goes on, "
                    "and its log from here",
                    self.path,
                    state.global_step - len(kept),
                    state.global_step,
                )
            write_text(self.path, "".join(kept))
        self._started = time.monotonic()
        if self.progress is not None and kept:
            self.progress(state.global_step, state.max_steps, {})
        if state.global_step >= state.max_steps:
            raise NothingLeft

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """Note the learning rate of the step: the schedule moves on before the step ends."""
        self._row["lr"] = optimizer.param_groups[0]["lr"]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the row of the step that just ended."""
        now = time.monotonic()
        seconds = now - self._started
        self._started = now
        row = {"step": state.global_step, **self._row, "seconds": round(seconds, 4)}
        if is_main():
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        self._row = {}
        self.last_loss = row["loss"]
        self.tokens += row["tokens"]
        if self.progress is not None:
            speed = row["tokens"] / seconds if seconds > 0 else 0.0
            facts = {"loss": row["loss"], "tokens_per_s": speed}
            self.progress(state.global_step, state.max_steps, facts)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Mark the checkpoint as written to its end; only marked ones are resumed from."""
        wait()  # each process writes a part of it
        if is_main():
            folder = self.path.parent / f"checkpoint-{state.global_step}"
            write_json(folder / COMPLETE, seal(folder, [folder]))
