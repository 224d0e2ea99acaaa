"""Which engines this machine can load, found out in a short child process each: an engine that crashes takes nobody along."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from joulemark_agent.findings import Finding

_ENGINE_PATIENCE_S = 60.0


@dataclass(frozen=True)
class _Engine:
    """`source` prints what is installed, as JSON; `opens` is what cannot be evaluated without it, or another engine that opens it."""

    source: str
    package: str
    opens: str
    fix: str


_ENGINES = {
    "llama.cpp": _Engine(
        """
import json
from llama_cpp import __version__, llama_cpp
print(json.dumps({"version": __version__, "build": llama_cpp.llama_print_system_info().decode()}))
""",
        "llama-cpp-python",
        "GGUF files",
        "pip install 'joulemark[llama]', or `make install` in a checkout, which builds the engine once; "
        "where nothing can be compiled: pip install 'joulemark[xllamacpp]'",
    ),
    "xllamacpp": _Engine(
        """
import json, xllamacpp
from joulemark_agent.backends.xllamacpp import VERSION, library
print(json.dumps({"version": VERSION, "build": library().functions.llama_print_system_info().decode()}))
""",
        "xllamacpp",
        "GGUF files",
        "pip install 'joulemark[xllamacpp]'",
    ),
    "onnxruntime": _Engine(
        """
import json
import onnxruntime, tokenizers
print(json.dumps({"version": onnxruntime.__version__, "build": onnxruntime.get_build_info()}))
""",
        "onnxruntime",
        "ONNX artifacts",
        "pip install 'joulemark[onnx]'",
    ),
}


_CRASHING = re.compile(r"\bAMX_INT8 = 1\b")
"""In an engine's own words about its build."""


def python_child(source: str) -> str:
    """What `source` prints in a new interpreter. Raises OSError or subprocess.SubprocessError when it does not end
    well."""
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_ENGINE_PATIENCE_S,
        check=True,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )
    return done.stdout


def engines(run_child: Callable[[str], str]) -> Iterator[Finding]:
    """One finding an engine that is installed, one for what no installed engine opens, and a problem when none can be used. `run_child`
    runs Python source and gives its output."""
    found = {name: _engine(f"engine {name}", engine, run_child) for name, engine in _ENGINES.items()}
    missing = {name: finding for name, finding in found.items() if finding.status == "warning"}
    opened = {_ENGINES[name].opens for name in found.keys() - missing.keys()}
    for name, finding in found.items():
        if name in missing:
            if _ENGINES[name].opens in opened:
                continue
            opened.add(_ENGINES[name].opens)
        yield finding
    if all(finding.status != "ok" for finding in found.values()):
        yield Finding("engines", "problem", "none can be used: nothing can be evaluated", _ENGINES["llama.cpp"].fix)


def _engine(area: str, engine: _Engine, run_child: Callable[[str], str]) -> Finding:
    try:
        facts: Any = json.loads(run_child(engine.source).strip().rpartition("\n")[2])
        text = f"{engine.package} {facts['version']}; {' '.join(str(facts['build']).split())}"
    except subprocess.CalledProcessError as error:
        return _failed_engine(area, engine, error)
    except subprocess.TimeoutExpired:
        return Finding(
            area, "problem", f"it did not load within {_ENGINE_PATIENCE_S:g} s", "reinstall it: " + engine.fix
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        return Finding(area, "unknown", f"it could not be examined: {type(error).__name__}: {error}")
    if _CRASHING.search(text):
        fix = "build it without them: `make install` in a checkout, or pip with CFLAGS and CXXFLAGS=-U__AMX_INT8__"
        return Finding(area, "problem", f"its AMX kernels crash with some models (llama.cpp #20824): {text}", fix)
    return Finding(area, "ok", text)


def _failed_engine(area: str, engine: _Engine, error: subprocess.CalledProcessError) -> Finding:
    said = [line.strip() for line in (error.stderr or "").strip().splitlines()]
    last = "; ".join(said[-2:] if said and said[-1].startswith("hint: ") else said[-1:])[:600]
    if error.returncode < 0:
        fix = "it was built for another processor: rebuild it on this machine, " + engine.fix
        return Finding(area, "problem", f"it ended with signal {-error.returncode} while it was loaded. {last}", fix)
    if "ModuleNotFoundError" in last:
        return Finding(area, "warning", f"it is not installed: {engine.opens} cannot be evaluated", engine.fix)
    return Finding(area, "problem", f"it cannot be loaded: {last}", "reinstall it: " + engine.fix)
