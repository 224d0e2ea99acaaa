"""ggml's own rounding, through the library that llama-cpp-python brings: float32 rows to any tensor type of GGUF, and back.

Owns the calls and their checks. So what is written here is, bit for bit, what llama.cpp's quantizer writes. Work is split over threads by
rows; ctypes releases the interpreter's lock. Truth: ggml.h and ggml-quants.c of llama-cpp-python 0.3.36; block sizes are in
`joulemark.gguf_format`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from joulemark.errors import BadInput, MissingExtra
from joulemark.gguf_format import TENSOR_TYPES

NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}
PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
NEEDS_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ3_XXS"})
"""Types that ggml refuses, or rounds badly, without an importance matrix (`ggml_quantize_requires_imatrix` and IQ3_XXS)."""
WRITABLE = frozenset(
    {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
     "IQ3_S", "IQ2_S", *NEEDS_IMPORTANCE}
)  # fmt: skip

_Work = Callable[[int, int], None]


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@functools.cache
def _library() -> Any:
    specification = importlib.util.find_spec("llama_cpp")
    if specification is None or specification.origin is None:
        raise MissingExtra("llama-cpp-python is not installed", "pip install 'joulemark[export]'")
    library = ctypes.CDLL(str(Path(specification.origin).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    sizes = [ctypes.c_int64] * 3
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *sizes, ctypes.c_void_p]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library


def block(type_name: str) -> tuple[int, int]:
    """(numbers per block, bytes per block). Raises BadInput for a type that cannot be written."""
    if type_name not in WRITABLE:
        raise BadInput(
            f"there is no tensor type {type_name!r} that can be written", f"known: {', '.join(sorted(WRITABLE))}"
        )
    _, numbers, size_bytes = TENSOR_TYPES[NUMBERS[type_name]]
    return numbers, size_bytes


def row_bytes(type_name: str, columns: int) -> int:
    """Bytes of one row. Raises BadInput when blocks do not divide it."""
    numbers, size_bytes = block(type_name)
    if columns % numbers:
        raise BadInput(
            f"a row of {columns} numbers cannot be stored as {type_name}", f"its blocks hold {numbers} numbers each"
        )
    return columns // numbers * size_bytes


def fits(type_name: str, columns: int) -> bool:
    """Whether rows of so many numbers can be of this type."""
    return columns % block(type_name)[0] == 0


def encode(
    rows: NDArray[np.float32], type_name: str, importance: NDArray[np.float32] | None = None, threads: int = 1
) -> NDArray[np.uint8]:
    """float32 (rows, columns) → uint8 (rows, bytes per row). `importance` (columns,) weighs the squared errors.

    Raises BadInput for shapes that the type cannot hold, and for the types that need an importance when there is none.
    """
    count, columns = rows.shape
    size = row_bytes(type_name, columns)
    if type_name in PLAIN:
        return _plain(rows, type_name)
    if importance is None and type_name in NEEDS_IMPORTANCE:
        raise BadInput(f"{type_name} needs an importance matrix", "state a [calibration] in the recipe")
    source, target = np.ascontiguousarray(rows, np.float32), np.empty((count, size), np.uint8)
    weigh = None if importance is None else np.ascontiguousarray(importance, np.float32)
    if weigh is not None and weigh.shape != (columns,):
        raise BadInput(
            f"an importance of shape {weigh.shape} does not fit rows of {columns}", "calibrate this model again"
        )
    library, number = _library(), NUMBERS[type_name]

    def work(start: int, stop: int) -> None:
        place = None if weigh is None else weigh.ctypes.data
        library.ggml_quantize_chunk(
            number, source.ctypes.data, target.ctypes.data, start * columns, stop - start, columns, place
        )

    _share(work, count, columns, threads)
    return target


def decode(data: NDArray[np.uint8], type_name: str, columns: int, threads: int = 1) -> NDArray[np.float32]:
    """uint8 (rows, bytes per row) → float32 (rows, columns)."""
    count, size = data.shape[0], row_bytes(type_name, columns)
    if data.shape != (count, size):
        raise BadInput(
            f"{type_name} rows of {columns} numbers have {size} bytes, not {data.shape[1:]}", "the data is damaged"
        )
    if type_name in PLAIN:
        return np.ascontiguousarray(data).view(PLAIN[type_name]).astype(np.float32)
    source, target = np.ascontiguousarray(data), np.empty((count, columns), np.float32)
    convert = _library().ggml_get_type_traits(NUMBERS[type_name]).contents.to_float

    def work(start: int, stop: int) -> None:
        convert(source.ctypes.data + start * size, target.ctypes.data + start * columns * 4, (stop - start) * columns)

    _share(work, count, columns, threads)
    return target


def _plain(rows: NDArray[np.float32], type_name: str) -> NDArray[np.uint8]:
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(rows.astype(PLAIN[type_name]))
    if not np.isfinite(values).all():
        raise BadInput(f"a weight does not fit {type_name}", "store this model as F32 or BF16")
    return values.view(np.uint8).reshape(rows.shape[0], -1)


def _share(work: _Work, rows: int, columns: int, threads: int) -> None:
    """Runs `work(start, stop)` over all rows, in pieces of about a million numbers."""
    pieces = list(_pieces(rows, max(1, (1 << 20) // columns)))
    if threads <= 1 or len(pieces) == 1:
        for piece in pieces:
            work(*piece)
        return
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work, *piece) for piece in pieces]:
            future.result()


def _pieces(rows: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, rows)) for start in range(0, rows, size))
