"""The heatmap: one Vega-Lite definition from a Grid, from which the page and the PNG are both drawn.

Bright always means better, or more where neither is better. Every other state has a shape and words, never a colour
alone. Neutral colours are parameters of the definition, so that a page can change them with the viewer's theme. All
sizes are in pixels. Not aware of files, HTTP or records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import vl_convert
from joulemark.metrics import METRICS
from joulemark.wire import Cell, Grid, Measure

from joulemark_host.colours import CIVIDIS, DARK_TEXT, LIGHT_TEXT, THEMES, fill_colour, text_colour
from joulemark_host.readable import TITLES, Unit, amount, explanation, grid_unit, interval, kind, number

CELL_WIDTH = 168
CELL_HEIGHT = 76
GAP = 4
GLYPHS: Mapping[str, str] = {
    "failed": "M-6,-6L6,6M-6,6L6,-6",
    "unsupported": "M-7,0A7,7,0,1,1,7,0A7,7,0,1,1,-7,0M-5,5L5,-5",
    "absent": "M-7,0L7,0",
    "not_run": "M-6,-6L6,-6L6,6L-6,6L-6,-7",
    "invalid": "M0,-8L8,6L-8,6L0,-8L1,-6M0,-3L0,1.5M0,3L0,4.2",
}
"""Drawn as outlines, one pixel a unit, so that no font needs to have them."""


def heatmap(grid: Grid, theme: str = "light") -> dict[str, Any]:
    """The Vega-Lite definition of `grid`, which has a cell; `theme` sets the parameters' first values."""
    unit = grid_unit(grid)
    rows = [_row(cell, grid, unit) for cell in grid.cells]
    chart = alt.layer(*_layers(rows, _domain(rows), grid, unit)).properties(
        data=alt.Data(values=_with_text_colours(rows, _domain(rows), _brighter_is_more(grid))),
        width=alt.Step(CELL_WIDTH),
        height=alt.Step(CELL_HEIGHT),
        background=_themed("paper"),
        title=alt.TitleParams(
            METRICS[grid.metric].title.capitalize(),
            subtitle=f"{grid.task}, device × model",
            anchor="start",
            color=_themed("ink"),
            subtitleColor=_themed("muted"),
            fontSize=15,
            subtitleFontSize=12,
            offset=14,
        ),
    )
    definition: dict[str, Any] = chart.to_dict()
    params = [{"name": name, "value": value} for name, value in THEMES[theme].items()]
    return {
        **definition,
        "params": params,
        "config": {"view": {"stroke": None}, "font": "system-ui, sans-serif", "aria": False},
    }


def png(definitions: Sequence[Mapping[str, Any]], scale: float = 2.0) -> bytes:
    """One picture of all definitions, below each other, each with its own scale; `scale` is its pixels per pixel."""
    return vl_convert.vegalite_to_png(stack(definitions), scale=scale)


def stack(definitions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One definition that shows all of `definitions`; settings that only the outermost may have move there."""
    first = dict(definitions[0])
    if len(definitions) == 1:
        return first
    outer = {name: first[name] for name in ("$schema", "background", "config", "params")}
    inner = [{key: value for key, value in one.items() if key not in outer} for one in definitions]
    return {**outer, "vconcat": inner, "spacing": 36, "resolve": {"scale": {"color": "independent"}}}


def _row(cell: Cell, grid: Grid, unit: Unit) -> dict[str, Any]:
    """One datum: what is drawn, and what the tooltip says. `shown` is the value in the grid's unit, else None."""
    state = kind(cell)
    measure = cell.metric if isinstance(cell.metric, Measure) else None
    filled = state in ("measured", "invalid") and measure is not None
    why = explanation(cell)
    if measure is not None and state != "not_comparable":
        headline = amount(measure.value, unit)
        detail = ", ".join(
            part
            for part in (interval(measure, unit).removesuffix(f" {unit.symbol}"), measure.n and f"n {measure.n}")
            if part
        )
    else:
        headline, detail = TITLES[state], ("" if state == "not_run" else why)
    return {
        "device": cell.row,
        "model": cell.column,
        "state": state,
        "shown": measure.value * unit.factor if filled and measure else None,
        "headline": headline,
        "detail": detail,
        "badge": "NOT VALID" if state == "invalid" else "",
        "said": TITLES[state],
        "value": amount(measure.value, unit) if measure else "–",
        "range": (interval(measure, unit) if measure else "") or "–",
        "n": str(measure.n) if measure and measure.n is not None else "–",
        "source": measure.source if measure else "–",
        "why": why or "–",
        "run": cell.run_id or "–",
        "metric": METRICS[grid.metric].title,
    }


def _brighter_is_more(grid: Grid) -> bool:
    return METRICS[grid.metric].better != "lower"


def _domain(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The colour scale's ends; around a single value, so that it gets the middle colour."""
    values = [row["shown"] for row in rows if row["shown"] is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    return low, high


def _with_text_colours(
    rows: Sequence[dict[str, Any]], domain: tuple[float, float], brighter_is_more: bool
) -> list[dict[str, Any]]:
    """Text on a filled cell is black or white, whichever stands out more from that fill."""
    low, high = domain
    coloured: list[dict[str, Any]] = []
    for row in rows:
        colour = ""
        if row["shown"] is not None:
            place = (row["shown"] - low) / (high - low)
            colour = text_colour(fill_colour(place if brighter_is_more else 1 - place))
        coloured.append({**row, "text": colour})
    return coloured


def _themed(name: str) -> Any:
    return alt.ExprRef(expr=name)


def _on_fill() -> Any:
    return alt.condition(f"datum.text === '{LIGHT_TEXT}'", alt.value(LIGHT_TEXT), alt.value(DARK_TEXT))


def _layers(rows: Sequence[Mapping[str, Any]], domain: tuple[float, float], grid: Grid, unit: Unit) -> list[Any]:
    axis: dict[str, Any] = {
        "labelColor": _themed("ink"),
        "domain": False,
        "ticks": False,
        "labelFontSize": 12,
        "title": None,
    }
    base = alt.Chart().encode(
        x=alt.X(
            "model:N",
            sort=list(grid.columns),
            scale=alt.Scale(paddingInner=GAP / CELL_WIDTH, paddingOuter=0),
            axis=alt.Axis(
                **axis,
                orient="top",
                labelPadding=24,
                labelAngle=0,
                labelLimit=CELL_WIDTH - 8,
                labelExpr="split(datum.label, ' · ')",
            ),
        ),
        y=alt.Y(
            "device:N",
            sort=list(grid.rows),
            scale=alt.Scale(paddingInner=GAP / CELL_HEIGHT, paddingOuter=0),
            axis=alt.Axis(**axis, labelPadding=8, labelLimit=220),
        ),
        tooltip=_tooltip(),
    )
    return [*_backgrounds(base, rows, domain, grid, unit), *_marks(base, rows), *_words(base)]


def _tooltip() -> list[Any]:
    named = {
        "device": "device",
        "model": "model",
        "metric": "figure",
        "said": "state",
        "value": "value",
        "range": "interval",
        "n": "sample size",
        "source": "source",
        "why": "why",
        "run": "run",
    }
    return [alt.Tooltip(f"{field}:N", title=title) for field, title in named.items()]


def _backgrounds(
    base: Any, rows: Sequence[Mapping[str, Any]], domain: tuple[float, float], grid: Grid, unit: Unit
) -> list[Any]:
    """Filled cells carry the scale; cells without a comparable number are a quiet box with an outline."""
    layers = [
        base.transform_filter("datum.shown === null").mark_rect(
            fill=_themed("quiet"), stroke=_themed("line"), strokeDash=[3, 3]
        )
    ]
    if any(row["shown"] is not None for row in rows):
        better = {"higher": "higher is better", "lower": "lower is better", None: ""}[METRICS[grid.metric].better]
        colours = CIVIDIS if _brighter_is_more(grid) else CIVIDIS[::-1]
        legend = alt.Legend(
            title=f"{unit.symbol}, {better}" if better else unit.symbol,
            orient="bottom",
            direction="horizontal",
            gradientLength=260,
            gradientThickness=12,
            titleColor=_themed("ink"),
            labelColor=_themed("ink"),
            gradientStrokeColor=_themed("line"),
            gradientStrokeWidth=1,
            titleFontWeight="normal",
            offset=14,
        )
        scale = alt.Scale(domain=list(domain), range=list(colours), clamp=True)
        layers.append(
            base.transform_filter("datum.shown !== null")
            .mark_rect()
            .encode(color=alt.Color("shown:Q", scale=scale, legend=legend))
        )
    return layers


def _marks(base: Any, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Hatching for what must not be compared; an outlined glyph, top left, for every other state but valid ones."""
    states = {row["state"] for row in rows}
    layers: list[Any] = []
    if "not_comparable" in states:
        hatch = base.transform_filter("datum.state === 'not_comparable'")
        layers.append(
            hatch.mark_point(
                shape=hatching(CELL_WIDTH - GAP, CELL_HEIGHT - GAP),
                size=4,
                stroke=_themed("line"),
                strokeWidth=1,
                opacity=0.35,
            )
        )
    for state, path in GLYPHS.items():
        if state in states:
            colour: dict[str, Any] = (
                {"stroke": _on_fill()} if state == "invalid" else {"stroke": alt.value(_themed("ink"))}
            )
            layers.append(
                base.transform_filter(f"datum.state === '{state}'")
                .mark_point(
                    shape=path,
                    size=4,
                    strokeWidth=1.8,
                    filled=False,
                    xOffset=-CELL_WIDTH / 2 + 18,
                    yOffset=-CELL_HEIGHT / 2 + 18,
                )
                .encode(**colour)
            )
    return layers


def hatching(width: float, height: float, distance: float = 9.0) -> str:
    """Diagonal lines that fill a box of this size around the origin, as an SVG path."""
    lines: list[str] = []
    offset = -(width + height) / 2 + distance
    while offset < (width + height) / 2:  # the line x + y = offset, from its upper right to its lower left end
        right = min(width / 2, offset + height / 2)
        left = max(-width / 2, offset - height / 2)
        lines.append(f"M{number(right)},{number(offset - right)}L{number(left)},{number(offset - left)}")
        offset += distance
    return "".join(lines)


def _words(base: Any) -> list[Any]:
    """Headline, detail and badge: on a filled cell in the colour that was chosen for its fill, else in the ink's."""
    layers: list[Any] = []
    for field, drop, size, weight in (
        ("headline", -8, 16, "bold"),
        ("detail", 11, 11, "normal"),
        ("badge", 27, 10, "bold"),
    ):
        filled = base.transform_filter("datum.shown !== null").mark_text(
            dy=drop, fontSize=size, fontWeight=weight, limit=CELL_WIDTH - 22
        )
        layers.append(filled.encode(text=f"{field}:N", color=_on_fill()))
        if field != "badge":
            plain = base.transform_filter("datum.shown === null").mark_text(
                dy=drop,
                fontSize=size - 2 if field == "headline" else size,
                fontWeight=weight,
                limit=CELL_WIDTH - 22,
                color=_themed("ink" if field == "headline" else "muted"),
            )
            layers.append(plain.encode(text=f"{field}:N"))
    return layers
