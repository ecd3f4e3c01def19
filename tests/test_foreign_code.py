"""No code that comes with a model, an adapter, an export or data runs unless it is trusted."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_resume import Killed, break_at_call, checkpoints, fit
from tiny_llama import tiny_llama, tiny_tokenizer
from tiny_run import save_tiny_model

from elastune.adapters import cut_adapter
from elastune.errors import BadArtifact, BadRecipe, ElastuneError, UnsupportedModel
from elastune.export import check_export
from elastune.export.foreign import is_own, refuse_code
from elastune.export.profiles import profile_exports
from elastune.export.runtimes import RUNTIME_FORMATS, refuse_settings
from elastune.export.source import load_folder
from elastune.models import load_model
from elastune.models.registration import family_classes
from elastune.tasks.prompts import chat_prompt
from elastune.tasks.sources import read_rows
from elastune.trained import _check_states

EVIL_MODEL = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there if code of others ran. Nobody is at the terminal to say yes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    return tmp_path / "marker"


@pytest.fixture
def model(tmp_path: Path, marker: Path) -> Path:
    folder = save_tiny_model(tmp_path / "model")
    (folder / "evil.py").write_text(EVIL_MODEL.format(marker=str(marker)))
    return folder


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


# --- checkpoints ----------------------------------------------------------------------------------


def test_classes_that_a_checkpoint_brings_are_refused_unless_trusted(
    model: Path, marker: Path
) -> None:
    change(model / "config.json", model_type="evil", auto_map=AUTO_MAP)
    with pytest.raises(UnsupportedModel, match="Python code of its own"):
        load_model(model)
    with pytest.raises(ElastuneError):
        load_folder(model)
    assert not marker.exists()
    with pytest.raises(UnsupportedModel):  # it runs, and is no family that elastune knows
        load_model(model, trust_remote_code=True)
    assert marker.exists(), "the trap does not work, and the test above says nothing"


def test_of_a_known_type_the_stock_classes_are_taken(model: Path, marker: Path) -> None:
    change(model / "config.json", auto_map=AUTO_MAP)
    loaded, _ = load_model(model)
    assert type(loaded).__module__.startswith("transformers.models.llama")
    assert load_folder(model).model.num_parameters() == loaded.num_parameters()
    assert not marker.exists()


def test_a_tokenizer_of_its_own_class_is_not_run(model: Path, marker: Path) -> None:
    change(
        model / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]},
    )
    for load in (load_model, load_folder):
        with contextlib.suppress(ElastuneError):
            load(model)
    assert not marker.exists()


def test_attention_code_of_the_hub_is_refused(model: Path, marker: Path) -> None:
    for name in ("attn_implementation", "_attn_implementation"):
        change(model / "config.json", **{name: "somebody/kernel"})
        with contextlib.suppress(UnsupportedModel):
            loaded, _ = load_model(model)
            assert loaded.config._attn_implementation in ("sdpa", "eager")


def test_pickled_weights_are_never_read(model: Path, marker: Path) -> None:
    weights = (model / "model.safetensors").read_bytes()
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "model.ckpt"):
        (model / name).write_bytes(pickle.dumps(Touch(marker)))
    load_model(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(BadArtifact, match=r"pytorch_model\.bin\) are not loaded"):
        load_model(model)
    (model / "model.safetensors").write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(BadArtifact):
        load_model(model)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadArtifact):
        load_model(model)
    (model / "model.safetensors").write_bytes(weights)
    assert not marker.exists()


HOSTILE_TEMPLATES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}",
    "{{ namespace.__init__.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "{% set x = messages.append(1) %}{{ x }}",
    *("{{ raise_exception('no') }}", "{% for %}", "{{ 1 / 0 }}", "{{ messages[7].content }}"),
    "{% for i in range(10 ** 9) %}{% endfor %}",
)


@pytest.mark.parametrize("template", HOSTILE_TEMPLATES)
def test_a_chat_template_stays_in_its_sandbox(template: str, marker: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template.replace("MARKER", str(marker))
    turns = [{"role": "user", "content": "hi"}]
    with contextlib.suppress(BadRecipe):
        assert "class" not in chat_prompt(tokenizer, turns, "the test")
    assert not marker.exists()


# --- adapters -------------------------------------------------------------------------------------


@pytest.fixture
def lora(tmp_path: Path, model: Path, marker: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "lora"
    settings = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(tiny_llama(tiny_tokenizer()), settings)
    for parameter_name, value in wrapped.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(value)
    wrapped.save_pretrained(folder)
    (folder / "evil.py").write_text((model / "evil.py").read_text())
    change(folder / "adapter_config.json", base_model_name_or_path=str(model))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"auto_mapping": {"parent_library": "evil", "base_model_class": "EvilModel"}},
        {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "evil"},
        {"megatron_config": {"tensor_model_parallel_size": 0}, "megatron_core": "evil"},
        {"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}}
        | {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "evil", "inference_mode": False},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_names_no_module_that_is_imported(
    lora: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    monkeypatch.syspath_prepend(str(lora))  # so that `import evil` would work
    change(lora / "adapter_config.json", **settings)
    for load in (lambda: load_folder(lora), lambda: cut_adapter(lora, tmp_path / "out", rank=2)):
        try:
            load()
        except ElastuneError:
            continue
        except (TypeError, ValueError, KeyError) as error:
            pytest.fail(f"{error!r}")
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore")
def test_pickled_adapters_are_never_read(lora: Path, tmp_path: Path, marker: Path) -> None:
    (lora / "adapter_model.bin").write_bytes(pickle.dumps(Touch(marker)))
    cut_adapter(lora, tmp_path / "out", rank=2)
    (lora / "adapter_model.safetensors").unlink()
    for load in (lambda: load_folder(lora), lambda: cut_adapter(lora, tmp_path / "out", rank=2)):
        with pytest.raises(BadArtifact, match="pickled weights"):
            load()
    assert not marker.exists()


# --- checkpoints of a training --------------------------------------------------------------------


def unpickled(folder: Path, name: str, marker: Path) -> Path:
    """Return a folder with one file, unpickling which makes ``marker``."""
    folder.mkdir()
    torch.save({"state": Touch(marker)}, folder / name)
    return folder


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_resumed_training_unpickles_numbers_alone(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with monkeypatch.context() as patch:
        break_at_call(patch, 5, Killed())
        with pytest.raises(Killed):
            fit(tmp_path / "run", checkpoint_every=2)
    newest = tmp_path / "run" / max(checkpoints(tmp_path / "run"))
    assert (newest / "optimizer.pt").is_file()
    torch.save({"state": Touch(marker)}, newest / name)
    with contextlib.suppress(BadArtifact):  # or it goes on from the checkpoint before
        fit(tmp_path / "run", checkpoint_every=2)
    assert not marker.exists()
    with pytest.raises(BadArtifact, match="cannot be gone on from"):
        _check_states(unpickled(tmp_path / "alone", name, marker))
    assert not marker.exists()


# --- exports --------------------------------------------------------------------------------------


@pytest.fixture
def hetero(model: Path) -> Path:
    """What passes for an export with a modelling file that elastune wrote."""
    classes = family_classes("llama")
    settings = {"model_type": classes.config.model_type, "auto_map": classes.auto_map()}
    change(model / "config.json", **settings)
    (model / classes.file_name).write_text(classes.source())
    record = {"format": "hf-hetero", "runtime": "transformers", "base": None, "outputs": []}
    record |= {"auto_class": "AutoModelForCausalLM", "sha256": {}}
    (model / "export.json").write_text(json.dumps(record))
    save_file({"x": torch.zeros(1)}, model / "reference.safetensors")
    return model


def test_the_modelling_file_that_elastune_writes_is_known_by_its_letters(hetero: Path) -> None:
    refuse_code(hetero, "hf-hetero")
    assert is_own(hetero)
    file = hetero / family_classes("llama").file_name
    text = file.read_text()
    file.write_text(text.replace("Written by elastune ", "Written by elastune 0.0.1-"))
    assert is_own(hetero), "another version that writes the same is as good"
    file.write_text(text + "\n# more\n")
    assert not is_own(hetero)


@pytest.mark.parametrize("how", ["file", "auto_map", "type", "other repository"])
def test_check_and_profile_run_no_modelling_file_of_others(
    hetero: Path, marker: Path, how: str
) -> None:
    evil = (hetero / "evil.py").read_text()
    if how == "file":
        (hetero / family_classes("llama").file_name).write_text(evil)
    elif how == "auto_map":
        change(hetero / "config.json", auto_map=AUTO_MAP)
    elif how == "type":
        change(hetero / "config.json", model_type="elastune_evil", auto_map=AUTO_MAP)
    else:
        auto_map = {"AutoConfig": f"{hetero}--evil.EvilConfig"}
        change(hetero / "config.json", auto_map=auto_map)
    for run in (lambda: check_export(hetero), lambda: profile_exports([hetero])):
        with pytest.raises(ElastuneError, match="did not write"):
            run()
    assert not is_own(hetero)
    assert not marker.exists()


@pytest.mark.slow
def test_profile_runs_no_code_of_a_folder_without_a_record(hetero: Path, marker: Path) -> None:
    (hetero / "export.json").unlink()
    change(hetero / "config.json", auto_map=AUTO_MAP)
    with pytest.raises(ElastuneError):
        profile_exports([hetero], rounds=1, prompt_tokens=2, new_tokens=1)
    assert not marker.exists()


def test_a_config_file_of_others_in_a_nemotron_export_is_not_run(model: Path, marker: Path) -> None:
    (model / "configuration_decilm.py").write_text((model / "evil.py").read_text())
    (model / "export.json").write_text(json.dumps({"format": "nemotron-nas", "sha256": {}}))
    with pytest.raises(ElastuneError, match="did not write"):
        check_export(model)
    assert not marker.exists()


def test_torch_export_archives_are_loaded_only_when_trusted(tmp_path: Path, marker: Path) -> None:
    record = {"format": "torch-export", "runtime": "torch", "file": "model.pt2", "sha256": {}}
    record["runtime_options"] = {}
    (tmp_path / "export.json").write_text(json.dumps(record))
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("model/data/constants/opaque_obj_0", pickle.dumps(Touch(marker)))
    for run in (lambda: check_export(tmp_path), lambda: profile_exports([tmp_path])):
        with pytest.raises(ElastuneError, match="loading one can run code"):
            run()
    assert not marker.exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"runtime": "antigravity"},
        {"file": "../model.xml"},
        {"file": "/etc/passwd"},
        {"runtime_options": {"CACHE_DIR": "/tmp/elastune-escapes"}},
        {"format": "evil"},
    ],
)
def test_the_record_of_a_graph_sets_nothing(tmp_path: Path, changed: dict[str, Any]) -> None:
    chosen = RUNTIME_FORMATS["openvino"]
    record = {"format": "openvino", "runtime": chosen.runtime, "file": chosen.file}
    record["runtime_options"] = dict(chosen.runtime_options)
    refuse_settings(tmp_path, record)
    with pytest.raises(BadArtifact):
        refuse_settings(tmp_path, record | changed)


# --- data, and the search -------------------------------------------------------------------------


def test_pickles_within_parquet_files_stay_bytes(tmp_path: Path, marker: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    code = pickle.dumps(Touch(marker))
    names = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    names[b"ARROW:extension:metadata"] = code
    field = arrow.field("prompt", arrow.string(), metadata=names)
    schema = arrow.schema([field], metadata={b"pandas": code})
    table = arrow.table([arrow.array(["a"])], schema=schema)
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet")[0].values == {"prompt": "a"}
    assert not marker.exists()


def test_the_journal_of_a_search_holds_no_snapshots_which_optuna_would_unpickle(
    tmp_path: Path,
) -> None:
    from optuna.storages.journal._base import BaseJournalSnapshot

    from elastune.search.storages import JournalFile

    assert not isinstance(JournalFile(tmp_path / "study.journal"), BaseJournalSnapshot)


def test_the_storages_of_a_database_know_no_pickle() -> None:
    import optuna.storages._rdb as rdb

    sources = Path(os.path.dirname(str(rdb.__file__))).rglob("*.py")
    assert not [p.name for p in sources if "pickle" in p.read_text(encoding="utf-8").lower()]
