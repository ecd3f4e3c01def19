"""Hostile text in every field of a run stays text on the page, and nothing on the page runs."""

from __future__ import annotations

import html.parser
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_report import Reader, make_run
from test_report_browser import CHROMIUM, Page
from test_report_search import make_searched

from elastune.errors import ElastuneError
from elastune.report import write_report

HOSTILE = (
    "<script>window.ran=1</script>",
    "</script><script>window.ran=1</script>",
    "</title></style><img src=x onerror=window.ran=1>",
    "\"'><svg onload=window.ran=1>",
    "javascript:window.ran=1",
    "' onmouseover='window.ran=1' x='",
    "<!--<script>",
    "]]><a href=javascript:window.ran=1>x</a>",
    "&lt;script&gt;&#60;script>",
    "<iframe src=https://example.com></iframe>",
)
#: Fields whose values a reader insists on; anything else that is text may say anything.
FIXED = {"status", "kind", "method", "metric", "architectures", "schema"}


def spoilt(value: Any, text: str, key: str = "") -> Any:
    """Return JSON with ``text`` in every string, and in names that are free."""
    if isinstance(value, dict):
        return {name: spoilt(inner, text, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [spoilt(inner, text, key) for inner in value]
    return f"{value}{text}" if isinstance(value, str) and key not in FIXED else value


def spoil(run: Path, text: str) -> None:
    for file in sorted(run.rglob("*")):
        if file.suffix == ".json":
            file.write_text(json.dumps(spoilt(json.loads(file.read_text()), text)))
        elif file.suffix == ".jsonl":
            lines = file.read_text().splitlines()
            rows = [json.dumps(spoilt(json.loads(line), text)) for line in lines]
            file.write_text("".join(row + "\n" for row in rows))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(spoilt(recipe, text)))


def hostile_run(folder: Path, text: str, make: Any) -> Path:
    """Return a run whose files say ``text`` wherever they can, its folder and tasks too."""
    run = make(folder / "run")
    spoil(run, text)
    name = "".join(c for c in text if c != "/")
    for file in (run / "predictions").glob("*.jsonl"):
        file.rename(file.with_name(f"{name[:60]}.{name[:60]}.jsonl"))
        break
    (run / "subnets" / name[:80]).mkdir(parents=True, exist_ok=True)
    (run / "subnets" / name[:80] / "adapter_config.json").write_text("{}")
    exports = {"folder": text, "label": text, "subnet": text, "loads_with": text, "n_bytes": 3}
    (run / "exports.json").write_text(
        json.dumps({"schema": 1, "exports": [exports | {"code": text, "format": text}]})
    )
    return run


class Tags(html.parser.HTMLParser):
    """Collects what a page would do."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.handlers: set[str] = set()
        self.links: set[str] = set()
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.scripts += tag == "script"
        for name, value in attrs:
            if name.startswith("on"):
                self.handlers.add(name)
            if name in ("href", "src", "action", "xlink:href", "srcset", "formaction"):
                self.links.add(str(value))


def of_page(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    return tags


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Tags:
    folder = tmp_path_factory.mktemp("harmless")
    pages = [hostile_run(folder / str(n), "x", m) for n, m in enumerate((make_run, make_searched))]
    found = [of_page(write_report(run).read_text()) for run in pages]
    assert found[0].scripts == found[1].scripts
    found[0].tags |= found[1].tags
    return found[0]


@pytest.mark.parametrize("make", [make_run, make_searched])
@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_run_becomes_markup(
    tmp_path: Path, harmless: Tags, text: str, make: Any
) -> None:
    page = write_report(hostile_run(tmp_path, text, make)).read_text()
    found = of_page(page)
    assert found.tags <= harmless.tags
    assert found.handlers == set()
    assert found.scripts == harmless.scripts
    assert all(link.startswith(("#", "data:,")) for link in found.links), found.links
    reader = Reader()
    reader.feed(page)  # balanced
    assert page.count("Content-Security-Policy") == 1
    assert "default-src 'none'" in page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the report with")
@pytest.mark.parametrize("make", [make_run, make_searched])
def test_nothing_of_a_hostile_run_runs_in_a_browser(
    tmp_path: Path, browser: Page, harmless: Tags, make: Any
) -> None:
    run = hostile_run(tmp_path, "".join(HOSTILE), make)
    page = write_report(run)
    browser.open(page)
    for selector in ("summary", "button", "svg [data-i]", "circle", "td", "pre"):
        browser.js(
            f"document.querySelectorAll({json.dumps(selector)}).forEach(e => {{"
            "for (const kind of ['mouseover', 'pointerenter', 'pointermove', 'focus', 'click'])"
            " e.dispatchEvent(new MouseEvent(kind, {bubbles: true}));})"
        )
    assert browser.js("window.ran === undefined")
    scripts = browser.js("document.querySelectorAll('script').length")
    assert scripts == harmless.scripts
    assert browser.js("document.querySelectorAll('iframe, img, object, embed').length") == 0
    kinds = ("Page.javascriptDialogOpening", "Runtime.exceptionThrown", "Log.entryAdded")
    bad = [e for e in browser.events if e["method"] in kinds or "consoleAPI" in e["method"]]
    assert bad == []
    asked = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert all(url.startswith(("file:", "data:")) for url in asked), asked


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the report with")
def test_the_policy_of_the_page_stops_what_would_get_into_it(tmp_path: Path, browser: Page) -> None:
    page = write_report(make_run(tmp_path / "run"))
    more = '<img src="https://example.com/x.png"><script src="https://example.com/x.js"></script>'
    page.write_text(page.read_text().replace("</main>", more + "</main>"))
    browser.open(page)
    browser.js("fetch('https://example.com/').catch(() => 0)")
    refused = [e for e in browser.events if e["method"] == "Log.entryAdded"]
    texts = " ".join(event["params"]["entry"]["text"] for event in refused)
    assert "Content Security Policy" in texts
    assert "img-src" in texts


@pytest.mark.parametrize("text", HOSTILE)
def test_model_cards_hold_hostile_names_as_text(text: str) -> None:
    from elastune.export.card import CardText, card

    made = card(
        CardText(
            title=text,
            about=text,
            loads_with=text,
            code=text,
            parts=[text],
            tags=[text],
            library=text,
        )
    )
    front = made.split("---\n")[1]
    data = yaml.safe_load(front)
    assert isinstance(data, dict)
    assert set(data) <= {"library_name", "tags", "license", "base_model", "pipeline_tag"} | {
        "license_name",
        "license_link",
        "base_model_relation",
        "datasets",
        "metrics",
        "model-index",
        "language",
        "model_name",
    }


def test_a_run_that_cannot_be_shown_is_refused_and_its_page_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = write_report(run)
    before = page.read_text()
    (run / "metrics.json").write_text('{"schema": 1, "rows": [{"name": 3}]}')
    with pytest.raises(ElastuneError):
        write_report(run)
    assert page.read_text() == before
