"""The colours of figures: one scale for values, two themes for everything else, and which text stands out on a fill.

The scale is cividis (Nuñez, Anderton & Renslow 2018, doi:10.1371/journal.pone.0199239): it reads the same with and
without colour vision, and in grey. Colours are sRGB, 0 to 255 a channel, or their `#rrggbb` form. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

CIVIDIS = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838")
DARK_TEXT = "#000000"
LIGHT_TEXT = "#ffffff"
THEMES: Mapping[str, Mapping[str, str]] = {
    "light": {"paper": "#ffffff", "ink": "#1a2027", "muted": "#4c5866", "quiet": "#edf0f3", "line": "#8793a0"},
    "dark": {"paper": "#12161b", "ink": "#e8ecf1", "muted": "#aab5c1", "quiet": "#232a32", "line": "#76828f"},
}


def fill_colour(place: float, colours: Sequence[str] = CIVIDIS) -> tuple[float, float, float]:
    """The sRGB colour (0–255) at `place` in 0…1 of `colours`, interpolated as Vega does."""
    position = min(max(place, 0.0), 1.0) * (len(colours) - 1)
    index = min(int(position), len(colours) - 2)
    left, right = (_rgb(colours[index + step]) for step in (0, 1))
    red, green, blue = (a + (b - a) * (position - index) for a, b in zip(left, right, strict=True))
    return red, green, blue


def text_colour(fill: tuple[float, float, float]) -> str:
    """DARK_TEXT or LIGHT_TEXT, whichever has the higher WCAG contrast with `fill`."""
    against = contrast(fill, _rgb(DARK_TEXT)), contrast(fill, _rgb(LIGHT_TEXT))
    return DARK_TEXT if against[0] >= against[1] else LIGHT_TEXT


def contrast(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    """The contrast ratio of two sRGB colours, 1 to 21 (WCAG 2.2, section 1.4.3)."""
    bright, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(colour: tuple[float, float, float]) -> float:
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _rgb(colour: str) -> tuple[float, float, float]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
