"""The pages in a real Chromium: drawn under the strict policy, no request, no error, no script of a stranger.

Needs playwright and a Chromium of the machine; the pictures go to $JOULEMARK_SCREENSHOTS when that names a folder.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from joulemark_host.api import create_app
from joulemark_host.figures import draw
from joulemark_host.page import offline_page
from joulemark_host.records import Records
from joulemark_host.server import bind, names_of
from joulemark_host.shelf import Shelf
from tests.fixtures.grids import JETSON, LAB, PI, QWEN, SMOL_Q4, SMOL_Q8, fleet, run_facts
from tests.fixtures.records import make_record, record_bytes

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium on this machine: apt-get install chromium"
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, "--disable-sync"])
        yield chromium
        chromium.close()


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    records = Records(f"sqlite:///{tmp_path / 'records.db'}")
    for number, (device, manifest) in enumerate(((LAB, SMOL_Q4), (LAB, QWEN), (PI, SMOL_Q4), (JETSON, SMOL_Q8))):
        figures = {"decode_rate": 20.0 + 11 * number, "accuracy": 0.25 + 0.03 * number}
        for task in ("arc_challenge", "gsm8k_cot"):
            name = f"{task}-{number}"
            records.put(record_bytes(make_record(name, task=task, device=device, manifest=manifest, figures=figures)))
    with bind("127.0.0.1:0", False) as listener:
        app = create_app(Shelf(tmp_path / "shelf"), records, names_of("127.0.0.1"))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)
    records.close()


class Visit:
    """A page with what it asked for and what it complained about."""

    def __init__(self, browser: Any, scheme: str = "light", width: int = 1280, offline: bool = False) -> None:
        self.context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 900}, offline=offline
        )
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def see(self, url: str, charts: int) -> None:
        self.page.goto(url)
        # Locators, not wait_for_function: the page's own policy forbids the eval that the latter polls with.
        self.page.locator("[data-drawn]").nth(charts - 1).wait_for(timeout=30_000)
        assert self.page.locator("[data-drawn]").count() == charts

    def keep(self, name: str) -> None:
        folder = os.environ.get("JOULEMARK_SCREENSHOTS")
        if folder:
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def words(page: Any) -> str:
    return " ".join(page.locator(".chart").first.locator("text").all_text_contents())


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)])
def test_the_single_file_draws_from_disk_without_a_network(browser: Any, tmp_path: Path, scheme: str, width: int):
    file = tmp_path / "heatmap.html"
    runs = fleet()
    figures = [draw(runs, "decode_rate", "arc_challenge"), draw(runs, "accuracy", "arc_challenge")]
    file.write_text(offline_page(figures), "utf-8")
    visit = Visit(browser, scheme, width, offline=True)
    visit.see(file.as_uri(), 2)
    visit.keep(f"offline-{scheme}-{width}")
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith(("file:", "data:"))] == []
    shown = words(visit.page)
    for part in (
        "84.2 tok/s",
        "not run",
        "failed",
        "unsupported",
        "not comparable",
        "NOT VALID",
        "Raspberry Pi 5 (8 GB)",
    ):
        assert part in shown, part
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    ink = visit.page.locator(".chart text", has_text="lab workstation").first.get_attribute("fill")
    assert ink == {"light": "#1a2027", "dark": "#e8ecf1"}[scheme]
    visit.page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
    expected = {"light": "#e8ecf1", "dark": "#1a2027"}[scheme]
    visit.page.locator(f".chart text[fill='{expected}']").first.wait_for(state="attached")
    visit.context.close()


def test_a_cell_tells_its_story_under_the_pointer(browser: Any, tmp_path: Path):
    file = tmp_path / "heatmap.html"
    file.write_text(offline_page([draw(fleet(), "decode_rate", "arc_challenge")]), "utf-8")
    visit = Visit(browser)
    visit.see(file.as_uri(), 1)
    visit.page.locator(".chart text", has_text="31.0 tok/s").first.hover(force=True)
    tooltip = visit.page.locator("#vg-tooltip-element")
    tooltip.wait_for(state="visible")
    visit.keep("tooltip")
    told = tooltip.inner_text()
    for part in (
        "Raspberry Pi 5 (8 GB)",
        "27.9 – 34.1 tok/s",
        "20",
        "fixture",
        "not valid: throttled for 12 s",
        "run-4",
    ):
        assert part in told, part
    visit.context.close()


def test_the_served_page_under_its_strict_policy(browser: Any, address: str):
    visit = Visit(browser)
    visit.see(f"{address}/", 1)
    assert visit.complaints == []
    assert "25.0 %" in words(visit.page)
    visit.page.select_option("select[name=metric]", "decode_rate")
    visit.page.select_option("select[name=task]", "gsm8k_cot")
    visit.page.click("button")
    visit.page.wait_for_selector("[data-drawn]")
    visit.keep("served")
    assert visit.page.url == f"{address}/?metric=decode_rate&task=gsm8k_cot"
    assert "53.0 tok/s" in words(visit.page)
    assert {url.split("?")[0] for url in visit.requests if url.startswith("http")} == {
        f"{address}/",
        f"{address}/pages/joulemark.css",
        f"{address}/pages/vega.js",
        f"{address}/pages/charts.js",
    }
    assert visit.complaints == []
    visit.page.goto(f"{address}/?metric=nonsense")
    assert "no metric 'nonsense'" in visit.page.inner_text("main")
    visit.context.close()


@pytest.mark.parametrize(
    "name",
    [
        "</script><script>window.pwned=1</script>",
        "<img src=x onerror='window.pwned=1'>",
        '"><svg onload=window.pwned=1>',
    ],
)
def test_a_hostile_name_is_shown_and_runs_nothing(browser: Any, tmp_path: Path, name: str):
    device = LAB.model_copy(update={"name": name, "device_id": "evil"})
    runs = [*fleet(), run_facts(20, device=device, reasons=[name], spec={"variant": name})]
    file = tmp_path / "heatmap.html"
    file.write_text(offline_page([draw(runs, "accuracy", "arc_challenge")]), "utf-8")
    visit = Visit(browser)
    visit.see(file.as_uri(), 1)
    visit.page.locator(".chart .mark-rect path").first.hover(force=True)
    visit.page.wait_for_timeout(200)
    assert visit.page.evaluate("window.pwned") is None
    assert visit.page.locator("tbody th", has_text=name).count() >= 1
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith(("file:", "data:"))] == []
    visit.context.close()


def test_an_injected_script_would_be_blocked_by_the_policy(browser: Any, tmp_path: Path):
    """The second line of defence: were a script to get into the file, its policy does not let it run."""
    file = tmp_path / "heatmap.html"
    page = offline_page([draw(fleet(), "accuracy", "arc_challenge")])
    file.write_text(page.replace("</main>", "<script>window.pwned = 1</script></main>"), "utf-8")
    visit = Visit(browser)
    visit.see(file.as_uri(), 1)
    assert visit.page.evaluate("window.pwned") is None
    assert any("Content Security Policy" in complaint for complaint in visit.complaints)
    visit.context.close()
