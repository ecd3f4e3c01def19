"""Exported folders in a fresh process that cannot import elastune: plain transformers and peft."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exports_without_elastune import IDS, IMAGE
from test_export import FORMAT_CASES, cut, word_tokenizer

from elastune.export import save_subnetwork
from elastune.export.verify import auto_class

SCRIPT = Path(__file__).with_name("exports_without_elastune.py")

Results = dict[str, Any]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Save every case, load all in one fresh process; return what it and this process found."""
    root = tmp_path_factory.mktemp("exports")
    cases, expected = {}, {}
    for name, head, sizes, format in FORMAT_CASES:
        sub = cut(name, head, sizes)
        key = f"{name}-{format}"
        save_subnetwork(sub, word_tokenizer(), root / key, format=format)
        generates = head == "causal-lm"
        auto = auto_class(sub.model).__name__
        cases[key] = {"folder": str(root / key), "auto": auto, "generates": generates}
        is_image = sub.model.main_input_name == "pixel_values"
        inputs = {"pixel_values": IMAGE} if is_image else {"input_ids": IDS}
        with torch.no_grad():
            expected[key] = sub.model(**inputs)[0].flatten()
    (root / "cases.json").write_text(json.dumps(cases))
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules")}
    command = [sys.executable, str(SCRIPT), str(root / "cases.json"), str(root / "out.json")]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: Results = json.loads((root / "out.json").read_text())
    found["expected"] = expected
    return found


KEYS = [f"{name}-{format}" for name, _, _, format in FORMAT_CASES]
each = pytest.mark.parametrize("key", KEYS)
each_decoder = pytest.mark.parametrize(
    "key", [f"{name}-{format}" for name, head, _, format in FORMAT_CASES if head == "causal-lm"]
)


def test_no_part_of_elastune_was_imported_there(fresh: Results) -> None:
    assert fresh["elastune"] == []


@each
def test_a_folder_computes_in_a_fresh_process_what_the_subnetwork_did(
    fresh: Results, key: str
) -> None:
    torch.testing.assert_close(
        torch.tensor(fresh[key]["output"]), fresh["expected"][key], rtol=1e-5, atol=1e-5
    )


@each
def test_only_uneven_blocks_need_a_class_of_their_own(fresh: Results, key: str) -> None:
    assert fresh[key]["class"].startswith("Elastune") == key.endswith("hf-hetero")


@each
def test_eager_attention_gives_the_same_and_is_the_one_in_use(fresh: Results, key: str) -> None:
    assert fresh[key]["eager"] < 1e-4
    assert fresh[key]["eager_is_kept"] == "eager"


@each
def test_it_loads_in_bfloat16(fresh: Results, key: str) -> None:
    assert fresh[key]["dtype"] == "torch.bfloat16"
    assert fresh[key]["bfloat16"] > 0.98


@each
def test_saved_once_more_or_copied_it_is_the_same(fresh: Results, key: str) -> None:
    assert fresh[key]["saved_again"] < 1e-6
    assert fresh[key]["copied"] < 1e-6


@each
def test_peft_wraps_it_and_every_adapter_gets_a_gradient(fresh: Results, key: str) -> None:
    assert fresh[key]["trained"] == [True, True]


@each_decoder
def test_generation_with_a_dynamic_or_static_cache_equals_that_without(
    fresh: Results, key: str
) -> None:
    assert fresh[key]["dynamic"] < 1e-4
    assert fresh[key].get("static", 0.0) < 1e-4


def test_static_caches_were_tried(fresh: Results) -> None:
    tried = [key for key in KEYS if "static" in fresh[key]]
    assert {"llama-hf-hetero", "qwen3-hf-hetero", "phi3-hf-hetero"} <= set(tried)
