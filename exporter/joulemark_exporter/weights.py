"""A model as the exporter sees it: a configuration, and named weights that are read row by row when somebody wants them.

Owns the two types and nothing else: where weights come from (`checkpoint`), what is added to them (`lora`) and what becomes of them
(`quantizers`, `writers`) is not known here. Names are those of the `state_dict` of the transformers class; shapes are as stored there.
Reading is lazy, so that a model far larger than the memory passes through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from joulemark_exporter.group_quantized import GroupQuantized, IntegerForm

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Weight:
    """One tensor. `read(start, stop)` gives rows start…stop−1 as a new, C-contiguous float32 array of shape (stop − start, *shape[1:])."""

    name: str
    shape: tuple[int, ...]
    stored: str
    """The type in the file: F32, F16, BF16, or of a quantized source its name (Q4_1, GPTQ4 …)."""
    read: Callable[[int, int], Float32]
    integers: Callable[[], GroupQuantized] | None = None
    """Of a group-quantized source the integers themselves (rows are outputs), so that they can be repacked without a second rounding."""
    form: IntegerForm | None = None
    """What kind of integers those are."""

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return int(np.prod(self.shape, dtype=np.int64))

    def whole(self) -> Float32:
        """All rows."""
        return self.read(0, self.shape[0])


@dataclass(frozen=True)
class Model:
    """A causal language model: `config` is its config.json, `folder` holds the tokenizer's files."""

    folder: Path
    config: dict[str, Any]
    weights: Mapping[str, Weight]
    lineage: tuple[tuple[str, str], ...] = ()
    """(step, sha256) from the base checkpoint on, in order."""

    @property
    def model_type(self) -> str:
        """The family's key in transformers, such as `llama`."""
        return str(self.config["model_type"])
