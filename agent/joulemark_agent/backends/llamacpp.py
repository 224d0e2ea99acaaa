"""The llama.cpp backend: GGUF files on the CPU through llama-cpp-python. Never reads a clock."""

from __future__ import annotations

import os
from pathlib import Path

from joulemark.errors import MissingExtra
from joulemark_agent.backends import Options, Session
from joulemark_agent.backends._llama_engine import Library, Model
from joulemark_agent.backends._llama_session import LlamaSession

FORMATS = ("gguf",)
MODULES = ("llama_cpp", "numpy")


def open_session(path: Path, options: Options) -> Session:
    """Load `path`. Raises MissingExtra without the engine, EngineFailed when it refuses the file."""
    return LlamaSession(Model(path, library()), options)


def library() -> Library:
    """llama-cpp-python's. Raises MissingExtra when it is not installed or its library does not load."""
    install = (
        "install it with: pip install 'joulemark[llama]' (or `make install`, which builds it once and keeps the wheel)"
    )
    # On an abort ggml would start a debugger to print a backtrace; on a board that costs a minute and helps nobody.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingExtra(f"the llama.cpp engine cannot be loaded: {error}", install) from error
    return Library(llama_cpp.llama_cpp, "llamacpp", f"llama-cpp-python {llama_cpp.__version__}", install)
