"""Builds the llama-cpp-python wheel once for this machine and installs it; afterwards the wheel comes from the user's cache.

llama-cpp-python has no binary wheel. Left alone, pip builds parts that nobody loads here (half of the time) and keeps nothing that a second
environment could use. Standard library only: it runs before anything is installed.

usage: python deploy/build_engine.py [--cache DIR] [--no-install]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VERSION = "0.3.36"
OPTIONS = Path(__file__).resolve().parent / "engine_only.cmake"
_STEP = re.compile(rb"\[(\d+)/(\d+)\]")


def cpu_flags() -> str:
    """What `-march=native` depends on; a wheel built for one processor must not be taken for another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def cache_key() -> str:
    """Names the wheel by everything that went into it."""
    parts = (VERSION, OPTIONS.read_text(), cpu_flags(), platform.machine(), platform.libc_ver()[1])
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def default_cache() -> Path:
    """The user's cache folder."""
    base = os.environ.get("JOULEMARK_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "joulemark"


def build(folder: Path) -> Path:
    """Build the wheel into `folder` with all cores; returns its path. Exits with the compiler's last words on failure."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        sys.exit(
            "no C++ compiler was found\n  hint: install one, on Debian and Ubuntu: sudo apt-get install g++; or take a binary engine, "
            "somewhat slower: pip install 'joulemark[agent,xllamacpp]', deploy/install.sh --binary-engine"
        )
    environment = dict(os.environ)
    environment["CMAKE_BUILD_PARALLEL_LEVEL"] = str(len(os.sched_getaffinity(0)))
    environment["CMAKE_ARGS"] = f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={OPTIONS} -DGGML_NATIVE=ON"
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-cache-dir"]
    command += ["--no-binary", "llama-cpp-python", "-w", str(folder), f"llama-cpp-python=={VERSION}"]
    started = time.monotonic()
    tail: list[bytes] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            tail = [*tail[-60:], line]
            show_progress(line, started)
    clear_progress()
    if process.returncode != 0:
        sys.stderr.buffer.write(b"".join(tail))
        sys.exit("the engine could not be built; the compiler's last lines are above")
    say(f"built llama-cpp-python {VERSION} in {time.monotonic() - started:.0f} s")
    return next(folder.glob("llama_cpp_python-*.whl"))


def show_progress(line: bytes, started: float) -> None:
    """A bar on a terminal, a line every tenth of the way elsewhere."""
    step = _STEP.search(line)
    if step is None:
        return
    done, total = int(step[1]), int(step[2])
    text = f"building the engine: {done}/{total} files, {time.monotonic() - started:.0f} s"
    if sys.stderr.isatty():
        filled = 30 * done // total
        sys.stderr.write(f"\r  [{'#' * filled}{'.' * (30 - filled)}] {text}")
        sys.stderr.flush()
    elif done % max(1, total // 10) == 0:
        say(f"  {text}")


def clear_progress() -> None:
    """End the bar's line."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")


def say(text: str) -> None:
    """A line for the person who waits."""
    sys.stderr.write(text + "\n")


def installed() -> bool:
    """Whether this environment has the engine: the right version, which can be loaded, without the kernels that OPTIONS leaves out."""
    code = f"""
import importlib.metadata, sys
from llama_cpp import llama_cpp
right = importlib.metadata.version("llama-cpp-python") == "{VERSION}"
sys.exit(not right or b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info())
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def main() -> None:
    """Find or build the wheel, then install it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where built wheels are kept")
    parser.add_argument("--no-install", action="store_true", help="only build; print the wheel's path")
    options = parser.parse_args()
    if installed() and not options.no_install:
        return
    folder = options.cache / "wheels" / cache_key()
    wheel = next(iter(folder.glob("llama_cpp_python-*.whl")), None)
    if wheel is None:
        say("building the llama.cpp engine once for this processor (2 to 10 minutes; kept for next time)")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = build(Path(temporary))
            wheel = built.replace(folder / built.name)
    if options.no_install:
        sys.stdout.write(f"{wheel}\n")
        return
    for more in ([], ["--force-reinstall", "--no-deps"]):  # pip takes one of the same version for the same one
        install = [sys.executable, "-m", "pip", "install", "-q", *more, str(wheel)]
        if (code := subprocess.run(install, check=False).returncode) != 0:
            sys.exit(code)
        if installed():
            return
    sys.exit(
        f"{wheel} was installed but cannot be used\n  hint: remove the file and run this again; `joulemark doctor` says more"
    )


if __name__ == "__main__":
    main()
