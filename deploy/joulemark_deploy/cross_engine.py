"""Builds llama-cpp-python for ARM boards on this workstation: zig as the cross compiler, nothing of the board needed.

Owns: the build's environment and options, and the cache of built wheels. Not aware of boards: it is given an instruction set.

zig (PyPI `ziglang`) brings compiler, C library headers of every glibc, and a static C++ library, so that the wheel runs from glibc 2.27
on, and needs no libstdc++ and no libgomp on the board. It refuses `-march=armv8-a`; what the kernels may use is therefore said with
`-mcpu`, and to ggml-cpu alone: the second instruction set compiles only that again. Everything lies in the cache; a second call takes no
time.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from joulemark_deploy.files import deploy_file
from joulemark_deploy.one_builder import one_builder
from joulemark_deploy.targets import GLIBC_FLOOR, InstructionSet
from joulemark_deploy.tools import pip, run

VERSION = "0.3.36"
TOOLS = ("ziglang==0.17.1", "scikit-build-core==1.1.2", "cmake==4.4.5", "ninja==1.13.2")
_STEP = re.compile(rb"^\[(\d+)/(\d+)\]")
_WHEEL = "llama_cpp_python-*.whl"
Progress = Callable[[int, int], None]


def wheel_for(instructions: InstructionSet, cache: Path, progress: Progress) -> Path:
    """The wheel of this instruction set, from the cache or built now (minutes). Raises ToolFailed with the compiler's last words."""
    folder = cache / "wheels" / f"aarch64-{instructions.name}-{_key(instructions)}"
    work = cache / "cross"
    with one_builder(work):
        built = next(iter(folder.glob(_WHEEL)), None)
        if built is not None:
            return built
        work.mkdir(parents=True, exist_ok=True)
        python = _environment(work)
        source = _source(work, python)
        made = _build(work, python, source, instructions, progress)
        folder.mkdir(parents=True, exist_ok=True)
        return made.replace(folder / made.name)


def _key(instructions: InstructionSet) -> str:
    """Names the wheel by everything that goes into it."""
    options = deploy_file("engine_only.cmake").read_text("utf-8")
    parts = (VERSION, *TOOLS, options, str(GLIBC_FLOOR), instructions.name, str(instructions.cpu))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _environment(work: Path) -> Path:
    """A virtual environment with the pinned tools; its Python."""
    folder = work / f"tools-{hashlib.sha256(' '.join(TOOLS).encode()).hexdigest()[:8]}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        run([sys.executable, "-m", "venv", str(folder)], "the build's environment could not be made")
        run(pip("install", "-q", *TOOLS, python=python), "the build's tools could not be installed")
        (folder / "complete").touch()
    return python


def _source(work: Path, python: Path) -> Path:
    """The unpacked source distribution, always in the same place: so that a second build compiles only what differs."""
    folder = work / f"llama_cpp_python-{VERSION}"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        download = pip("download", "-q", "--no-deps", "--no-build-isolation", python=python)
        download += ["--no-binary", "llama-cpp-python", "-d", str(work), f"llama-cpp-python=={VERSION}"]
        run(download, "the engine's source could not be fetched")
        archive = work / f"llama_cpp_python-{VERSION}.tar.gz"
        with tarfile.open(archive) as packed:
            packed.extractall(work, filter="data")
        archive.unlink()
        (folder / "complete").touch()
    return folder


def _toolchain(work: Path, python: Path) -> Path:
    """CMake's description of zig as a cross compiler, and the four programs that it names."""
    folder = work / "toolchain"
    folder.mkdir(exist_ok=True)
    target = f"aarch64-linux-gnu.{GLIBC_FLOOR[0]}.{GLIBC_FLOOR[1]}"
    zig = f"exec {shlex.quote(str(python))} -m ziglang"
    programs = {"cc": f"cc -target {target}", "c++": f"c++ -target {target}", "ar": "ar", "ranlib": "ranlib"}
    for name, arguments in programs.items():
        path = folder / f"zig-{name}"
        path.write_text(f'#!/bin/sh\n{zig} {arguments} "$@"\n', "utf-8")
        path.chmod(0o755)
    description = folder / "aarch64.cmake"
    lines = [
        "set(CMAKE_SYSTEM_NAME Linux)",
        "set(CMAKE_SYSTEM_PROCESSOR aarch64)",
        f'set(CMAKE_C_COMPILER "{folder}/zig-cc")',
        f'set(CMAKE_CXX_COMPILER "{folder}/zig-c++")',
        f'set(CMAKE_AR "{folder}/zig-ar")',
        f'set(CMAKE_RANLIB "{folder}/zig-ranlib")',
        "set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)",
    ]
    description.write_text("\n".join(lines) + "\n", "utf-8")
    return description


def _options(work: Path, instructions: InstructionSet) -> Path:
    """What is read after the project's first line: engine_only.cmake, and the processor of the kernels alone."""
    path = work / "toolchain" / "options.cmake"
    text = f'include("{deploy_file("engine_only.cmake")}")\n'
    if instructions.cpu is not None:
        text += f"cmake_language(DEFER CALL target_compile_options ggml-cpu PRIVATE -mcpu={instructions.cpu})\n"
    path.write_text(text, "utf-8")
    return path


def _build(work: Path, python: Path, source: Path, instructions: InstructionSet, progress: Progress) -> Path:
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    definitions = {
        "CMAKE_TOOLCHAIN_FILE": _toolchain(work, python),
        "CMAKE_PROJECT_llama_cpp_INCLUDE": _options(work, instructions),
        "GGML_NATIVE": "OFF",
        "GGML_OPENMP": "OFF",
    }
    environment = {
        **os.environ,
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        "CMAKE_BUILD_PARALLEL_LEVEL": str(len(os.sched_getaffinity(0))),
        "CMAKE_ARGS": " ".join(f"-D{name}={value}" for name, value in definitions.items()),
        "ZIG_GLOBAL_CACHE_DIR": str(work / "zig-cache"),
    }
    command = pip("wheel", "-v", "--no-build-isolation", "--no-deps", python=python)
    command += ["--no-cache-dir", "-w", str(out), "-C", f"build-dir={work / 'build'}", str(source)]

    def tell(line: bytes) -> None:
        if step := _STEP.match(line.lstrip()):
            progress(int(step[1]), int(step[2]))

    run(command, f"the engine could not be built for {instructions.name}", environment=environment, each_line=tell)
    return next(out.glob(_WHEEL))
