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
from joulemark_exporter.writers import gguf, onnx
from tests.fixtures import hub_models
from tests.fixtures.exporting import task

README = Path(__file__).parents[2] / "README.md"
OPTIONS: dict[str, dict[str, Any]] = {"lobi": {"bits_per_weight": 6.0, "windows": 1, "tokens": 32}}
NEEDED = {"none": "fp32", "rtn": "int4", "gptq": "int4"}
"""The graph's precision for what a quantizer gives."""


def quantizers() -> dict[str, ModuleType]:
    return {name: plugins.load(recipe.QUANTIZERS, name) for name in plugins.names(recipe.QUANTIZERS)}


def refusal(given: Task, name: str, module: ModuleType, writer: ModuleType) -> str | None:
    """Why the exporter refuses the combination, or None."""
    options = module.Options(**OPTIONS.get(name, {}))
    settings = onnx.Options(precision=NEEDED.get(name, "int4")) if writer is onnx else gguf.Options()  # type: ignore[arg-type]
    try:
        writer.check(given, settings, module.check(given, options))
    except BadInput as error:
        return str(error).partition("\n")[0]
    return None


def table(folder: Path) -> str:
    """The table in Markdown, its reasons as footnotes."""
    columns = [(name, module, writer) for writer in (gguf, onnx) for name, module in quantizers().items()]
    reasons: list[str] = []
    rows: list[str] = []
    for family in hub_models.FAMILIES:
        hub_models.write(folder / family, family)
        given = task(folder / family, folder)
        cells: list[str] = []
        for name, module, writer in columns:
            why = refusal(given, name, module, writer)
            if why is not None and why not in reasons:
                reasons.append(why)
            cells.append("✓" if why is None else f"{reasons.index(why) + 1}")
        rows.append(f"| {family} | " + " | ".join(cells) + " |")
    names = [f"{name} → {'GGUF' if writer is gguf else 'ONNX'}" for name, _, writer in columns]
    head = ["| family | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    notes = [f"{number}. {why}" for number, why in enumerate(reasons, 1)]
    return "\n".join([*head, *rows, "", *notes]) + "\n"


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
