"""The table of all benchmarks: goals are judged, failures named, nothing stops the rest."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

RUN_ALL = Path(__file__).resolve().parent.parent / "benchmarks" / "run_all.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The runner, over four scripts of its own."""
    spec = importlib.util.spec_from_file_location("bench_run_all", RUN_ALL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_run_all", module)
    spec.loader.exec_module(module)
    good = {"figures": {"fast": 0.5, "slow": 2, "inner": {"ratio": 3.0}}}
    skipped = {"figures": {}, "skipped": "no GPU"}
    bodies = {
        "good": f"held = bytearray(2**27)\nprint('talk')\nprint('''{json.dumps(good)}''')",
        "bad": "raise ValueError('of no use')",
        "stuck": "import time; time.sleep(60)",
        "skips": f"print('''{json.dumps(skipped)}''')",
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(body, encoding="utf-8")
    figures = (
        module.Figure("fast", "fast one", 1.0),
        module.Figure("slow", "slow one", 1.0),
        module.Figure("inner.ratio", "nested", 2.0, at_least=True),
        module.Figure("absent", "absent one", 1.0),
    )
    scripts = [module.Script(name, figures if name == "good" else ()) for name in bodies]
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "SCRIPTS", tuple(scripts))
    return module


def test_the_table_judges_goals_names_failures_and_goes_on(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--out", str(out), "--timeout", "4"])
    with pytest.raises(SystemExit, match="1"):
        bench.main()
    text = (out / "bench.md").read_text(encoding="utf-8")
    assert "| fast one | 0.5 | <= 1 | passed | good |" in text
    assert "| slow one | 2 | <= 1 | **missed** | good |" in text
    assert "| nested | 3 | >= 2 | passed | good |" in text
    assert "| absent one | not measured | <= 1 | - | good |" in text
    assert "ValueError: of no use" in text
    assert "cut off after 4 s" in text
    assert "skipped: no GPU" in text
    found = json.loads((out / "bench.json").read_text(encoding="utf-8"))
    by_name = {script["name"]: script for script in found["scripts"]}
    assert list(by_name) == ["good", "bad", "stuck", "skips"]
    assert by_name["good"]["peak_mb"] > 128
    assert {"cores", "torch", "processor"} <= set(found["machine"])


def test_scripts_for_which_no_time_is_left_are_named_and_not_begun(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--out", str(out), "--minutes", "0"])
    with pytest.raises(SystemExit, match="0"):
        bench.main()
    assert (out / "bench.md").read_text(encoding="utf-8").count("no time left") == 4
    assert not list(out.glob("*.log"))


def test_every_benchmark_is_in_the_table() -> None:
    spec = importlib.util.spec_from_file_location("bench_table", RUN_ALL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_table"] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["bench_table"]
    scripts = {p.stem for p in RUN_ALL.parent.glob("*.py") if "__main__" in p.read_text("utf-8")}
    known = {script.name for script in module.SCRIPTS}
    assert scripts - known == {"run_all", "pruned_by"}
