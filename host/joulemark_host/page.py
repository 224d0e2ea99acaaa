"""The heatmap page, once for the host's web server and once as a single file that works from disk without a network.

Both come from the same template. Everything that came from outside (names, reasons) is text: Jinja escapes it in HTML,
`script_json` in data blocks, and no script of ours builds HTML from it. The policy forbids inline script and `eval`:
Vega runs with its expression interpreter, and the single file lists the digests of its two scripts and its style.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from joulemark.metrics import METRICS
from joulemark_host.charts import CELL_HEIGHT, CELL_WIDTH, GLYPHS
from joulemark_host.colours import THEMES
from joulemark_host.figures import Figure
from joulemark_host.readable import TITLES

ONLINE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
STATIC_TYPES = {"charts.js": "text/javascript", "vega.js": "text/javascript", "joulemark.css": "text/css"}


@dataclass(frozen=True)
class Choice:
    """What the page offers to choose from, and what is chosen."""

    tasks: Sequence[str] = ()
    task: str = ""
    metric: str = ""
    metrics: Mapping[str, str] = field(default_factory=lambda: {name: m.title for name, m in METRICS.items()})


def online_page(figures: Sequence[Figure], choice: Choice) -> str:
    """The page as the host serves it: scripts and style by link, under ONLINE_POLICY."""
    return _render(figures, choice=choice)


def offline_page(figures: Sequence[Figure]) -> str:
    """The page as one file, scripts and style inside, with its own policy that allows exactly these."""
    scripts = [_inline_script(static("vega.js")), _inline_script(static("charts.js"))]
    style = static("joulemark.css")
    allowed = " ".join(_digest(script) for script in scripts)
    policy = f"default-src 'none'; script-src {allowed}; style-src {_digest(style)}; img-src data:; base-uri 'none'"
    return _render(figures, policy=policy, scripts=[Markup(script) for script in scripts], style=Markup(style))


def error_page(status: int, message: str, hint: str) -> str:
    """A page that says what went wrong and what to do."""
    return render("error.html", status=status, message=message, hint=hint)


def render(template: str, **context: Any) -> str:
    """A page of ours from its template; everything in `context` is text and is escaped."""
    return _environment().get_template(template).render(**context)


def entrance_page(to: str, message: str = "", hint: str = "") -> str:
    """The page where a browser shows its one-time key, on its way to the page `to`; with what was wrong with the last one."""
    return render("enter.html", to=to, message=message, hint=hint)


@cache
def static(name: str) -> str:
    """The text of a script or style sheet by its name in STATIC_TYPES. Bundling `vega.js` takes two seconds, once."""
    if name == "vega.js":
        return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return importlib.resources.files("joulemark_host").joinpath("pages").joinpath(name).read_text("utf-8")


def script_json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in, nor open a comment or an entity."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _without_title(chart: Mapping[str, Any] | None) -> dict[str, Any]:
    """The page has the title as a heading; a picture of its own needs it inside."""
    return {key: value for key, value in (chart or {}).items() if key != "title"}


def _render(figures: Sequence[Figure], **context: Any) -> str:
    present = {line.state for figure in figures for line in figure.lines}
    return (
        _environment()
        .get_template("grid.html")
        .render(
            figures=figures,
            sizes=[(240 + CELL_WIDTH * len(f.grid.columns), 190 + CELL_HEIGHT * len(f.grid.rows)) for f in figures],
            charts=[_without_title(figure.chart) for figure in figures],
            glyphs=GLYPHS,
            states={name: title for name, title in TITLES.items() if name in present and name != "measured"},
            themes=script_json(THEMES),
            **context,
        )
    )


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("joulemark_host", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["script_json"] = script_json
    return environment


def _inline_script(text: str) -> str:
    """Script text that cannot end its element: both sequences occur only inside string and pattern literals."""
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
