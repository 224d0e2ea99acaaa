"""A release: Joulemark with an engine for the board's processor and a Python of its own, in one file. It needs nothing of the system.

    joulemark-0.1.0-armv8.0.tar.gz
      release.json   what it is for
      bin/joulemark  bin/python          the command; the interpreter (portable_python.py)
      lib/           site/               C libraries and standard library; Joulemark and what it needs
      what the service needs (files.SERVICE_FILES)  requirements.txt  licences/

Owns: putting these together, reproducibly (sorted, no times, no owners). Not aware of how it gets onto a board. The packages are those of a
wheelhouse for Python 3.11; byte code is compiled here when this Python is of the same version, so that a slow board need not.
"""

from __future__ import annotations

import compileall
import gzip
import hashlib
import json
import os
import py_compile
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from joulemark.errors import BadInput
from joulemark_deploy import cross_engine, portable_python, wheelhouse
from joulemark_deploy.digests import sha256_of
from joulemark_deploy.files import SERVICE_FILES, deploy_file
from joulemark_deploy.one_builder import one_builder
from joulemark_deploy.targets import Target
from joulemark_deploy.tools import pip, run

MANIFEST = "release.json"
_COMMAND = '#!/bin/sh\nexec "$(dirname -- "$(readlink -f -- "$0")")/python" -P -m joulemark "$@"\n'
"""-P: not from the folder that somebody calls it in, who may be root."""
_FORMAT = 2
"""Counts up when the same packages are packed in another way."""
_MOST_MANIFEST_BYTES = 65_536
_NOT_NEEDED = (
    "bin", "hf_xet", "huggingface_hub", "llama_cpp/include", "llama_cpp/lib/cmake", "llama_cpp/lib/pkgconfig", "numpy/**/tests",
    "onnxruntime/datasets", "onnxruntime/quantization", "onnxruntime/tools", "onnxruntime/transformers",
)  # fmt: skip
"""Nothing that the agent imports: a third of the size."""
Tell = Callable[[str], None]


class Release(BaseModel):
    """What a release is for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_number: Literal[1] = 1
    arch: Literal["aarch64"] = "aarch64"
    instruction_set: str
    hwcap: Annotated[int, Field(ge=0)]
    """Bits of AT_HWCAP that the board's processor must have."""
    joulemark: str
    engine: str
    python: str


def current(target: Target, cache: Path, tell: Tell, progress: cross_engine.Progress) -> Path:
    """The release of this very program for that instruction set: from the cache, or made now."""
    wheels = cache / "wheelhouses" / f"{target.instructions.name}-{portable_python.VERSION}"
    wheelhouse.current(target, wheels, portable_python.VERSION, cache, tell, progress)
    made = wheelhouse.read(wheels)
    key = _key(wheels)
    out = cache / "releases" / key / f"joulemark-{made.joulemark}-{target.instructions.name}.tar.gz"
    with one_builder(out.parent):
        if not out.exists():
            shutil.rmtree(out.parent, ignore_errors=True)
            build(target, wheels, out, cache, tell, progress)
    return out


def build(target: Target, wheels: Path, out: Path, cache: Path, tell: Tell, progress: cross_engine.Progress) -> Release:
    """Make the file `out` from a wheelhouse; it appears complete or not at all. Raises BadInput for a wheelhouse that does not fit."""
    made = wheelhouse.read(wheels)
    if portable_python.VERSION not in made.pythons or made.instruction_set != target.instructions.name:
        hint = f"joulemark wheelhouse build --target {target.name} --python {portable_python.VERSION}"
        raise BadInput(f"{wheels} has no wheels for {target.name} and Python {portable_python.VERSION}", hint)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        tree = Path(temporary) / "tree"
        tell("Python for the board")
        portable_python.lay_out(tree, cache, progress)
        tell("Joulemark and what it needs")
        requirements = wheels / f"requirements-cp{portable_python.VERSION.replace('.', '')}.txt"
        _install_packages(wheels, requirements, tree / "site")
        release = Release(
            instruction_set=made.instruction_set,
            hwcap=made.hwcap,
            joulemark=made.joulemark,
            engine=made.engine,
            python=portable_python.VERSION,
        )
        (tree / MANIFEST).write_text(json.dumps(release.model_dump(mode="json"), indent=2) + "\n", "utf-8")
        (tree / "bin" / "joulemark").write_text(_COMMAND, "utf-8")
        (tree / "bin" / "joulemark").chmod(0o755)
        shutil.copy(requirements, tree / "requirements.txt")
        for name in SERVICE_FILES:
            shutil.copy(deploy_file(name), tree / name)
        tell("packing")
        packed = Path(temporary) / out.name
        _pack(tree, packed)
        packed.replace(out)
    return release


def read(path: Path) -> Release:
    """What a release file says it is for. Raises BadInput for what is none."""
    try:
        with tarfile.open(path) as archive:
            member = archive.next()
            file = archive.extractfile(member) if member is not None and member.name == MANIFEST else None
            if file is None:
                raise BadInput(f"{path} is no release of Joulemark", "`joulemark release build` makes one")
            return Release.model_validate_json(file.read(_MOST_MANIFEST_BYTES))
    except (OSError, tarfile.TarError, EOFError, ValidationError) as error:
        raise BadInput(f"{path} is no release of Joulemark: {error}", "`joulemark release build` makes one") from error


def _key(wheels: Path) -> str:
    """Names a release by all that goes into it."""
    digest = hashlib.sha256((wheels / wheelhouse.MANIFEST).read_bytes())
    for name in SERVICE_FILES:
        digest.update(deploy_file(name).read_bytes())
    digest.update(repr((_FORMAT, portable_python.PACKAGES, sys.version_info[:2], _COMMAND, _NOT_NEEDED)).encode())
    return digest.hexdigest()[:16]


def _install_packages(wheels: Path, requirements: Path, site: Path) -> None:
    tag = portable_python.VERSION.replace(".", "")
    command = pip("install", "-q", "--no-compile", "--no-index", "--no-deps")
    command += ["--require-hashes", "--only-binary", ":all:", "--find-links", str(wheels), "--target", str(site)]
    command += ["--python-version", portable_python.VERSION, "--implementation", "cp"]
    command += [part for name in (f"cp{tag}", "abi3", "none") for part in ("--abi", name)]
    command += [part for name in wheelhouse.platforms(portable_python.VERSION) for part in ("--platform", name)]
    run([*command, "-r", str(requirements)], "the release's packages could not be put together")
    for pattern in _NOT_NEEDED:
        for path in site.glob(pattern):
            shutil.rmtree(path)
    _link_equal(site / "llama_cpp" / "lib")
    if f"{sys.version_info[0]}.{sys.version_info[1]}" == portable_python.VERSION:
        # Checked by nobody on the board: the release is replaced as a whole.
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        compileall.compile_dir(site, quiet=2, workers=os.cpu_count() or 1, stripdir=str(site), invalidation_mode=mode)


def _link_equal(folder: Path) -> None:
    """Wheels cannot hold links: each library of the engine is there three times."""
    first: dict[str, Path] = {}
    for path in sorted(folder.glob("*.so*"), key=lambda path: len(path.name)):
        digest = sha256_of(path)
        if digest in first:
            path.unlink()
            path.symlink_to(first[digest].name)
        else:
            first[digest] = path


def _pack(tree: Path, out: Path) -> None:
    """The manifest first, then everything by name; no times, no owners: the same content is the same file."""
    paths = [tree / MANIFEST, *sorted(path for path in tree.rglob("*") if path != tree / MANIFEST)]
    with (
        out.open("wb") as file,
        gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive,
    ):
        for path in paths:
            archive.add(path, str(path.relative_to(tree)), recursive=False, filter=_anonymous)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    # Not what the umask here made of it: the service is another user than who unpacks it.
    member.mode = 0o777 if member.issym() else 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    return member
