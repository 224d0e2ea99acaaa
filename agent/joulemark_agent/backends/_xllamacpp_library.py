"""The C interface of the llama.cpp inside the `xllamacpp` wheel, as ctypes objects under llama.h's names. Not a plug-in.

The wheel has no bindings of its own for it: what the backend needs is declared here, for exactly one version, because structures are
passed by value and grow between versions. Truth: llama.h in xllamacpp's source archive of that version (llama.cpp b11549).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from joulemark.errors import MissingExtra

VERSION = "2026.10.11549"
INSTALL = "install it with: pip install 'joulemark[xllamacpp]'"
_FILE = "xllamacpp.abi3.so"


class _ModelParameters(ctypes.Structure):
    """llama_model_params, by value."""

    _fields_: ClassVar = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


class _ContextParameters(ctypes.Structure):
    """llama_context_params, by value."""

    _fields_: ClassVar = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    ]


class _Batch(ctypes.Structure):
    """llama_batch, by value."""

    _fields_: ClassVar = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
_CONSTANTS = {"GGML_TYPE_F32": 0, "LLAMA_FLASH_ATTN_TYPE_DISABLED": 0}
# Name, result, arguments.
_FUNCTIONS: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("llama_backend_init", None, ()),
    ("llama_batch_free", None, (_Batch,)),
    ("llama_batch_init", _Batch, (c_int32, c_int32, c_int32)),
    ("llama_context_default_params", _ContextParameters, ()),
    ("llama_decode", c_int32, (c_void_p, _Batch)),
    ("llama_free", None, (c_void_p,)),
    ("llama_get_logits", POINTER(c_float), (c_void_p,)),
    ("llama_get_memory", c_void_p, (c_void_p,)),
    ("llama_init_from_model", c_void_p, (c_void_p, _ContextParameters)),
    ("llama_log_set", None, (_LOG_CALLBACK, c_void_p)),
    ("llama_memory_clear", None, (c_void_p, c_bool)),
    ("llama_memory_seq_cp", None, (c_void_p, c_int32, c_int32, c_int32, c_int32)),
    ("llama_memory_seq_rm", c_bool, (c_void_p, c_int32, c_int32, c_int32)),
    ("llama_model_default_params", _ModelParameters, ()),
    ("llama_model_desc", c_int32, (c_void_p, c_char_p, c_size_t)),
    ("llama_model_free", None, (c_void_p,)),
    ("llama_model_get_vocab", c_void_p, (c_void_p,)),
    ("llama_model_is_hybrid", c_bool, (c_void_p,)),
    ("llama_model_is_recurrent", c_bool, (c_void_p,)),
    ("llama_model_load_from_file", c_void_p, (c_char_p, _ModelParameters)),
    ("llama_model_meta_val_str", c_int32, (c_void_p, c_char_p, c_char_p, c_size_t)),
    ("llama_model_n_ctx_train", c_int32, (c_void_p,)),
    ("llama_model_n_embd", c_int32, (c_void_p,)),
    ("llama_model_n_head", c_int32, (c_void_p,)),
    ("llama_model_n_head_kv", c_int32, (c_void_p,)),
    ("llama_model_n_layer", c_int32, (c_void_p,)),
    ("llama_model_n_params", c_uint64, (c_void_p,)),
    ("llama_n_ctx", c_uint32, (c_void_p,)),
    ("llama_print_system_info", c_char_p, ()),
    ("llama_token_to_piece", c_int32, (c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool)),
    ("llama_tokenize", c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
    ("llama_vocab_bos", c_int32, (c_void_p,)),
    ("llama_vocab_eos", c_int32, (c_void_p,)),
    ("llama_vocab_get_add_bos", c_bool, (c_void_p,)),
    ("llama_vocab_get_text", c_char_p, (c_void_p, c_int32)),
    ("llama_vocab_is_eog", c_bool, (c_void_p, c_int32)),
    ("llama_vocab_n_tokens", c_int32, (c_void_p,)),
)
# What the library fills in by itself, from the first fields to the last: were a structure laid out in another way, they would not be here.
_MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "main_gpu": 0, "vocab_only": False, "use_extra_bufts": True}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_threads": 4, "n_threads_batch": 4, "rope_scaling_type": -1,
    "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1, "yarn_ext_factor": -1.0, "defrag_thold": -1.0, "type_k": 1,
    "type_v": 1, "embeddings": False, "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True, "kv_unified": False,
}  # fmt: skip


def load() -> SimpleNamespace:
    """The functions, with their types. Raises MissingExtra, saying what is in the way."""
    functions = SimpleNamespace(llama_log_callback=_LOG_CALLBACK, **_CONSTANTS)
    try:
        library = ctypes.CDLL(str(_find()))
        for name, result, arguments in _FUNCTIONS:
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(functions, name, function)
    except (OSError, AttributeError) as error:
        # The one library that it wants and a small system may lack.
        hint = "sudo apt-get install libgomp1" if "libgomp" in str(error) else INSTALL
        raise MissingExtra(f"the llama.cpp of xllamacpp {VERSION} cannot be loaded: {error}", hint) from error
    _check(functions.llama_model_default_params(), _MODEL_DEFAULTS)
    _check(functions.llama_context_default_params(), _CONTEXT_DEFAULTS)
    return functions


def _find() -> Path:
    try:
        installed = importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtra("xllamacpp is not installed", INSTALL) from error
    if installed != VERSION:
        raise MissingExtra(
            f"xllamacpp {installed} is installed, but only {VERSION}'s structures are known here", INSTALL
        )
    package = importlib.util.find_spec("xllamacpp")
    places = (package.submodule_search_locations if package else None) or []
    for place in places:
        if (path := Path(place) / _FILE).is_file():
            return path
    raise MissingExtra(f"xllamacpp {VERSION} is installed without {_FILE}", "reinstall it; " + INSTALL)


def _check(structure: ctypes.Structure, expected: dict[str, Any]) -> None:
    found = {name: getattr(structure, name) for name in expected}
    if found != expected:
        odd = ", ".join(f"{name} {found[name]}" for name in expected if found[name] != expected[name])
        raise MissingExtra(
            f"this build of xllamacpp {VERSION} lays out {type(structure).__name__.strip('_')} in another way: {odd}",
            "reinstall it from the package index; " + INSTALL,
        )
