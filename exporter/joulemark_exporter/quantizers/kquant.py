"""llama.cpp's own quantizer, with our importance matrix and types by tensor: Q4_K_M, IQ4_XS and whatever else it knows.

Which tensor gets which type is decided by llama.cpp, so that the result is what people call Q4_K_M. This module only states what it is
given."""

from __future__ import annotations

import re

from joulemark.errors import BadInput
from joulemark.gguf_format import FILE_TYPES
from joulemark_exporter import ggml, importance
from joulemark_exporter.quantizers import ByEngine, Choices, GgufTypes, Task
from joulemark_exporter.recipe import Settings


class Options(Settings):
    """`type` is llama.cpp's file type. `tensors` overrides it: a regular expression on GGUF names → tensor type, first match wins."""

    type: str = "Q4_K_M"
    weighted: bool = True
    """False: without importance matrix."""
    tensors: dict[str, str] = {}  # noqa: RUF012 - pydantic copies defaults
    pure: bool = False
    """Every matrix the same type, instead of llama.cpp's mixture."""


def calibrated(options: Options) -> bool:
    """Only the importance matrix is."""
    return options.weighted


def check(task: Task, options: Options) -> GgufTypes:
    """See the contract."""
    if options.type not in FILE_TYPES.values():
        raise BadInput(
            f"llama.cpp has no file type {options.type!r}", f"known: {', '.join(sorted(FILE_TYPES.values()))}"
        )
    for pattern, type_name in options.tensors.items():
        ggml.block(type_name)
        try:
            re.compile(pattern)
        except re.error as error:
            raise BadInput(
                f"{pattern!r} is not a regular expression: {error}", "write a pattern on GGUF's tensor names"
            ) from error
    if not task.family.gguf:
        raise BadInput("llama.cpp's quantizer works on GGUF, which this architecture has not", "use another quantizer")
    return GgufTypes()


def quantize(task: Task, options: Options) -> Choices:
    """See the contract."""
    measured = importance.measure(task)[0] if options.weighted else {}
    by_engine = ByEngine(options.type, dict(options.tensors), measured, options.pure)
    return Choices({}, options.type + ("-imatrix" if options.weighted else ""), by_engine=by_engine)
