"""Exports for onnxruntime, OpenVINO and torch alone, each proved in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_export import Sizes, cut, word_tokenizer
from test_structure_law import law_net

from elastune.elastic.factorised import FactorisedEmbedding
from elastune.errors import BadArtifact, BadRecipe, ElastuneError
from elastune.export import save_subnetwork
from elastune.export.runtimes import RUNTIME_FORMATS, RuntimeExport, check_graph, export_graph
from elastune.space import SubnetConfig
from elastune.subnetwork import Subnetwork, extract_model

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

#: Blocks of three widths; one without a feed-forward, one without attention, one left out.
RAGGED: Sizes = ((2, 24), None, (4, 0), (0, 40))

FORMATS = tuple(RUNTIME_FORMATS)
each_format = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RuntimeExport]:
    """Return one ragged llama in every format, and rounded."""
    root = tmp_path_factory.mktemp("exports")
    sub = cut("llama", "causal-lm", RAGGED)
    cases = {name: (name, None) for name in FORMATS}
    cases |= {"int8": ("openvino", "int8"), "int4": ("openvino", "int4")}
    return {
        key: export_graph(sub, format, root / key, weights=weights, tokenizer=word_tokenizer())
        for key, (format, weights) in cases.items()
    }


def arrays(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = load_file(folder / "reference.safetensors")
    return found


def copied(export: RuntimeExport, to: Path) -> Path:
    for name in export.files:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes((export.folder / name).read_bytes())
    return to


# --- what they compute --------------------------------------------------------------------------


@each_format
def test_a_ragged_decoder_gives_the_same_logits_and_text_in_its_runtime(
    llamas: dict[str, RuntimeExport], format: str
) -> None:
    export = llamas[format]
    assert export.largest_difference < 1e-4
    assert (export.agreement.same_argmax, export.agreement.same_tokens) == (1.0, 1.0)


def test_the_reference_is_what_the_model_computes_without_a_cache(
    llamas: dict[str, RuntimeExport],
) -> None:
    model = cut("llama", "causal-lm", RAGGED).model
    stored = arrays(llamas["onnx"].folder)
    ids, mask = (torch.tensor(stored[f"case1.{name}"]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        out = model(ids, attention_mask=mask).logits
    kept = mask.bool()
    found = torch.tensor(stored["case1.logits"])[kept]
    torch.testing.assert_close(found, out[kept], rtol=1e-5, atol=1e-5)
    prompt = torch.tensor(stored["prompt0.input_ids"])
    n_new = stored["prompt0.new_ids"].shape[1]
    text = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=n_new,
        min_new_tokens=n_new,
        suppress_tokens=None,
        eos_token_id=None,
    )
    assert text[0, prompt.shape[1] :].tolist() == stored["prompt0.new_ids"][0].tolist()


def test_the_cache_of_each_layer_has_the_size_of_that_layer(
    llamas: dict[str, RuntimeExport],
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(llamas["onnx"].folder / "model.onnx"))
    shapes = {i.name: i.shape[1] for i in session.get_inputs() if i.name.startswith("past")}
    assert shapes == {  # the last layer has no attention and keeps nothing
        "past_key_values.0.key": 1,
        "past_key_values.0.value": 1,
        "past_key_values.1.key": 2,
        "past_key_values.1.value": 2,
    }


@pytest.mark.parametrize(
    ("name", "head", "format"),
    [
        ("bert", "classifier", "onnx"),
        pytest.param("bert", "reader", "openvino", marks=pytest.mark.slow),
        pytest.param("bert", "classifier", "torch-export", marks=pytest.mark.slow),
        pytest.param("gemma2", "causal-lm", "onnx", marks=pytest.mark.slow),
        pytest.param("vit", "image-classifier", "onnx", marks=pytest.mark.slow),
    ],
)
def test_other_families_and_heads_agree_in_their_runtime(
    name: str, head: str, format: str, tmp_path: Path
) -> None:
    export = export_graph(cut(name, head, ((2, 24), (4, 0), (0, 40))), format, tmp_path / "out")
    assert export.largest_difference < 2e-5
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    wanted = ["start_logits", "end_logits"] if head == "reader" else ["logits"]
    assert about["outputs"] == wanted


def test_a_gpt_neox_whose_embedding_is_two_factors_agrees_in_openvino(tmp_path: Path) -> None:
    net = law_net("gpt_neox", "causal-lm")
    rank = next(d for d in net.space.dims if "embedding" in d.name)
    choices = dict(net.space.largest()) | {rank.name: min(rank.choices)}
    sub = extract_model(net, SubnetConfig(choices))
    assert isinstance(sub.model.get_input_embeddings(), FactorisedEmbedding)
    export = export_graph(sub, "openvino", tmp_path / "out")
    assert export.largest_difference < 1e-4


# --- from folders -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "saved_as", ["hf-hetero", pytest.param("hf-padded", marks=pytest.mark.slow)]
)
def test_a_saved_folder_exports_as_the_subnetwork_does(
    saved_as: str, llamas: dict[str, RuntimeExport], tmp_path: Path
) -> None:
    sub = cut("llama", "causal-lm", RAGGED)
    save_subnetwork(sub, word_tokenizer(), tmp_path / "saved", format=saved_as)
    export = export_graph(tmp_path / "saved", "openvino", tmp_path / "out")
    mine, direct = arrays(export.folder), arrays(llamas["openvino"].folder)
    assert mine["prompt0.new_ids"].tolist() == direct["prompt0.new_ids"].tolist()
    np.testing.assert_allclose(mine["case0.logits"], direct["case0.logits"], atol=1e-4)
    assert "tokenizer.json" in export.files


# --- as users run them --------------------------------------------------------------------------

RUN = """
import sys, runpy
class Hidden:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("elastune", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Hidden())
found = runpy.run_path("lines.py")
print(found["ids"].tolist())
"""


@pytest.mark.parametrize(
    "format", ["onnx", "openvino", pytest.param("torch-export", marks=pytest.mark.slow)]
)
def test_the_lines_of_the_readme_generate_the_models_text(
    llamas: dict[str, RuntimeExport], format: str, tmp_path: Path
) -> None:
    export = llamas[format]
    card = (export.folder / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    assert code == export.code
    prompt = arrays(export.folder)["prompt1.input_ids"].tolist()
    folder = copied(export, tmp_path)
    (folder / "lines.py").write_text(code.replace("[[1, 2, 3]]", str(prompt)))
    done = subprocess.run(
        [sys.executable, "-I", "-c", RUN], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    new = json.loads(done.stdout)[0][len(prompt[0]) :]
    expected = arrays(export.folder)["prompt1.new_ids"][0].tolist()
    assert new[: len(expected)] == expected


# --- rounded weights ----------------------------------------------------------------------------


def test_rounded_weights_are_smaller_and_less_exact(llamas: dict[str, RuntimeExport]) -> None:
    names = ("openvino", "int8", "int4")
    errors = [llamas[name].agreement.relative_error for name in names]
    assert errors == sorted(errors)
    assert 1e-3 < errors[1] < 0.1
    assert errors[1] < errors[2] < 0.6
    sizes = [(llamas[name].folder / "openvino_model.bin").stat().st_size for name in names]
    assert sizes[0] > 2 * sizes[1]
    assert sizes[1] > sizes[2]


# --- broken files -------------------------------------------------------------------------------


def flip_onnx(folder: Path) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(folder / "model.onnx")
    weight = sorted(model.graph.initializer, key=lambda i: i.ByteSize())[-4]
    turned = numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name)
    weight.CopyFrom(turned)
    (folder / "model.onnx.data").unlink()
    where = {"save_as_external_data": True, "location": "model.onnx.data"}
    onnx.save(model, folder / "model.onnx", **where)


def drop_onnx(folder: Path) -> None:
    """Let what a matrix adds to the residual be left out."""
    import onnx

    model = onnx.load(folder / "model.onnx")
    makers = {name: node for node in model.graph.node for name in node.output}
    add = next(
        node
        for node in reversed(model.graph.node)
        if node.op_type == "Add" and _maker(makers, node.input[1]) == "MatMul"
    )
    for node in model.graph.node:
        kept = [add.input[0] if name == add.output[0] else name for name in node.input]
        del node.input[:]
        node.input.extend(kept)
    onnx.save(model, folder / "model.onnx")


def _maker(makers: Any, name: str) -> str:
    return makers[name].op_type if name in makers else ""


def flip_openvino(folder: Path) -> None:
    """Turn all bits of one stored matrix of a block (floats change sign and size)."""
    layers = ET.parse(folder / "openvino_model.xml").getroot().iter("layer")
    stored = [layer.find("data") for layer in layers if layer.get("type") == "Const"]
    sizes = [(int(d.get("size", 0)), int(d.get("offset", 0))) for d in stored if d is not None]
    size, offset = sorted(sizes)[-4]
    file = folder / "openvino_model.bin"
    data = bytearray(file.read_bytes())
    data[offset : offset + size] = bytes(b ^ 0x85 for b in data[offset : offset + size])
    file.write_bytes(bytes(data))


def drop_openvino(folder: Path) -> None:
    import openvino

    model = openvino.Core().read_model(folder / "openvino_model.xml")
    add = next(
        op
        for op in reversed(model.get_ordered_ops())
        if op.get_type_name() == "Add" and op.input_value(1).get_node().get_type_name() == "MatMul"
    )
    add.output(0).replace(add.input_value(0))
    (folder / "new").mkdir()
    openvino.save_model(model, folder / "new" / "openvino_model.xml", compress_to_fp16=False)
    for file in (folder / "new").iterdir():
        file.replace(folder / file.name)


def flip_torch(folder: Path) -> None:
    program = torch.export.load(folder / "model.pt2")
    weight = next(w for n, w in program.state_dict.items() if n.endswith("down_proj.weight"))
    with torch.no_grad():
        weight.neg_()
    save_torch(program, folder)


def drop_torch(folder: Path) -> None:
    program = torch.export.load(folder / "model.pt2")
    add = next(
        node
        for node in reversed(program.graph.nodes)
        if node.target is torch.ops.aten.add.Tensor
        and getattr(node.args[1], "target", None) is torch.ops.aten.linear.default
    )
    add.replace_all_uses_with(add.args[0])
    save_torch(program, folder)


def save_torch(program: Any, folder: Path) -> None:
    program.example_inputs = None
    torch.export.save(program, folder / "model.pt2")


BREAKS = {
    "onnx": (flip_onnx, drop_onnx),
    "openvino": (flip_openvino, drop_openvino),
    "torch-export": (flip_torch, drop_torch),
}


@pytest.mark.parametrize(
    ("format", "number"),
    [
        pytest.param(format, number, marks=[pytest.mark.slow] if format == "torch-export" else [])
        for format in FORMATS
        for number in (0, 1)
    ],
)
def test_a_turned_tensor_and_a_left_out_layer_are_found_by_what_the_graph_computes(
    llamas: dict[str, RuntimeExport], format: str, number: int, tmp_path: Path
) -> None:
    folder = copied(llamas[format], tmp_path)
    BREAKS[format][number](folder)
    with pytest.raises(ElastuneError, match="does not compute what the model does: logits differ"):
        check_graph(folder)


@pytest.mark.parametrize("weights", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_a_changed_rounded_tensor_is_found_by_what_the_graph_computes(
    llamas: dict[str, RuntimeExport], weights: str, tmp_path: Path
) -> None:
    folder = copied(llamas[weights], tmp_path)
    assert check_graph(folder) == llamas[weights].agreement
    flip_openvino(folder)
    with pytest.raises(ElastuneError, match="logits differ"):
        check_graph(folder)


def test_one_changed_bit_is_found(llamas: dict[str, RuntimeExport], tmp_path: Path) -> None:
    folder = copied(llamas["onnx"], tmp_path)
    assert check_graph(folder) == llamas["onnx"].agreement
    file = folder / "model.onnx.data"
    data = bytearray(file.read_bytes())
    data[1024] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ElastuneError, match="data changed since the export"):
        check_graph(folder)


@each_format
def test_half_a_file_and_no_file_are_found(
    llamas: dict[str, RuntimeExport], format: str, tmp_path: Path
) -> None:
    folder = copied(llamas[format], tmp_path)
    file = folder / RUNTIME_FORMATS[format].file
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ElastuneError, match="the runtime cannot run what was exported"):
        check_graph(folder)
    file.unlink()
    with pytest.raises(BadArtifact, match=f"lacks {file.name}"):
        check_graph(folder)


def test_an_export_that_computes_something_else_is_not_kept(
    llamas: dict[str, RuntimeExport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = RUNTIME_FORMATS["onnx"]

    def wrong(model: Any, graph: Any, folder: Path, weights: str) -> None:
        for name in ("model.onnx", "model.onnx.data"):  # written before, which takes seconds
            (folder / name).write_bytes((llamas["onnx"].folder / name).read_bytes())
        flip_onnx(folder)

    monkeypatch.setitem(RUNTIME_FORMATS, "onnx", replace(stock, write=wrong))
    out = copied(llamas["onnx"], tmp_path / "out")
    before = sorted(p.name for p in out.iterdir())
    with pytest.raises(ElastuneError, match="logits differ"):
        export_graph(cut("llama", "causal-lm", RAGGED), "onnx", out)
    assert sorted(p.name for p in out.iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# --- what is refused ----------------------------------------------------------------------------


def test_a_pt2_file_holds_nothing_pickled_and_one_that_does_is_not_loaded(
    llamas: dict[str, RuntimeExport], tmp_path: Path
) -> None:
    folder = copied(llamas["torch-export"], tmp_path)
    file = folder / "model.pt2"
    with zipfile.ZipFile(file) as archive:
        starts = [archive.read(name)[:1] for name in archive.namelist() if name.endswith(".pt")]
    assert b"P" not in starts  # of the zip file that torch.save writes
    program = torch.export.load(file)
    assert program.example_inputs is None
    cache = [(torch.zeros(1, heads, 0, 8),) * 2 for heads in (1, 2)]
    ids = torch.zeros(1, 2, dtype=torch.long)
    program.example_inputs = ((ids, ids, ids, cache), {})
    torch.export.save(program, file)
    with pytest.raises(ElastuneError, match="holds pickled data"):
        check_graph(folder)


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    sub = cut("llama", "causal-lm", ((2, 16), (2, 16)))
    with pytest.raises(BadRecipe, match=r"unknown format 'onx' \(did you mean 'onnx'"):
        export_graph(sub, "onx", tmp_path / "out")
    with pytest.raises(BadRecipe, match="onnx has no weights 'int4'"):
        export_graph(sub, "onnx", tmp_path / "out", weights="int4")
    adapter: Any = object()
    with pytest.raises(BadRecipe, match="is not merged"):
        export_graph(replace(sub, adapter=adapter), "onnx", tmp_path / "out")
    half = Subnetwork(sub.config, sub.model.to(torch.bfloat16), sub.shapes, sub.kept_blocks)
    with pytest.raises(BadRecipe, match="bfloat16"):
        export_graph(half, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
