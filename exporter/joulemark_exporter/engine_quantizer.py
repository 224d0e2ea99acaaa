"""llama.cpp's quantizer, `llama_model_quantize`, through llama-cpp-python: a float GGUF becomes one of llama.cpp's mixtures.

Owns the call and its two lists that end in an empty entry. The importance matrix is ours; which tensor gets which type is llama.cpp's
decision but for the overrides. Truth: llama.h of llama-cpp-python 0.3.36."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from joulemark.errors import EngineFailed
from joulemark.gguf_format import FILE_TYPES
from joulemark_exporter import ggml
from joulemark_exporter.quantizers import ByEngine


def run(
    source: Path, target: Path, wanted: ByEngine, importance: Mapping[str, NDArray[np.float32]], threads: int
) -> None:
    """Writes `target`. `importance` by GGUF tensor name. Raises EngineFailed with llama.cpp's words."""
    import llama_cpp

    llama: Any = llama_cpp
    said: list[str] = []

    def hear(_level: int, text: bytes, _data: Any) -> None:
        said.append(text.decode(errors="replace"))
        del said[:-40]

    log = llama.llama_log_callback(hear)
    llama.llama_log_set(log, ctypes.c_void_p(0))
    parameters = llama.llama_model_quantize_default_params()
    parameters.nthread = threads
    parameters.ftype = next(number for number, name in FILE_TYPES.items() if name == wanted.file_type)
    parameters.pure = wanted.pure
    weights = _importance(llama, importance)
    overrides = _overrides(llama, wanted.tensors)
    parameters.imatrix = ctypes.cast(weights, type(parameters.imatrix)) if importance else None
    parameters.tt_overrides = ctypes.cast(overrides, type(parameters.tt_overrides)) if wanted.tensors else None
    try:
        code = llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    finally:
        # llama.cpp would keep a callback that is gone with this call; without one it writes to standard error.
        llama.llama_log_set(ctypes.cast(0, llama.llama_log_callback), ctypes.c_void_p(0))
    if code != 0:
        reason = " ".join("".join(said).split())[-400:]
        raise EngineFailed(
            f"llama.cpp could not quantize to {wanted.file_type}: {reason}",
            "choose another type, or calibrate for an importance matrix",
        )


def _importance(llama: Any, values: Mapping[str, NDArray[np.float32]]) -> Any:
    entries = (llama.llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
    for entry, (name, weights) in zip(entries, values.items(), strict=False):
        entry.name, entry.size = name.encode(), weights.size
        entry.data = weights.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


def _overrides(llama: Any, tensors: Mapping[str, str]) -> Any:
    entries = (llama.llama_cpp.llama_model_tensor_override * (len(tensors) + 1))()
    for entry, (pattern, type_name) in zip(entries, tensors.items(), strict=False):
        entry.pattern, entry.type = pattern.encode(), ggml.NUMBERS[type_name]
    return entries
