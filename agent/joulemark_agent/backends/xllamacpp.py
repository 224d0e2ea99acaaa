"""llama.cpp out of the `xllamacpp` wheel: GGUF files on the CPU of a machine that may not compile anything.

The wheel is binary for x86-64 and 64-bit ARM. It offers a server for whole answers, which is never started here; but it exports llama.cpp's
C interface, and through that every token is scored as by `llamacpp`. Its ARM build does without the dot products of newer processors:
boards that have them are better served by a wheel from `joulemark wheelhouse build`. Never reads a clock.
"""

from __future__ import annotations

import os
from pathlib import Path

from joulemark_agent.backends import Options, Session
from joulemark_agent.backends._llama_engine import Library, Model
from joulemark_agent.backends._llama_session import LlamaSession
from joulemark_agent.backends._xllamacpp_library import INSTALL, VERSION, load

FORMATS = ("gguf",)
MODULES = ("xllamacpp", "numpy")


def open_session(path: Path, options: Options) -> Session:
    """Load `path`. Raises MissingExtra without the engine, EngineFailed when it refuses the file."""
    return LlamaSession(Model(path, library()), options)


def library() -> Library:
    """The wheel's. Raises MissingExtra when it is not installed, is another version, or does not load."""
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # see `llamacpp`
    return Library(load(), "xllamacpp", f"xllamacpp {VERSION}", INSTALL)
