"""Integers and scales into the bytes of files, and back: GGUF's blocks and the tensors of GPTQ checkpoints. Nothing is rounded twice.

    Q4_0  blocks of 32: float16 d, 16 bytes;          value d·(n − 8); the low halves of the bytes are the first 16 values
    Q4_1  blocks of 32: float16 d, float16 m, 16 bytes; value d·n + m
    Q8_0  blocks of 32: float16 d, 32 signed bytes;   value d·n
    GPTQ  qweight int32 (columns·bits/32, rows), packed along columns; qzeros int32 (groups, rows·bits/32); scales float16 (groups, rows);
          g_idx int32 (columns,). Format `gptq` stores zero points minus one, `gptq_v2` as they are.

Pure numpy. Truth: ggml-common.h and ggml-quants.c; `qlinear` of AutoGPTQ and GPTQModel. K-quants hold 6-bit scales of scales: no integers
can be put into them exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from joulemark.errors import BadInput
from joulemark_exporter.group_quantized import GroupQuantized

BLOCK = 32
Bytes = NDArray[np.uint8]


# --- GGUF -------------------------------------------------------------------------------------------------------------
def gguf_type(bits: int, *, symmetric: bool) -> str:
    """The tensor type that holds such integers exactly. Raises BadInput where there is none."""
    if symmetric and bits <= 4:
        return "Q4_0"
    if symmetric and bits == 8:
        return "Q8_0"
    if bits <= 4:
        return "Q4_1"
    raise BadInput(
        f"GGUF has no type that holds {'symmetric' if symmetric else 'asymmetric'} {bits}-bit integers exactly",
        "use 4 bits, or 8 bits symmetric",
    )


def unpackable(columns: int, group_size: int, contiguous: bool = True) -> str | None:
    """Why a matrix cannot be put into GGUF's blocks without a second rounding, or None when it can."""
    if columns % BLOCK:
        return f"its rows have {columns} numbers, which blocks of {BLOCK} do not divide"
    if group_size % BLOCK and group_size < columns:
        return f"its groups have {group_size} numbers, GGUF's blocks {BLOCK}"
    if not contiguous:
        return "its groups are not contiguous (act-order without static groups)"
    return None


def to_gguf(matrix: GroupQuantized) -> tuple[str, Bytes]:
    """(tensor type, uint8 (rows, bytes per row)). Raises BadInput where the integers have no place."""
    type_name = gguf_type(matrix.bits, symmetric=matrix.symmetric)
    rows, columns = matrix.shape
    why = unpackable(columns, matrix.group_size, matrix.column_groups is None)
    if why is not None:
        raise BadInput(
            f"a matrix cannot be repacked as {type_name}: {why}", "use static_groups = true, or groups of 32, 64 or 128"
        )
    blocks = columns // BLOCK
    group_of_block = np.arange(blocks) * BLOCK // matrix.group_size
    scales = matrix.scales[:, group_of_block]
    integers = matrix.integers.reshape(rows, blocks, BLOCK)
    if type_name == "Q8_0":
        values = (integers ^ np.uint8(0x80)).reshape(rows, blocks, BLOCK)  # n − 128 as a signed byte
        return type_name, _join(scales, values)
    if type_name == "Q4_0":
        # Q4_0's zero is at 8, whatever the bits: two and three bits use its middle.
        shifted = integers + np.uint8(8 - (1 << (matrix.bits - 1)))
        return type_name, _join(scales, _halves(shifted))
    offsets = -(scales.astype(np.float32) * matrix.zeros[:, group_of_block].astype(np.float32))
    return type_name, _join(scales, offsets.astype(np.float16), _halves(integers))


def _halves(integers: NDArray[np.uint8]) -> Bytes:
    half = BLOCK // 2
    return integers[..., :half] | (integers[..., half:] << np.uint8(4))


def _join(*parts: NDArray[Any]) -> Bytes:
    """Blocks of a row side by side: scales (rows, blocks) become two bytes each, values (rows, blocks, bytes) stay."""
    as_bytes = [
        np.ascontiguousarray(part).view(np.uint8).reshape(*part.shape[:2], -1) if part.dtype != np.uint8 else part
        for part in parts
    ]
    joined = np.concatenate(as_bytes, axis=2)
    return joined.reshape(joined.shape[0], -1)


# --- GPTQ checkpoints -------------------------------------------------------------------------------------------------
def to_gptq(matrix: GroupQuantized, checkpoint_format: str = "gptq") -> dict[str, NDArray[Any]]:
    """The four tensors of a matrix. Raises BadInput where 32-bit words cannot hold whole rows or columns."""
    rows, columns = matrix.shape
    check_gptq("a matrix", rows, columns, matrix.bits)
    zeros = matrix.zeros.astype(np.uint8)
    if checkpoint_format == "gptq":
        zeros = (zeros - np.uint8(1)) & np.uint8((1 << matrix.bits) - 1)
    groups = matrix.column_groups
    return {
        "qweight": _pack(matrix.integers.T, matrix.bits),
        "qzeros": _pack(zeros, matrix.bits).T.copy(),
        "scales": matrix.scales.T.copy(),
        "g_idx": np.arange(columns, dtype=np.int32) // np.int32(matrix.group_size) if groups is None else groups,
    }


def check_gptq(name: str, rows: int, columns: int, bits: int) -> None:
    """Raises BadInput where 32-bit words cannot hold whole rows or columns."""
    for what, count in (("columns", columns), ("rows", rows)):
        if count * bits % 32 or (count % 32 and bits == 3):
            raise BadInput(
                f"{name} has {count} {what}: of {bits} bits they do not fill 32-bit words",
                "GPTQ checkpoints cannot hold it: use other bits, or leave the checkpoint out",
            )


def from_gptq(
    tensors: Mapping[str, NDArray[Any]], *, bits: int, group_size: int, symmetric: bool, checkpoint_format: str
) -> GroupQuantized:
    """The matrix of a checkpoint's tensors, whose shapes and values are checked. Raises BadInput."""
    weight, packed_zeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    if weight.dtype != np.int32 or packed_zeros.dtype != np.int32 or weight.ndim != 2 or scales.ndim != 2:
        raise BadInput("qweight and qzeros must be int32 matrices", "this is not a GPTQ checkpoint")
    columns, rows = weight.shape[0] * 32 // bits, weight.shape[1]
    size = columns if group_size == -1 else group_size
    groups = -(-columns // size)
    if scales.shape != (groups, rows) or packed_zeros.shape != (groups, rows * bits // 32):
        raise BadInput(
            f"scales have shape {scales.shape} and qzeros {packed_zeros.shape}; {columns} columns in groups of {size} and {rows} rows need "
            f"{(groups, rows)} and {(groups, rows * bits // 32)}",
            "quantization_config does not describe this checkpoint",
        )
    integers = np.ascontiguousarray(_unpack(weight, bits).T)
    zeros = np.ascontiguousarray(_unpack(np.ascontiguousarray(packed_zeros.T), bits))
    if checkpoint_format == "gptq":
        zeros = (zeros + np.uint8(1)) & np.uint8((1 << bits) - 1)
    centred = bool((zeros == 1 << (bits - 1)).all())
    if symmetric and not centred:
        raise BadInput(
            "the checkpoint calls itself symmetric, but its zero points are not in the middle",
            "it is damaged, or of the other format",
        )
    halves = scales.astype(np.float16)
    if not np.isfinite(halves).all():
        raise BadInput("a scale is NaN or infinite", "the checkpoint is damaged")
    column_groups = _column_groups(tensors.get("g_idx"), columns, size, groups)
    return GroupQuantized(bits, size, symmetric, integers, np.ascontiguousarray(halves.T), zeros, column_groups)


def _column_groups(stored: NDArray[Any] | None, columns: int, size: int, groups: int) -> NDArray[np.int32] | None:
    if stored is None:
        return None
    if stored.shape != (columns,) or not np.issubdtype(stored.dtype, np.integer):
        raise BadInput(f"g_idx has shape {stored.shape}, expected {(columns,)}", "the checkpoint is damaged")
    if stored.min(initial=0) < 0 or stored.max(initial=0) >= groups:
        raise BadInput("g_idx names a group that does not exist", "the checkpoint is damaged")
    found = stored.astype(np.int32)
    return None if np.array_equal(found, np.arange(columns, dtype=np.int32) // np.int32(size)) else found


def _pack(values: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Packs along the first axis, little end first; 3-bit values span words."""
    count, width = values.shape
    words = np.zeros((count * bits // 32, width), np.uint64)
    for index in range(count):
        word, shift = divmod(index * bits, 32)
        spread = values[index].astype(np.uint64) << np.uint64(shift)
        words[word] |= spread & np.uint64(0xFFFFFFFF)
        if shift + bits > 32:
            words[word + 1] |= spread >> np.uint64(32)
    return words.astype(np.uint32).view(np.int32)


def _unpack(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """The inverse of `_pack`: (words, width) → (values, width)."""
    wide = words.view(np.uint32).astype(np.uint64)
    count = words.shape[0] * 32 // bits
    values = np.empty((count, words.shape[1]), np.uint8)
    for index in range(count):
        word, shift = divmod(index * bits, 32)
        value = wide[word] >> np.uint64(shift)
        if shift + bits > 32:
            value |= wide[word + 1] << np.uint64(32 - shift)
        values[index] = value & np.uint64((1 << bits) - 1)
    return values
