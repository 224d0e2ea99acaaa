"""What is drawn and written is what was measured: units, chart definition, picture, CSV."""

from __future__ import annotations

import csv
import io
import json
import struct
import zlib

import pytest

from joulemark.metrics import METRICS
from joulemark.wire import Absent
from joulemark_host import charts
from joulemark_host.colours import CIVIDIS, LIGHT_TEXT, THEMES, contrast, fill_colour, text_colour
from joulemark_host.figures import draw, grid_csv
from joulemark_host.readable import amount, number, unit_for
from tests.fixtures.grids import LAB, PI, fleet, run_facts


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.2777, "1", "27.8 %"),
        (0.0, "1", "0 %"),
        (1.0, "1", "100 %"),
        (0.0412, "s", "41.2 ms"),
        (12.34, "s", "12.3 s"),
        (250e6, "By", "238 MiB"),
        (6 * 2.0**30, "By", "6.00 GiB"),
        (84.23, "tok/s", "84.2 tok/s"),
        (12345.6, "tok/s", "12,346 tok/s"),
        (0.25, "J/tok", "250 mJ/tok"),
        (61.5, "Cel", "61.5 °C"),
        (1.0, "1/s", "1.00 questions/s"),
    ],
)
def test_values_are_shown_in_readable_units(value: float, unit: str, text: str):
    assert amount(value, unit_for(unit, [value])) == text


def test_three_digits_are_kept():
    assert [number(v) for v in (0.000012, 0.00123, 0.5, 9.999, 99.94, -3.21, 1e8)] == [
        "1.20e-05", "0.00123", "0.5", "10.00", "99.9", "-3.21", "1.00e+08",
    ]  # fmt: skip


def chart_rows(chart: dict[str, object]) -> dict[tuple[str, str], dict[str, object]]:
    data = chart["data"]
    assert isinstance(data, dict)
    return {(row["device"].split()[0], row["model"].split()[-1]): row for row in data["values"]}


def test_the_chart_says_what_the_grid_says():
    figure = draw(fleet(), "decode_rate", "arc_challenge")
    assert figure.chart is not None
    rows = chart_rows(figure.chart)
    assert {key: row["state"] for key, row in rows.items()} == {
        ("Jetson", "Q4_K_M"): "not_run",
        ("Jetson", "Q4_1"): "measured",
        ("Jetson", "Q8_0"): "unsupported",
        ("lab", "Q4_K_M"): "measured",
        ("lab", "Q4_1"): "measured",
        ("lab", "Q8_0"): "measured",
        ("Raspberry", "Q4_K_M"): "failed",
        ("Raspberry", "Q4_1"): "invalid",
        ("Raspberry", "Q8_0"): "not_comparable",
    }
    best = rows["lab", "Q4_1"]
    assert (best["shown"], best["headline"], best["detail"]) == (84.2, "84.2 tok/s", "75.8 – 92.6, n 20")
    assert (best["n"], best["source"], best["run"], best["why"]) == ("20", "fixture", "run-1", "–")
    invalid = rows["Raspberry", "Q4_1"]
    assert (invalid["shown"], invalid["badge"], invalid["why"]) == (31.0, "NOT VALID", "not valid: throttled for 12 s")
    uneven = rows["Raspberry", "Q8_0"]
    assert uneven["shown"] is None  # not on the colour scale
    assert uneven["headline"] == "not comparable"
    assert uneven["value"] == "20.0 tok/s"  # but the tooltip has it
    text = json.dumps(figure.chart)
    assert "tok/s, higher is better" in text
    assert text.count('"domain": [22.5, 84.2]') == 1
    assert figure.conditions["latency plan"] == "5 prompts × 64 tokens after 1 warm-up"


def test_bright_is_better_also_where_lower_is_better():
    def colours(metric: str) -> list[str]:
        runs = [run_facts(i, device=device, figures={metric: 1.0 + i}) for i, device in enumerate((LAB, PI))]
        chart = draw(runs, metric, "arc_challenge").chart
        assert chart is not None
        (scale,) = (
            layer["encoding"]["color"]["scale"]
            for layer in chart["layer"]
            if "scale" in layer["encoding"].get("color", {})
        )
        return scale["range"]

    assert colours("decode_rate") == list(CIVIDIS)
    assert colours("ttft_p50") == list(CIVIDIS)[::-1]


def test_text_stands_out_on_every_fill_and_in_both_themes():
    for step in range(101):
        fill = fill_colour(step / 100)
        chosen = text_colour(fill)
        rgb = tuple(float(int(chosen[i : i + 2], 16)) for i in (1, 3, 5))
        assert contrast(fill, (rgb[0], rgb[1], rgb[2])) >= 4.5, step
    for colours in THEMES.values():
        as_rgb = {name: tuple(float(int(c[i : i + 2], 16)) for i in (1, 3, 5)) for name, c in colours.items()}
        for text in ("ink", "muted"):
            for ground in ("paper", "quiet"):
                assert contrast(as_rgb[text], as_rgb[ground]) >= 4.5, (text, ground)  # type: ignore[arg-type]


def test_the_definition_fits_the_schema_of_vega_lite():
    altair = pytest.importorskip("altair", reason="altair carries the schema of Vega-Lite")
    chart = draw(fleet(), "decode_rate", "arc_challenge").chart
    altair.LayerChart.from_dict(chart)
    two = charts.stack([chart or {}, draw(fleet(), "accuracy", "arc_challenge").chart or {}])
    altair.ConcatChart.from_dict(two)


def test_one_value_needs_no_scale_and_no_value_has_none():
    figure = draw([run_facts(1, figures={"accuracy": 0.4})], "accuracy", "arc_challenge")
    assert '"domain": [36.0, 44.0], "range": ["#123570", "#123570"]' in json.dumps(figure.chart)
    assert figure.chart
    assert figure.chart["data"]["values"][0]["text"] == LIGHT_TEXT
    assert '"legend": null' in json.dumps(figure.chart)  # a scale of one value would say nothing
    assert "arc_challenge, higher is better" in json.dumps(figure.chart)
    figure = draw([run_facts(1, figures={"accuracy": Absent(reason="no items")})], "accuracy", "arc_challenge")
    assert '"scale": {"domain"' not in json.dumps(figure.chart)
    assert charts.png([figure.chart or {}])[:8] == b"\x89PNG\r\n\x1a\n"
    assert draw([], "accuracy", "arc_challenge").chart is None


def pixels(png: bytes) -> tuple[int, int, set[bytes]]:
    """Width, height and the distinct decompressed rows of a PNG."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    data, place = b"", 8
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        if png[place + 4 : place + 8] == b"IDAT":
            data += png[place + 8 : place + 8 + length]
        place += 12 + length
    raw = zlib.decompress(data)
    stride = len(raw) // height
    return width, height, {raw[i * stride : (i + 1) * stride] for i in range(height)}


def test_the_picture_is_really_drawn_and_changes_with_a_value():
    def picture(runs: list[object]) -> bytes:
        figures = [draw(runs, metric, "arc_challenge") for metric in ("decode_rate", "accuracy")]  # type: ignore[arg-type]
        return charts.png([figure.chart for figure in figures if figure.chart], scale=1)

    runs = fleet()
    first = picture(list(runs))
    width, height, rows = pixels(first)
    assert width > 600
    assert height > 700
    assert len(rows) > 300  # a blank picture has one
    assert picture(list(runs)) == first
    changed = [*runs[:-2], run_facts(7, device=LAB, figures={"decode_rate": 85.3}), runs[-1]]
    assert picture(list(changed)) != first
    dark = charts.png([charts.heatmap(draw(runs, "decode_rate", "arc_challenge").grid, "dark")], scale=1)
    light = charts.png([charts.heatmap(draw(runs, "decode_rate", "arc_challenge").grid, "light")], scale=1)
    assert dark != light


def test_csv_has_si_values_and_no_formulas():
    hostile = LAB.model_copy(update={"name": '=cmd|" /C calc"!A1', "device_id": "evil"})
    runs = [*fleet(), run_facts(9, device=hostile, figures={"decode_rate": 5.0}, reasons=["-2+3", "@x"])]
    lines = list(csv.DictReader(io.StringIO(grid_csv(draw(runs, "decode_rate", "arc_challenge").grid))))
    assert len(lines) == 12
    found = {(line["device"], line["model"]): line for line in lines}
    best = found["lab workstation", "smollm2-135m-instruct · Q4_1"]
    assert (float(best["value"]), best["unit"], best["n"], best["valid"]) == (84.2, "tok/s", "20", "True")
    assert (best["metric"], best["task"], best["run_id"]) == ("decode_rate", "arc_challenge", "run-1")
    assert found["Jetson Orin Nano 8 GB", "qwen2.5-0.5b-instruct · Q4_K_M"]["value"] == ""
    for line in lines:
        for field in line.values():
            assert not field.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert '\'=cmd|" /C calc"!A1' in {line["device"] for line in lines}


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_can_be_drawn(metric: str):
    runs = [run_facts(1, figures={metric: 0.5})]
    figure = draw(runs, metric, "arc_challenge")
    assert figure.lines[0].value
    assert figure.grid.cells[0].status == "measured"
