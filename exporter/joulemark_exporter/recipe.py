"""The recipe: a TOML file that says how a model becomes an artifact. Parsed with bounds; an unknown key is an error that names the nearest
known one, because a setting that is silently ignored is a result that nobody asked for.

Owns the keys that all quantizers share. The keys of a quantizer are in its own file (`quantizers/NAME.py`, class `Options`), those of a
writer in its own (`writers/NAME.py`), so that adding one is adding a file.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from joulemark import plugins
from joulemark.errors import BadInput, NotFound
from joulemark.wire import Identifier

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]  # installed on Python 3.10 only

QUANTIZERS = "joulemark_exporter.quantizers"
WRITERS = "joulemark_exporter.writers"
MAX_BYTES = 1 << 14
"""A hundred times a recipe; the time that dotted keys take to read grows with the square of their parts."""


class Settings(BaseModel):
    """The base of every table of a recipe: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class AdapterSettings(Settings):
    """[[adapters]]: a PEFT folder, and what its effect is multiplied with."""

    path: Annotated[str, Field(min_length=1)]
    scale: Annotated[float, Field(ge=-100, le=100)] = 1.0


class CalibrationSettings(Settings):
    """[calibration]: the text from which the quantizers learn what matters. Never an evaluation item."""

    dataset: Annotated[str, Field(min_length=1)] = "passages"
    """A known text (`texts.names()`) or the path of a text file."""
    samples: Annotated[int, Field(ge=1, le=100_000)] = 128
    tokens: Annotated[int, Field(ge=8, le=32_768)] = 512
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0


class ProbeSettings(Settings):
    """[probe]: the text on which the artifact is compared with the unquantized model. None: WikiText-2's test split where it is, else
    novels."""

    text: Annotated[str, Field(min_length=1)] | None = None
    windows: Annotated[int, Field(ge=1, le=100_000)] = 8
    tokens: Annotated[int, Field(ge=8, le=32_768)] = 256


class Limits(Settings):
    """[limits]: what fails one of them is not published. Absent ones are measured and reported, but do not decide."""

    divergence: Annotated[float, Field(gt=0)] | None = None
    """Mean Kullback-Leibler divergence of the next token's distribution from the unquantized model's, in nats."""
    top1_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of positions where both models find the same token the most likely."""
    perplexity_increase: Annotated[float, Field(gt=0)] | None = None
    """Perplexity on the probe text, divided by the unquantized model's."""
    bits_per_weight: Annotated[float, Field(gt=0)] | None = None


class Recipe(Settings):
    """A whole recipe. `quantizer` and `writer` are the validated options of the plug-ins that they name."""

    name: Identifier | None = None
    licence: Annotated[str, Field(max_length=200)] | None = None
    quantizer_name: Identifier
    quantizer: Settings
    writer_name: Identifier
    writer: Settings
    adapters: tuple[AdapterSettings, ...] = ()
    calibration: CalibrationSettings = CalibrationSettings()
    probe: ProbeSettings = ProbeSettings()
    limits: Limits = Limits()

    def plain(self) -> dict[str, Any]:
        """Everything that decides about the result, as JSON values: the base of the artifact's lineage.

        Of paths only the last part: where a file lay decides nothing, and what was in it is in the lineage by its sha256."""
        values = self.model_dump(mode="json", exclude={"adapters"})
        values["calibration"]["dataset"] = Path(self.calibration.dataset).name
        values["probe"]["text"] = None if self.probe.text is None else Path(self.probe.text).name
        values["adapters"] = [{"name": Path(item.path).name, "scale": item.scale} for item in self.adapters]
        plugins_own = {
            "quantizer": self.quantizer.model_dump(mode="json"),
            "writer": self.writer.model_dump(mode="json"),
        }
        return {**values, **plugins_own}


def read(path: Path) -> Recipe:
    """The recipe in a file. Raises NotFound, BadInput."""
    if not path.is_file():
        raise NotFound(f"there is no recipe at {path}", "see `joulemark export --help` for an example")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise BadInput(f"{path} is larger than {MAX_BYTES} bytes", "a recipe is a short text")
    return parse(data.decode(errors="replace"), str(path))


def parse(text: str, where: str = "the recipe") -> Recipe:
    """The recipe in a text. Raises BadInput that says where, what, and the nearest known word."""
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOML's own, and numbers of too many digits
        raise BadInput(f"{where} is not TOML: {error}", "see `joulemark export --help` for an example") from error
    known = ("name", "licence", "quantizer", "writer", "adapters", "calibration", "probe", "limits")
    for key in values:
        if key not in known:
            raise BadInput(f"{where}: unknown key {key!r}", _nearest(key, known))
    quantizer_name, quantizer = _plugin(values, "quantizer", QUANTIZERS, where)
    writer_name, writer = _plugin({"writer": {"use": "gguf"}, **values}, "writer", WRITERS, where)
    rest = {key: values[key] for key in ("name", "licence") if key in values}
    adapters = values.get("adapters", [])
    if not isinstance(adapters, list):
        raise BadInput(f"{where}: adapters must be tables", "write [[adapters]] with a path")
    return _validated(
        Recipe,
        {
            **rest,
            "quantizer_name": quantizer_name,
            "quantizer": quantizer,
            "writer_name": writer_name,
            "writer": writer,
            "adapters": tuple(_validated(AdapterSettings, item, f"{where}, [[adapters]]") for item in adapters),
            "calibration": _validated(CalibrationSettings, values.get("calibration", {}), f"{where}, [calibration]"),
            "probe": _validated(ProbeSettings, values.get("probe", {}), f"{where}, [probe]"),
            "limits": _validated(Limits, values.get("limits", {}), f"{where}, [limits]"),
        },
        where,
    )


def _plugin(values: dict[str, Any], table: str, package: str, where: str) -> tuple[str, Settings]:
    stated = values.get(table)
    if not isinstance(stated, dict) or not isinstance(stated.get("use"), str):
        raise BadInput(
            f"{where} does not say which {table} to use",
            f'write [{table}] with use = "…", one of {", ".join(plugins.names(package))}',
        )
    name = stated["use"]
    if name not in plugins.names(package):
        raise BadInput(f"{where}: there is no {table} {name!r}", _nearest(name, plugins.names(package)))
    options = {key: value for key, value in stated.items() if key != "use"}
    return name, _validated(plugins.load(package, name).Options, options, f"{where}, [{table}]")


def _validated(kind: type[Any], values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise BadInput(f"{where} must be a table", "see `joulemark export --help` for an example")
    for key in values:
        if key not in kind.model_fields:
            raise BadInput(f"{where}: unknown key {key!r}", _nearest(str(key), tuple(kind.model_fields)))
    try:
        return kind.model_validate(_tuples(values))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the table"
        raise BadInput(f"{where}: {place}: {first['msg']}", f"found {first['input']!r}"[:200]) from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """TOML has lists and whole numbers; the settings want tuples, and floats where a fraction is meant."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _nearest(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
