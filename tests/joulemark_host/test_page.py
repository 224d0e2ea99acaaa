"""The page is one safe file: nothing from outside becomes script or markup, and nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from joulemark_host.figures import draw
from joulemark_host.page import Choice, offline_page, online_page, script_json, static
from tests.fixtures.grids import LAB, fleet, run_facts

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</td></table><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "<!--<script>",
    "{{7*7}}${7*7}",
    "javascript:alert(1)",
    "\u2028\u2029",
]


class Reader(HTMLParser):
    """Collects elements with attributes, and the text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._in_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
        else:
            self.text += data


def shape(page: str) -> list[tuple[str, list[str]]]:
    return [(tag, sorted(attrs)) for tag, attrs in Reader(page).elements]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_outside_stay_text(name: str):
    def pages(given: str) -> list[str]:
        device = LAB.model_copy(update={"name": given, "title": given})
        runs = [run_facts(1, device=device, reasons=[given]), run_facts(2, device=device, spec={"variant": given})]
        figures = [draw(runs, "accuracy", "arc_challenge")]
        return [offline_page(figures), online_page(figures, Choice(["arc_challenge"], "arc_challenge", "accuracy"))]

    for hostile, plain in zip(pages(name), pages("plain"), strict=True):
        assert shape(hostile) == shape(plain)  # not one element or attribute more
        if name.strip():
            assert name in Reader(hostile).text  # and the reader sees the name
        for block in Reader(hostile).scripts:
            assert "<script>alert" not in block
            assert "</script" not in block


def test_a_device_name_cannot_leave_the_data_block():
    text = str(script_json({"name": "</script><!--<script>&amp;\u2028"}))
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == {"name": "</script><!--<script>&amp;\u2028"}


def test_the_single_file_loads_nothing_and_lists_its_own_scripts():
    page = offline_page([draw(fleet(), "decode_rate", "arc_challenge"), draw(fleet(), "accuracy", "arc_challenge")])
    reader = Reader(page)
    for tag, attrs in reader.elements:
        assert tag not in ("iframe", "object", "embed", "base")
        assert "src" not in attrs
        assert (attrs.get("href") or "data:,") == "data:,"
        assert not [name for name in attrs if name.startswith("on") or name == "style"]
    (policy,) = (
        attrs["content"] for _, attrs in reader.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    kinds = [attrs.get("type") for tag, attrs in reader.elements if tag == "script"]
    assert kinds == ["application/json"] * 3 + [None, None]
    for script in reader.scripts[-2:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style
    assert base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode() in policy
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_the_served_page_has_no_inline_script_or_style():
    choice = Choice(["arc_challenge", "gsm8k_cot"], "arc_challenge", "decode_rate")
    reader = Reader(online_page([draw(fleet(), "decode_rate", "arc_challenge")], choice))
    for tag, attrs in reader.elements:
        assert tag != "style"
        assert "style" not in attrs
        if tag == "script" and attrs.get("type") != "application/json":
            assert attrs["src"] in ("/pages/vega.js", "/pages/charts.js")
    selected = [attrs["value"] for tag, attrs in reader.elements if tag == "option" and "selected" in attrs]
    assert selected == ["decode_rate", "arc_challenge"]


def test_every_cell_explains_itself_in_the_table():
    text = " ".join(Reader(offline_page([draw(fleet(), "decode_rate", "arc_challenge")])).text.split())
    for part in (
        "lab workstation smollm2-135m-instruct · Q4_1 84.2 tok/s 75.8 – 92.6 tok/s 20 fixture – run-1",
        "31.0 tok/s 27.9 – 34.1 tok/s measured, not valid",
        "not valid: throttled for 12 s",
        "failed",
        "out_of_memory: the worker was killed by the kernel. Next step: use a smaller model",
        "unsupported",
        "nothing was run here",
        "not comparable",
        "latency plan: 2 prompts × 64 tokens after 1 warm-up here, 5 prompts",
        "engine version llama.cpp 0.3.36",
    ):
        assert part in text, part


def test_no_records_teach_the_next_step():
    text = Reader(online_page([], Choice())).text
    assert "No records yet" in text
    assert "joulemark run" in text


def test_scripts_are_whole():
    assert "vegaEmbed" in static("vega.js")
    assert len(static("vega.js")) > 500_000
