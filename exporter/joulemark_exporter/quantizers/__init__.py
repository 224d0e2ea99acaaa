"""The quantizer plug-in contract: one file a method, chosen by `use` in the recipe's [quantizer].

A quantizer module offers

    class Options(Settings)                      its keys in the recipe
    calibrated(options) -> bool                  whether it looks at the calibration text: then the text is part of the lineage, and every
                                                 weight is looked at before hours are spent
    check(task, options) -> Numbers              raises BadInput for what cannot work, before anything is computed; says which kind of
                                                 numbers the matrices will be
    quantize(task, options) -> Choices           what becomes of every matrix

Choices are lazy where they can be: a writer asks for one matrix at a time, so that a model larger than the memory passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from joulemark.errors import BadInput
from joulemark_exporter import ggml
from joulemark_exporter.families import Family, Linear
from joulemark_exporter.group_quantized import GroupQuantized, IntegerForm
from joulemark_exporter.recipe import CalibrationSettings
from joulemark_exporter.weights import Float32, Model, Weight


@dataclass(frozen=True)
class Rounded:
    """The matrix is rounded to a tensor type of GGUF by ggml when it is written. `importance` weighs the squared errors by input."""

    type_name: str
    importance: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Integers:
    """The matrix is these integers, whatever the file: (rows, columns) with rows as outputs."""

    load: Callable[[], GroupQuantized]
    form: IntegerForm


Choice = Rounded | Integers


@dataclass(frozen=True)
class Floats:
    """Matrices stay floating-point numbers, of `type_name` or, where that is None, of whatever type the writer has. `embedding`: another
    type for the token embedding."""

    type_name: str | None = None
    embedding: str | None = None


@dataclass(frozen=True)
class GgufTypes:
    """Matrices become types that only GGUF has."""


Numbers = Floats | GgufTypes | IntegerForm
"""What a quantizer will make of the matrices, as a writer must know before anything is computed."""


@dataclass(frozen=True)
class ByEngine:
    """llama.cpp's quantizer decides: `file_type` is what it is asked for, `tensors` (pattern → type) what it is told, `importance` by
    state_dict name how inputs weigh."""

    file_type: str
    tensors: Mapping[str, str]
    importance: Mapping[str, NDArray[np.float32]]
    pure: bool = False


@dataclass(frozen=True)
class Choices:
    """What becomes of the tensors, by state_dict name. What is not named is a vector and stays as it is."""

    by_name: Mapping[str, Choice]
    title: str
    """What people call the result: Q4_0, GPTQ-4 g32, …"""
    tables: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    """Files that travel with the artifact, such as the sensitivity table: name → JSON."""
    by_engine: ByEngine | None = None
    """Set when the engine quantizes a float file; `by_name` is empty then."""


@dataclass(frozen=True)
class Task:
    """What a quantizer is given."""

    name: str
    """What the artifact is called."""
    licence: str | None
    model: Model
    family: Family
    calibration: CalibrationSettings
    cache: Path
    """Where fetched texts are kept."""
    threads: int
    work: Path
    """A folder that survives an interruption; what is there may be taken up again."""
    say: Callable[[str, int, int], None]
    """Progress: what is done, how far, of how much."""


def float_parts(task: Task, type_name: str) -> dict[str, Rounded]:
    """The matrices that group quantizers leave alone: embeddings and the output matrix in the type asked for (F16 where its blocks do not
    divide a row). Raises BadInput for a type that cannot be written."""
    ggml.block(type_name)
    quantized = task.family.matrices(task.model.config)
    return {
        name: Rounded(type_name if ggml.fits(type_name, weight.shape[1]) else "F16")
        for name, weight in task.model.weights.items()
        if len(weight.shape) == 2 and name not in quantized
    }


def grouped(task: Task, group_size: int) -> Iterator[tuple[str, Linear]]:
    """The matrices whose rows the groups divide; the others stay F16. Raises BadInput where that would be all of them."""
    found = False
    for name, linear in task.family.matrices(task.model.config).items():
        if inputs(task.model.weights[name], linear) % abs(group_size) == 0:
            found = True
            yield name, linear
    if not found:
        raise BadInput(f"groups of {group_size} divide no row of this model", "use a smaller group_size")


def inputs(weight: Weight, linear: Linear) -> int:
    """Columns of the matrix with rows as outputs."""
    return weight.shape[0] if linear.transposed else weight.shape[1]


def outputs(weight: Weight, linear: Linear) -> int:
    """Rows of the matrix with rows as outputs."""
    return weight.shape[1] if linear.transposed else weight.shape[0]


def outputs_first(weight: Weight, linear: Linear) -> Float32:
    """The whole matrix, (outputs, inputs) whatever the checkpoint's order."""
    values = weight.whole()
    return values.T.copy() if linear.transposed else values
