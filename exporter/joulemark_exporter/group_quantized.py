"""A matrix as group quantizers leave it: small integers, and a scale and a zero point for each group of a row.

    W[o, i] ≈ scales[o, g] · (integers[o, i] − zeros[o, g]),   g the group of column i

Owns the type, its bounds and its arithmetic. Scales are float16, because every file that holds such matrices (GPTQ checkpoints, GGUF's
Q4_0, Q4_1 and Q8_0, ONNX's MatMulNBits) stores 16 bits: what is rounded to here is what the file says, not nearly that. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from joulemark.errors import BadInput


@dataclass(frozen=True)
class IntegerForm:
    """What kind of integers a model's matrices are made of. `contiguous`: groups are neighbouring columns. `embedding`: the tensor type of
    the token embedding and of the output matrix."""

    bits: int
    group_size: int
    symmetric: bool
    contiguous: bool = True
    embedding: str = "Q8_0"

    def title(self, method: str) -> str:
        """What people call the result of a method, such as GPTQ-4-g32."""
        return f"{method}-{self.bits}-" + (f"g{self.group_size}" if self.group_size > 0 else "rows")


@dataclass(frozen=True)
class GroupQuantized:
    """Shapes: integers (rows, columns) uint8; scales (rows, groups) float16; zeros (rows, groups) uint8. Rows are outputs."""

    bits: int
    group_size: int
    symmetric: bool
    """True when every zero point is 2^(bits − 1)."""
    integers: NDArray[np.uint8]
    scales: NDArray[np.float16]
    zeros: NDArray[np.uint8]
    column_groups: NDArray[np.int32] | None = None
    """The group of each column, shape (columns,); None when group g is columns g·group_size … (g + 1)·group_size − 1."""

    def __post_init__(self) -> None:
        rows, columns = self.integers.shape
        groups = -(-columns // self.group_size)
        if self.scales.shape != (rows, groups) or self.zeros.shape != (rows, groups):
            raise BadInput(
                f"a matrix of {rows} × {columns} in groups of {self.group_size} has {groups} scales a row; found scales of shape "
                f"{self.scales.shape} and zero points of shape {self.zeros.shape}",
                "the checkpoint's quantization_config does not describe its tensors",
            )
        if not 2 <= self.bits <= 8:
            raise BadInput(f"{self.bits} bits are not supported", "use 2 to 8 bits")
        if int(self.integers.max(initial=0)) >= 1 << self.bits or int(self.zeros.max(initial=0)) >= 1 << self.bits:
            raise BadInput(f"an integer does not fit {self.bits} bits", "the checkpoint is damaged")

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        rows, columns = self.integers.shape
        return rows, columns

    def dequantize(self) -> NDArray[np.float32]:
        """float32 (rows, columns)."""
        groups = self.column_groups
        if groups is None:
            groups = np.arange(self.shape[1], dtype=np.int32) // self.group_size
        centred = self.integers.astype(np.float32) - self.zeros.astype(np.float32)[:, groups]
        return np.multiply(self.scales.astype(np.float32)[:, groups], centred, out=centred)

    def rows(self, index: NDArray[np.intp]) -> GroupQuantized:
        """The same rows in another order: integers, scales and zero points move together."""
        return GroupQuantized(
            self.bits,
            self.group_size,
            self.symmetric,
            self.integers[index],
            self.scales[index],
            self.zeros[index],
            self.column_groups,
        )
