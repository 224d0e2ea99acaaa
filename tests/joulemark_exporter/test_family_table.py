"""README's table of family × quantizer × format is what the exporter says. `python -m tests.joulemark_exporter.test_family_table` prints
it.

What a cell calls possible is written here in GGUF; the graphs of all families are compared with transformers in `test_onnx_writer`."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from joulemark import artifact, plugins
from joulemark.errors import BadInput
from joulemark.sources import default_cache
from joulemark_exporter import recipe
from joulemark_exporter.quantizers import Task
from joulemark_exporter.recipe import CalibrationSettings
from joulemark_exporter.writers import gguf, onnx, optimum
from tests.fixtures import hub_models
from tests.fixtures.exporting import task

README = Path(__file__).parents[2] / "README.md"
OPTIONS: dict[str, dict[str, Any]] = {"lobi": {"bits_per_weight": 6.0, "windows": 1, "tokens": 32}}
WRITERS = {"GGUF": gguf, "ONNX": onnx, "optimum": optimum}


def quantizers() -> dict[str, ModuleType]:
    return {name: plugins.load(recipe.QUANTIZERS, name) for name in plugins.names(recipe.QUANTIZERS)}


def refusal(given: Task, name: str, module: ModuleType, writer: ModuleType) -> str | None:
    """Why the exporter refuses the combination, or None."""
    try:
        numbers = module.check(given, module.Options(**OPTIONS.get(name, {})))
        settings = writer.Options(precision="int4") if writer is onnx and name != "none" else writer.Options()
        writer.check(given, settings, numbers)
    except BadInput as error:
        return str(error).partition("\n")[0]
    return None


def table(folder: Path) -> str:
    """The table in Markdown, its reasons as footnotes. Columns in which nothing works are named below it, with the reason
    that the first family gets."""
    cells: dict[str, list[str | None]] = {}
    for family in hub_models.FAMILIES:
        hub_models.write(folder / family, family)
        given = task(folder / family, folder)
        for title, writer in WRITERS.items():
            for name, module in quantizers().items():
                cells.setdefault(f"{name} → {title}", []).append(refusal(given, name, module, writer))
    kept = {column: found for column, found in cells.items() if None in found}
    reasons = list(dict.fromkeys(why for row in zip(*kept.values(), strict=True) for why in row if why is not None))
    rows = [
        f"| {family} | " + " | ".join("✓" if why is None else f"{reasons.index(why) + 1}" for why in found) + " |"
        for family, found in zip(hub_models.FAMILIES, zip(*kept.values(), strict=True), strict=True)
    ]
    head = ["| family | " + " | ".join(kept) + " |", "|---" * (len(kept) + 1) + "|"]
    notes = [f"{number}. {why}" for number, why in enumerate(reasons, 1)]
    never: dict[str, list[str]] = {}
    for column, found in cells.items():
        if column not in kept:
            never.setdefault(str(found[0]), []).append(column)
    refused = [f"- {', '.join(columns)}: {why}" for why, columns in never.items()]
    return "\n".join([*head, *rows, "", *notes, "", "For no family:", "", *refused]) + "\n"


def test_the_readme_says_what_the_exporter_says(tmp_path: Path) -> None:
    assert table(tmp_path) in README.read_text(), "print it with: python -m tests.joulemark_exporter.test_family_table"


# llama.cpp has no OPT. What `none` and `rtn` write is compared with llama.cpp's converter elsewhere, and Lo-Bi takes its time.
WRITTEN = [(family, name) for family in hub_models.FAMILIES if family != "opt" for name in ("gptq", "kquant")]


@pytest.mark.parametrize(("family", "name"), [*WRITTEN, ("gpt2", "lobi"), ("gemma2", "lobi")])
def test_what_the_table_calls_possible_is_written(family: str, name: str, tmp_path: Path) -> None:
    hub_models.write(tmp_path / "model", family)
    little = CalibrationSettings(samples=2, tokens=32)
    given = dataclasses.replace(task(tmp_path / "model", tmp_path), calibration=little, cache=default_cache())
    module = quantizers()[name]
    options = module.Options(**OPTIONS.get(name, {}))
    (tmp_path / "out").mkdir()
    written = gguf.write(given, module.quantize(given, options), tmp_path / "out", gguf.Options())
    manifest = artifact.describe(written.files[0])
    assert manifest.parameters == sum(weight.size for weight in given.model.weights.values())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        sys.stdout.write(table(Path(place)))
