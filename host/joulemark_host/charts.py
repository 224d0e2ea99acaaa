"""The heatmap: one Vega-Lite definition from a Grid, from which the page and the PNG are both drawn.

Bright always means better, or more where neither is better. Every other state has a shape and words, never a colour
alone. Neutral colours are parameters of the definition, so that a page can change them with the viewer's theme. All
sizes are in pixels. Not aware of files, HTTP or records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import vl_convert

from joulemark.metrics import METRICS
from joulemark.wire import Measure
from joulemark_host.colours import CIVIDIS, DARK_TEXT, LIGHT_TEXT, THEMES, fill_colour, text_colour
from joulemark_host.grid import Cell, Grid
from joulemark_host.readable import TITLES, Unit, amount, explanation, grid_unit, interval, kind, number

CELL_WIDTH = 168
CELL_HEIGHT = 76
GAP = 4
LABEL_WIDTH = 230
PICTURE_WIDTH = 1280
GLYPHS: Mapping[str, str] = {
    "failed": "M-6,-6L6,6M-6,6L6,-6",
    "unsupported": "M-7,0A7,7,0,1,1,7,0A7,7,0,1,1,-7,0M-5,5L5,-5",
    "absent": "M-7,0L7,0",
    "not_run": "M-6,-6L6,-6L6,6L-6,6L-6,-7",
    "invalid": "M0,-8L8,6L-8,6L0,-8L1,-6M0,-3L0,1.5M0,3L0,4.2",
}
"""Drawn as outlines, one pixel a unit, so that no font needs to have them."""

FILLED, PLAIN = "datum.shown !== null", "datum.shown === null"
ON_FILL: Mapping[str, Any] = {
    "condition": {"test": f"datum.text === '{LIGHT_TEXT}'", "value": LIGHT_TEXT},
    "value": DARK_TEXT,
}
TOOLTIP = [
    {"field": field, "type": "nominal", "title": title}
    for field, title in {
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
    }.items()
]


def heatmap(grid: Grid, theme: str = "light") -> dict[str, Any]:
    """The Vega-Lite definition of `grid`, which has a cell; `theme` sets the parameters' first values."""
    unit = grid_unit(grid)
    rows = [_row(cell, grid, unit) for cell in grid.cells]
    domain = _domain(rows)
    return {
        "background": _themed("paper"),
        "config": {"view": {"stroke": None}, "font": "system-ui, sans-serif", "aria": False},
        "params": [{"name": name, "value": value} for name, value in THEMES[theme].items()],
        "title": {
            "text": METRICS[grid.metric].title.capitalize(),
            "subtitle": _subtitle(grid, one_value=_one_value(rows)),
            "anchor": "start",
            "color": _themed("ink"),
            "subtitleColor": _themed("muted"),
            "fontSize": 15,
            "subtitleFontSize": 12,
            "offset": 14,
        },
        "width": {"step": CELL_WIDTH},
        "height": {"step": CELL_HEIGHT},
        "data": {"values": _with_text_colours(rows, domain, _colours(rows, grid))},
        "encoding": {**_axes(grid), "tooltip": TOOLTIP},
        "layer": [*_backgrounds(rows, domain, grid, unit), *_marks(rows), *_words()],
    }


def _subtitle(grid: Grid, one_value: bool) -> str:
    """The task, and what the legend would have said where a single value makes a colour scale pointless."""
    better = METRICS[grid.metric].better
    return f"{grid.task}, {better} is better" if one_value and better else f"{grid.task}, device × model"


def png(definitions: Sequence[Mapping[str, Any]], scale: float = 2.0) -> bytes:
    """One picture of all definitions, each with its own colours; `scale` is its pixels per pixel."""
    return vl_convert.vegalite_to_png(stack(definitions), scale=scale)


def stack(definitions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One definition of all, as many beside each other as fit; settings that only the outermost may have move there."""
    first = dict(definitions[0])
    if len(definitions) == 1:
        return first
    outer = {name: first[name] for name in ("background", "config", "params")}
    inner = [{key: value for key, value in one.items() if key not in outer} for one in definitions]
    widest = max(len(one["encoding"]["x"]["sort"]) for one in definitions) * CELL_WIDTH + LABEL_WIDTH
    columns = max(1, PICTURE_WIDTH // widest)
    return {**outer, "concat": inner, "columns": columns, "spacing": 36, "resolve": {"scale": {"color": "independent"}}}


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


def _domain(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The colour scale's ends; around a single value, since a scale needs two."""
    values = [row["shown"] for row in rows if row["shown"] is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    return low, high


def _one_value(rows: Sequence[Mapping[str, Any]]) -> bool:
    return len({row["shown"] for row in rows if row["shown"] is not None}) == 1


def _colours(rows: Sequence[Mapping[str, Any]], grid: Grid) -> tuple[str, ...]:
    """The scale from low to high; a single value gets one colour, since there is nothing to tell apart."""
    if _one_value(rows):
        return (CIVIDIS[1], CIVIDIS[1])
    return CIVIDIS if METRICS[grid.metric].better != "lower" else CIVIDIS[::-1]


def _with_text_colours(
    rows: Sequence[dict[str, Any]], domain: tuple[float, float], colours: Sequence[str]
) -> list[dict[str, Any]]:
    """Text on a filled cell is black or white, whichever stands out more from that fill."""
    low, high = domain
    places = [None if row["shown"] is None else (row["shown"] - low) / (high - low) for row in rows]
    return [
        {**row, "text": "" if place is None else text_colour(fill_colour(place, colours))}
        for row, place in zip(rows, places, strict=True)
    ]


def _themed(name: str) -> dict[str, str]:
    """A colour of the theme, by its parameter."""
    return {"expr": name}


def _layer(where: str, mark: dict[str, Any], **encoding: Any) -> dict[str, Any]:
    return {"transform": [{"filter": where}], "mark": mark, "encoding": encoding}


def _axes(grid: Grid) -> dict[str, Any]:
    """Models along the top, name above quantization; devices down the left; both in the grid's order."""
    look = {"labelColor": _themed("ink"), "domain": False, "ticks": False, "labelFontSize": 12, "title": None}
    across = {
        "orient": "top",
        "labelPadding": 24,
        "labelAngle": 0,
        "labelLimit": CELL_WIDTH - 8,
        "labelExpr": "split(datum.label, ' · ')",
    }
    return {
        "x": {
            "field": "model",
            "type": "nominal",
            "sort": list(grid.columns),
            "scale": {"paddingInner": GAP / CELL_WIDTH, "paddingOuter": 0},
            "axis": {**look, **across},
        },
        "y": {
            "field": "device",
            "type": "nominal",
            "sort": list(grid.rows),
            "scale": {"paddingInner": GAP / CELL_HEIGHT, "paddingOuter": 0},
            "axis": {**look, "labelPadding": 8, "labelLimit": 220},
        },
    }


def _backgrounds(
    rows: Sequence[Mapping[str, Any]], domain: tuple[float, float], grid: Grid, unit: Unit
) -> list[dict[str, Any]]:
    """Filled cells carry the scale; cells without a comparable number are a quiet box with an outline."""
    quiet = {"type": "rect", "fill": _themed("quiet"), "stroke": _themed("line"), "strokeDash": [3, 3]}
    layers = [_layer(PLAIN, quiet)]
    if any(row["shown"] is not None for row in rows):
        scale = {"domain": list(domain), "range": list(_colours(rows, grid)), "clamp": True}
        legend = None if _one_value(rows) else _legend(grid, unit)
        colour = {"field": "shown", "type": "quantitative", "scale": scale, "legend": legend}
        layers.append(_layer(FILLED, {"type": "rect"}, color=colour))
    return layers


def _legend(grid: Grid, unit: Unit) -> dict[str, Any]:
    better = METRICS[grid.metric].better
    return {
        "title": f"{unit.symbol}, {better} is better" if better else unit.symbol,
        "orient": "bottom",
        "direction": "horizontal",
        "gradientLength": 260,
        "gradientThickness": 12,
        "titleColor": _themed("ink"),
        "labelColor": _themed("ink"),
        "gradientStrokeColor": _themed("line"),
        "gradientStrokeWidth": 1,
        "titleFontWeight": "normal",
        "offset": 14,
    }


def _marks(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Hatching for what must not be compared; an outlined glyph, top left, for every other state but valid ones."""
    states = {row["state"] for row in rows}
    outline = {"type": "point", "filled": False, "size": 4}  # a shape's unit is half the root of its size: one pixel
    layers: list[dict[str, Any]] = []
    if "not_comparable" in states:
        lines = {"shape": hatching(CELL_WIDTH - GAP, CELL_HEIGHT - GAP), "stroke": _themed("line")}
        layers.append(
            _layer("datum.state === 'not_comparable'", {**outline, **lines, "strokeWidth": 1, "opacity": 0.35})
        )
    corner = {"xOffset": 18 - CELL_WIDTH / 2, "yOffset": 18 - CELL_HEIGHT / 2, "strokeWidth": 1.8}
    for state, path in GLYPHS.items():
        if state in states:
            stroke = ON_FILL if state == "invalid" else {"value": _themed("ink")}
            layers.append(_layer(f"datum.state === '{state}'", {**outline, **corner, "shape": path}, stroke=stroke))
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


def _words() -> list[dict[str, Any]]:
    """Headline, detail and badge: on a filled cell in the colour that was chosen for its fill, else in the theme's."""

    def line(field: str, drop: int, size: int, weight: str, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        mark = {"type": "text", "dy": drop, "fontSize": size, "fontWeight": weight, "limit": CELL_WIDTH - 22, **more}
        return mark, {"field": field, "type": "nominal"}

    filled = (line("headline", -8, 16, "bold"), line("detail", 11, 11, "normal"), line("badge", 27, 10, "bold"))
    plain = (
        line("headline", -8, 14, "bold", color=_themed("ink")),
        line("detail", 11, 11, "normal", color=_themed("muted")),
    )
    return [
        *(_layer(FILLED, mark, text=text, color=ON_FILL) for mark, text in filled),
        *(_layer(PLAIN, mark, text=text) for mark, text in plain),
    ]
