"""Every benchmark at a small size, and one table: figure, value, goal, whether it was reached.

Scripts run one after another, each in a process of its own, as `python benchmarks/NAME.py --quick`;
one that fails is named in the table and stops nobody. Small sizes tell whether a figure is about
where it should be, not what docs/results.md records: that is each script's own run without --quick.

Together they take at most --minutes, and what there is no time left for is named, too; the whole
methods lonas and eftnas run with --only alone. Writes bench.md and bench.json to --out after every
script, and the output of each. Peak memory is that of a script's largest process; its time includes
its imports, a few seconds of any.

    python benchmarks/run_all.py [--only train_step sparsify] [--minutes 15] [--out build/bench]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

HERE = Path(__file__).resolve().parent
SHORTEST_S = 5
"""Less time than any script needs."""


class Figure(NamedTuple):
    """A figure of a script's JSON line; dots lead into objects, and a goal is an upper bound."""

    key: str
    label: str
    goal: float | None = None
    at_least: bool = False

    def of(self, figures: Mapping[str, Any]) -> float | None:
        """Return its value, None where the script could not measure it."""
        found: Any = figures
        for part in self.key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return float(found) if isinstance(found, int | float) else None

    def verdict(self, value: float | None) -> str:
        """Return passed or missed; a dash where there is no goal, or no value."""
        if value is None or self.goal is None:
            return "-"
        reached = value >= self.goal if self.at_least else value <= self.goal
        return "passed" if reached else "**missed**"

    @property
    def shown_goal(self) -> str:
        """The goal as text."""
        if self.goal is None:
            return ""
        return f"{'>=' if self.at_least else '<='} {self.goal:g}"


class Script(NamedTuple):
    """A benchmark and what the table shows of it."""

    name: str
    figures: tuple[Figure, ...]
    options: tuple[str, ...] = ("--quick",)
    only_if_asked: bool = False


SCRIPTS = (
    Script(
        "startup",
        (
            Figure("import_s", "`import elastune`, s", 0.3),
            Figure("help_s", "`elastune --help`, s", 0.5),
        ),
    ),
    Script(
        "activate",
        (
            Figure("activate_ms", "activating a sub-network, ms", 1),
            Figure("ready_s", "from the loaded model to the first draw, s", 2),
        ),
    ),
    Script(
        "config_cost",
        (
            Figure("ranks_us", "cost of a configuration, 90 dims, us", 100),
            Figure("lonas_us", "cost of a configuration, 180 dims, us", 100),
        ),
    ),
    Script(
        "equality",
        (
            Figure("peft_max_abs_logit_difference", "active against stock PEFT, logits", 1e-5),
            Figure(
                "checkpointing_relative_gradient_error",
                "gradients with checkpointing, relative error",
                1e-6,
            ),
        ),
    ),
    Script(
        "train_step",
        (
            Figure("nls_over_peft_cpu", "NLS step / PEFT LoRA step, CPU", 0.9),
            Figure("nls_over_floor_cpu", "NLS step / frozen base alone, CPU", 1.15),
            Figure("memory_over_peft", "peak memory, NLS / PEFT LoRA", 0.6),
        ),
    ),
    Script(
        "sandwich_step",
        (Figure("sandwich.times_plain", "sandwich step / plain step"),),
    ),
    Script(
        "masked_step",
        (Figure("ratio.zeros, 1/4", "step that keeps zeros / plain NLS step, CPU", 1.15),),
    ),
    Script(
        "sparsify",
        (
            Figure("wanda_over_two_forwards_cpu", "Wanda / two forward passes, CPU", 1.3),
            Figure("sparsegpt_over_two_forwards_cpu", "SparseGPT / two forward passes, CPU"),
            Figure("wanda_peak_mb", "Wanda: peak memory, MB"),
        ),
    ),
    Script(
        "streaming",
        (
            Figure("smollm2_streamed_over_weights", "streamed Wanda: memory / weights"),
            Figure("generated_different_tensors", "streamed against in memory: tensors", 0),
        ),
    ),
    Script(
        "llm_compressor",
        (
            Figure("wanda_unstructured_seconds", "Wanda 50 %: CPU / llm-compressor's", 1.0),
            Figure("sparsegpt_unstructured_seconds", "SparseGPT 50 %: the same", 1.0),
            Figure("wanda_2_4_seconds", "Wanda 2:4: the same", 1.0),
            Figure("sparsegpt_2_4_seconds", "SparseGPT 2:4: the same", 1.0),
            Figure("wanda_unstructured_peak", "Wanda 50 %: peak memory / llm-compressor's", 1.0),
        ),
    ),
    Script(
        "four_bit",
        (
            Figure(
                "nf4_checkpointing_peak_over_float32",
                "4-bit base with checkpointing, peak / float32",
            ),
            Figure("nf4_cpu_over_float32", "its step without / float32's, CPU"),
        ),
    ),
    Script(
        "search_overhead",
        (Figure("ms_per_trial", "search: overhead of a trial, 210 dims, ms", 50),),
    ),
    Script(
        "search_cost",
        (Figure("wall_over_full", "search / its sub-networks one by one, wall"),),
    ),
    Script(
        "search_front",
        (Figure("cost_to_match_nsga2", "auto's work to match all of nsga2's", 0.05),),
    ),
    Script(
        "choice_losses",
        (Figure("pearson", "single-choice losses: estimated against measured, Pearson"),),
    ),
    Script(
        "extract_load",
        (
            Figure("extract_s", "extracting a sub-network, s"),
            Figure("load_over_dense", "loading it / loading the dense model", 1.1),
        ),
    ),
    Script(
        "export_runtimes",
        (
            Figure("uneven_torch_prefill", "torch: prompt tokens/s, cut model"),
            Figure("uneven_onnx_float32_prefill", "onnxruntime: the same"),
            Figure("uneven_openvino_float32_prefill", "openvino: the same"),
            Figure("uneven_torch_decode", "torch: generated tokens/s, cut model"),
            Figure("uneven_onnx_float32_decode", "onnxruntime: the same"),
            Figure("uneven_openvino_float32_decode", "openvino: the same"),
        ),
    ),
    Script(
        "realised_speedup",
        (
            Figure("torch_prefill_cpu", "speed-up / MACs ratio at 60 %, prefill, CPU", 0.85, True),
            Figure("torch_decode_cpu", "speed-up / MACs ratio at 60 %, decode, CPU", 0.85, True),
            Figure("train_step_random_over_full_cpu", "step of a sub-network / at full size", 1.0),
        ),
    ),
    Script(
        "latency_table",
        (
            Figure("predict_us", "predicting a latency, us"),
            Figure("prefill_median", "predicted prefill, median relative error"),
        ),
    ),
    Script(
        "evaluate",
        (
            Figure("few_shot_generation_over_transformers_generate_cpu", "few-shot, CPU", 2, True),
            Figure("generation_over_transformers_generate_cpu", "zero-shot, CPU", 2, True),
            Figure("loglik_over_lm_eval_cpu", "choices, lm-eval / ours, CPU", 1.3, True),
        ),
    ),
    Script(
        "metrics", (Figure("squad_f1_max_abs_difference", "SQuAD F1 against the official", 1e-9),)
    ),
    Script(
        "growth",
        (
            Figure("training_by_blocks", "slope of a training step over blocks", 1.1),
            Figure("evaluation_by_blocks", "slope of an evaluation over blocks", 1.1),
            Figure("calibration_by_blocks", "slope of Wanda over blocks", 1.1),
            Figure("activate_by_blocks", "slope of activation over blocks", 1.1),
            Figure("cost_by_blocks", "slope of a cost over blocks", 1.1),
            Figure("proposal_by_blocks", "slope of proposals over blocks", 1.1),
            Figure("training_by_tokens_over_macs", "slope of a step over tokens - MACs'", 0.1),
            Figure("evaluation_by_tokens_over_macs", "slope of evaluation - MACs'", 0.1),
            Figure("calibration_by_tokens_over_macs", "slope of Wanda - MACs'", 0.1),
            Figure("search_random_by_trials", "slope of a search over trials, random", 1.1),
            Figure("search_hill_climb_by_trials", "the same, hill_climb", 1.1),
            Figure("search_nsga2_by_trials", "the same, nsga2", 1.1),
        ),
    ),
    Script(
        "processes",
        (Figure("weights_ddp_ranks", "two processes against one, weights", 1e-4),),
    ),
    Script("structure_cuts", ()),
    Script("importance_cuts", ()),
    Script(
        "projected_cost", (Figure("hours_train_7b", "7B on one GPU: training, projected, hours"),)
    ),
    Script("shears_math", ()),
    # Whole methods take five minutes even when they learn nothing.
    Script("lonas", (), only_if_asked=True),
    Script("eftnas", (), only_if_asked=True),
)
"""In the order of the table; `make bench` runs them all but those that want to be asked for."""


@dataclass
class Outcome:
    """What became of a script.

    Attributes:
        error: its last words where it failed or was cut off.
        skipped: why it measured nothing.
        seconds: wall time. cpu_s: of it and its children, all threads.
        peak_mb: of its largest process, in MB of 2**20 bytes.
    """

    name: str
    figures: dict[str, Any]
    error: str | None
    skipped: str | None
    seconds: float
    cpu_s: float
    peak_mb: float


def main() -> None:
    args = _arguments()
    console = Console()
    chosen = [
        script
        for script in SCRIPTS
        if (script.name in args.only if args.only else not script.only_if_asked)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + 60 * args.minutes
    for number, script in enumerate(chosen, start=1):
        left = deadline - time.monotonic()
        if left < SHORTEST_S:
            reason = f"no time left of {args.minutes:g} minutes"
            outcome = Outcome(script.name, {}, None, reason, 0.0, 0.0, 0.0)
        else:
            outcome = run(script, args.out, min(args.timeout, left))
        outcomes.append(outcome)
        state = outcome.error or outcome.skipped or "done"
        console.print(
            f"{number}/{len(chosen)} {script.name}: {outcome.seconds:.0f} s "
            f"({outcome.cpu_s:.0f} s CPU, {outcome.peak_mb:,.0f} MB), {state}",
            highlight=False,
            markup=False,
        )
        write(chosen, outcomes, args.out)
    print((args.out / "bench.md").read_text(encoding="utf-8"))
    figures = {o.name: o.figures for o in outcomes}
    print(json.dumps({"benchmark": "run_all", "figures": figures}))
    sys.exit(1 if any(outcome.error for outcome in outcomes) else 0)


def run(script: Script, out: Path, timeout_s: float) -> Outcome:
    """Run a script, its output to ``out``/NAME.log."""
    log = out / f"{script.name}.log"
    command = [sys.executable, str(HERE / f"{script.name}.py"), *script.options]
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        late = _wait(process, timeout_s)
    seconds = time.monotonic() - started
    # What a child's memory is said to be begins at its parent's peak: this process stays small.
    usage = process.usage  # type: ignore[attr-defined]
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
    answer, error = {}, None
    if late:
        error = f"cut off after {timeout_s:.0f} s; see {log}"
    elif process.returncode:
        error = f"failed with {process.returncode}: {lines[-1][:120]}; see {log}"
    else:
        try:
            answer = json.loads(lines[-1])
        except ValueError:
            error = f"its last line is no JSON; see {log}"
    return Outcome(
        script.name,
        answer.get("figures", {}),
        error,
        answer.get("skipped"),
        seconds,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss / (1024 if sys.platform != "darwin" else 2**20),
    )


def _wait(process: Any, timeout_s: float) -> bool:
    """Wait for a script, noting what it used; return whether it was cut off."""
    deadline = time.monotonic() + timeout_s
    late = False
    try:
        while True:
            found, status, process.usage = os.wait4(process.pid, os.WNOHANG)
            if found:
                process.returncode = os.waitstatus_to_exitcode(status)
                return late
            if not late and time.monotonic() > deadline:
                late = True
                os.killpg(process.pid, 9)
            time.sleep(0.1)
    except KeyboardInterrupt:
        os.killpg(process.pid, 15)
        raise


def write(scripts: Sequence[Script], outcomes: Sequence[Outcome], out: Path) -> None:
    """Write the table so far, and everything as JSON."""
    facts = machine()
    rows = [["figure", "value", "goal", "", "script"]]
    for script, outcome in zip(scripts, outcomes, strict=False):
        if outcome.error or outcome.skipped:
            rows.append([outcome.error or f"skipped: {outcome.skipped}", "", "", "", script.name])
            continue
        for figure in script.figures:
            value = figure.of(outcome.figures)
            shown = "not measured" if value is None else f"{value:.3g}"
            verdict = figure.verdict(value)
            rows.append([figure.label, shown, figure.shown_goal, verdict, script.name])
    times = [["script", "wall s", "CPU s", "peak MB"]]
    for outcome in outcomes:
        used = (outcome.seconds, outcome.cpu_s, outcome.peak_mb)
        times.append([outcome.name, *(f"{value:,.0f}" for value in used)])
    sums = [sum(o.seconds for o in outcomes), sum(o.cpu_s for o in outcomes)]
    times.append(["all", *(f"{value:,.0f}" for value in sums), ""])
    told = ", ".join(f"{name} {value}" for name, value in facts.items())
    text = f"{told}\n\n{_markdown(rows)}\n\n{_markdown(times)}\n"
    (out / "bench.md").write_text(text, encoding="utf-8")
    found = {"machine": facts, "scripts": [asdict(outcome) for outcome in outcomes]}
    (out / "bench.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    facts = {"processor": platform.processor() or platform.machine(), "cores": str(os.cpu_count())}
    about = Path("/proc/cpuinfo")
    if about.is_file():
        lines = about.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        facts["processor"] = names[0] if names else facts["processor"]
    facts["threads"] = os.environ.get("OMP_NUM_THREADS", "all")
    if hasattr(os, "getloadavg"):
        facts["load"] = f"{os.getloadavg()[0]:.1f}"
    facts["Python"] = platform.python_version()
    return facts | {name: version(name) for name in ("torch", "transformers", "peft")}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [script.name for script in SCRIPTS]
    parser.add_argument("--only", nargs="+", choices=known, help="these scripts alone")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one script")
    parser.add_argument("--minutes", type=float, default=14.5, help="for all of them")
    return parser.parse_args()


if __name__ == "__main__":
    main()
