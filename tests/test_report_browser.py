"""The report in a real browser, driven over the pipe of its DevTools protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import make_run
from test_report_search import LAYERS, ODD, make_searched, make_trials, naive_front

from elastune.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the report with")
_DEADLINE = 120.0  # seconds; then the browser is ended, and what waits for it fails
_NOISE = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


class Page:
    """One tab of a headless browser: JSON messages ended by a zero byte, on descriptors 3 and 4."""

    def __init__(self, profile: Path) -> None:
        to_browser, self._write = os.pipe()
        read, from_browser = os.pipe()
        options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
        start = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        command = ["bash", "-c", start, str(CHROMIUM), *options.split()]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "--remote-debugging-pipe"],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._read = os.fdopen(read, "rb")
        self._timer = threading.Timer(_DEADLINE, self._process.kill)
        self._timer.start()
        self._count, self._buffer = 0, b""
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Runtime", "Page", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._timer.cancel()
        self._process.terminate()
        self._process.wait(20)
        os.close(self._write)
        self._read.close()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            more = self._read.read1(65536)  # type: ignore[attr-defined]
            assert more, "the browser ended"
            self._buffer += more
        first, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(first)

    def js(self, code: str) -> Any:
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, path: Path, width: int = 1280, scheme: str = "light") -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.events.clear()
        loader = self.call("Page.navigate", url=path.as_uri())["loaderId"]
        while not any(
            event["method"] == "Network.requestWillBeSent" and event["params"]["loaderId"] == loader
            for event in self.events
        ) or self.js("document.readyState !== 'complete' || location.protocol !== 'file:'"):
            self.js("0")
            time.sleep(0.02)

    def point_at(self, selector: str) -> None:
        """Move the mouse to the middle of an element, as a hand would."""
        middle = (
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        x, y = self.js(middle)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def text(self, selector: str) -> str:
        code = f"document.querySelector({json.dumps(selector)}).innerText"
        return " ".join(str(self.js(code)).split())


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_searched(tmp_path_factory.mktemp("browser") / "run"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with seven systems, four of them at about the same place."""
    return write_report(make_run(tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture(scope="module")
def data(report: Path) -> dict[str, Any]:
    page = report.read_text(encoding="utf-8")
    _, _, rest = page.partition('id="trials">')
    return json.loads(rest.partition("</script>")[0])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("profile"))
    try:
        yield page
    finally:
        page.close()


def number_of(data: dict[str, Any], key: str) -> int:
    return next(n for n, row in enumerate(data["points"]) if row[0] == key)


def test_page_loads_without_complaints_and_asks_for_nothing_else(
    browser: Page, report: Path
) -> None:
    browser.open(report)
    browser.js("console.error('heard')")
    heard = [event["params"] for event in browser.events if event["method"] in _NOISE]
    assert [event["args"][0]["value"] for event in heard] == ["heard"]
    sent = [e["params"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert {request["request"]["url"] for request in sent} == {report.as_uri()}
    assert browser.js("document.images.length") == 0


def test_pointing_at_a_front_member_shows_what_it_is_and_how_to_write_it(
    browser: Page, report: Path, data: dict[str, Any]
) -> None:
    browser.open(report)
    trials = make_trials()
    extracted = data["points"][data["best"]][0]
    front = naive_front(trials, "macs")
    member = next(n for n in sorted(front)[1:] if f"trial {n}" != extracted)
    place = number_of(data, f"trial {member}")
    browser.point_at(f'[data-point="{place}"]')
    shown = browser.text("#point")
    assert shown.startswith(f"Trial {member}")
    assert "on the Pareto front" in shown
    assert f"{trials[member]['values']['error']:.4f}"[:5] in shown
    assert "elastune extract" in shown
    browser.js("document.querySelector('#point details').open = true")
    config = {k: v for k, v in trials[member]["config"].items() if k.startswith("layers.")}
    heads = " ".join(str(v) for k, v in config.items() if k.endswith("heads"))
    assert f"heads: {heads}" in browser.text("#point details pre")
    written = browser.js("[...document.querySelectorAll('#point code')].at(-1).textContent")
    assert json.dumps(trials[member]["config"], separators=(",", ":")) in written
    same = f'.strand.looked[data-key="trial {member}"]'
    assert browser.js(f"document.querySelectorAll({json.dumps(same)}).length") == 1


def test_chosen_member_is_shown_first_with_the_code_that_loads_it(
    browser: Page, report: Path
) -> None:
    browser.open(report)
    shown = browser.text("#point")
    assert "best" in shown
    assert "Extracted as subnets/best, a PEFT adapter" in shown
    assert f'from_pretrained(model, "{report.parent}/subnets/best")' in shown


def test_the_details_of_a_trial_name_its_exports_and_what_loads_them(
    browser: Page, tmp_path: Path
) -> None:
    run = make_searched(tmp_path / "run")
    (run / "export/gguf").mkdir(parents=True)
    row = {"folder": "export/gguf", "label": "gguf", "subnet": "best", "loads_with": "llama.cpp"}
    gone = row | {"folder": "export/onnx", "label": "onnx", "loads_with": "onnxruntime"}
    rows = [each | {"n_bytes": 2**20, "largest_difference": 1e-4} for each in (row, gone)]
    (run / "exports.json").write_text(json.dumps({"schema": 1, "exports": rows}))
    browser.open(write_report(run))
    assert "loads with: gguf (llama.cpp)." in browser.text("#point")


def test_arrow_keys_walk_along_the_front(browser: Page, report: Path, data: dict[str, Any]) -> None:
    browser.open(report)
    browser.js("document.querySelector('#front [tabindex=\"0\"]').focus()")
    before = browser.text("#point h3")
    browser.press("ArrowLeft")
    after = browser.text("#point h3")
    assert after != before
    looked = browser.js("Number(document.activeElement.dataset.point)")
    assert after.lower().startswith(data["points"][looked][0])
    assert looked in data["views"][0]["front"] or data["points"][looked][6]


def test_another_cost_moves_the_points_and_changes_the_axis(
    browser: Page, report: Path, data: dict[str, Any]
) -> None:
    browser.open(report)
    place = [name for name, _ in data["costs"]].index("latency_ms")
    browser.js(
        f"(() => {{ const s = document.querySelector('#front select'); s.value = {place};"
        "s.dispatchEvent(new Event('change')); })()"
    )
    shown = browser.js(
        "[...document.querySelectorAll('#front [data-view]')]"
        ".filter(e => getComputedStyle(e).display !== 'none').map(e => e.dataset.view)"
    )
    assert set(shown) == {"latency_ms"}
    moved = browser.js(
        "[...document.querySelectorAll('#front [data-point]')]"
        ".map(e => [Number(e.dataset.point), e.transform.baseVal[0].matrix.e])"
    )
    expected = data["views"][place]["x"]
    assert all(x == pytest.approx(expected[n], abs=0.06) for n, x in moved)
    front = browser.js(
        "[...document.querySelectorAll('#front .front[data-point], #front .chosen[data-point]')]"
        ".map(e => Number(e.dataset.point))"
    )
    named = {int(data["points"][n][0].split()[1]) for n in front if n != data["best"]}
    best = int(data["points"][data["best"]][0].split()[1])
    assert named == naive_front(make_trials(), "latency_ms") - {best}


def test_front_is_drawn_as_parallel_coordinates_and_layer_by_layer(
    browser: Page, report: Path
) -> None:
    browser.open(report)
    members = naive_front(make_trials(), "macs")
    keys = browser.js("[...document.querySelectorAll('.strand[data-key]')].map(e => e.dataset.key)")
    assert set(keys) == {f"trial {n}" for n in members}
    for kind in ("heads", "feed-forward"):
        cells = browser.js(
            "[...document.querySelectorAll('figure')].find(f => "
            f"f.querySelector('h3')?.textContent === 'The front by layer: {kind}')"
            ".querySelectorAll('[data-tip]').length"
        )
        assert cells == min(len(members), 12) * LAYERS
    browser.point_at(".strand.chosen[data-key]")


def test_names_from_the_run_stay_text_in_the_details(browser: Page, report: Path) -> None:
    browser.open(report)
    browser.js("document.querySelector('#point details').open = true")
    assert f"{ODD}.rank: 8" in browser.text("#point details pre")
    assert browser.js("document.querySelectorAll('img').length") == 0


@pytest.mark.parametrize("opened", [False, True])
def test_a_phone_never_scrolls_sideways(browser: Page, report: Path, opened: bool) -> None:
    browser.open(report, width=390)
    if opened:
        browser.js("for (const each of document.querySelectorAll('details')) each.open = true")
    assert browser.js("innerWidth") == 390
    assert browser.js("document.documentElement.scrollWidth") <= 390
    place = browser.js("document.querySelector('#point').getBoundingClientRect().width")
    assert 300 < place <= 390


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_page_follows_the_colour_scheme_and_text_can_be_read(
    browser: Page, report: Path, scheme: str, is_dark: bool
) -> None:
    browser.open(report, scheme=scheme)
    page = luminance(browser.js("getComputedStyle(document.body).backgroundColor"))
    assert (page < 0.1) is is_dark
    for selector, colour in (("body", "color"), (".note", "color"), ("#front svg text", "fill")):
        code = f"getComputedStyle(document.querySelector({json.dumps(selector)})).{colour}"
        ink = luminance(browser.js(code))
        # The least contrast of text that WCAG 2.1 asks for, at level AA.
        assert (max(ink, page) + 0.05) / (min(ink, page) + 0.05) >= 4.5


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, as WCAG 2.1 defines it."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_lines_that_load_the_result_are_copied_by_a_button(browser: Page, report: Path) -> None:
    browser.open(report)
    code = "document.querySelector('pre.copy > code')"
    assert "from_pretrained" in browser.js(f"{code}.textContent")
    # A page opened from the disk may not write to the clipboard everywhere: then it is selected.
    browser.js(f"{code}.parentElement.nextElementSibling.click()")
    for _ in range(100):
        told = browser.js(f"{code}.parentElement.nextElementSibling.textContent")
        if told != "Copy":
            break
        time.sleep(0.02)
    assert told in ("Copied", "Selected")
    if told == "Selected":
        assert browser.js("String(getSelection())").strip() == browser.js(
            f"{code}.innerText.trim()"
        )


@pytest.mark.parametrize("width", [390, 1280])
def test_labels_of_a_drawing_stay_on_the_page_and_off_each_other(
    browser: Page, whole: Path, width: int
) -> None:
    browser.open(whole, width=width)
    boxes = browser.js(
        "[...document.querySelectorAll('figure svg')].map(s => [...s.querySelectorAll('text.halo')]"
        ".map(t => t.getBoundingClientRect()).filter(b => b.width)"
        ".map(b => [b.left, b.top + 2, b.right, b.bottom - 2]))"
    )
    assert sum(map(len, boxes)) >= 7
    for drawing in boxes:
        for place, (left, top, right, bottom) in enumerate(drawing):
            assert 0 <= left < right <= width
            for l2, t2, r2, b2 in drawing[:place]:
                assert right <= l2 or r2 <= left or bottom <= t2 or b2 <= top


def test_many_systems_on_one_task_are_compared_down_the_page(browser: Page, whole: Path) -> None:
    browser.open(whole, width=390)
    tables = browser.js(
        "[...document.querySelectorAll('table.verdicts')]"
        ".map(t => [t.tHead.rows[0].cells.length, t.tBodies[0].rows.length])"
    )
    assert tables == [[2, 3]]  # one task across, three sub-networks down
