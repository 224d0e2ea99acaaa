"""A folder of wheels that one kind of board installs from without a compiler, an index, or a network.

    wheelhouse-pi4/
      wheelhouse.json             what it is for, and every file with size and sha256
      requirements-cp311.txt      exact versions with the hash of the one wheel that is here; one file a Python
      *.whl

Owns: resolving, fetching, checking and publishing such a folder. Not aware of how wheels get onto a board.

uv resolves: pip's own `--python-version` reads the markers of the Python that runs it, so that `exceptiongroup` is missing for 3.10 when
3.11 resolves (tried). pip fetches, with the hashes that uv wrote down. A wheel that the board cannot run is an error here and not there.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from joulemark.errors import BadInput, Conflict, NotFound
from joulemark_deploy import cross_engine, elf
from joulemark_deploy.digests import sha256_of
from joulemark_deploy.files import checkout
from joulemark_deploy.one_builder import one_builder
from joulemark_deploy.targets import INSTRUCTION_SETS, Target
from joulemark_deploy.tools import pip, run

EXTRAS = ("agent", "llama", "onnx", "pi", "meters")
GLIBC = {"3.10": (2, 35), "3.11": (2, 36), "3.13": (2, 41)}
"""By Python version, of the systems that bring it along: JetPack 6, Raspberry Pi OS bookworm and trixie."""
MANIFEST = "wheelhouse.json"
_MACHINE = "EM_AARCH64"
_NEWEST_OF_UV = 40
_OLDEST_MANYLINUX, _NAMED = 17, ("manylinux2014_aarch64", "linux_aarch64")
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([A-Za-z0-9._+!-]+)", re.MULTILINE)
_MOST_MANIFEST_BYTES = 1024 * 1024
Tell = Callable[[str], None]


class WheelFile(BaseModel):
    """One wheel of the folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+!-]{0,200}\.whl$")]
    size_bytes: Annotated[int, Field(gt=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Wheelhouse(BaseModel):
    """What the folder is for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_number: Literal[1] = 1
    target: str
    arch: Literal["aarch64"] = "aarch64"
    instruction_set: str
    hwcap: Annotated[int, Field(ge=0)]
    """Bits of AT_HWCAP that the board's processor must have."""
    joulemark: str
    engine: str
    pythons: dict[str, tuple[str, ...]]
    """By Python version, the names of its wheels."""
    files: tuple[WheelFile, ...]


def build(
    target: Target,
    out: Path,
    pythons: Sequence[str],
    cache: Path,
    own_wheel: Path | None,
    tell: Tell,
    progress: cross_engine.Progress,
) -> Wheelhouse:
    """Make the folder `out`; it appears complete or not at all. Raises Conflict when it is there, BadInput for a wheel that cannot run."""
    if out.exists():
        raise Conflict(f"{out} is there already", "remove it, or choose another folder with --out")
    unknown = [python for python in pythons if python not in GLIBC]
    if unknown or not pythons:
        raise BadInput(f"no wheels for Python {', '.join(unknown) or '(none)'}", f"known: {', '.join(GLIBC)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary) / "wheels"
        folder.mkdir()
        tell(f"engine for {target.instructions.name}")
        engine = cross_engine.wheel_for(target.instructions, cache, progress)
        shutil.copy2(engine, folder / engine.name)
        tell("joulemark's own wheel")
        own = _own_wheel(own_wheel, folder)
        by_python: dict[str, tuple[str, ...]] = {}
        for python in pythons:
            tell(f"wheels for Python {python}")
            by_python[python] = _collect(folder, Path(temporary), python, own, engine)
        _refuse_misfits(folder, by_python, target)
        made = Wheelhouse(
            target=target.name,
            instruction_set=target.instructions.name,
            hwcap=target.instructions.hwcap,
            joulemark=_version(own),
            engine=cross_engine.VERSION,
            pythons=by_python,
            files=tuple(_described(path) for path in sorted(folder.glob("*.whl"))),
        )
        (folder / MANIFEST).write_text(json.dumps(made.model_dump(mode="json"), indent=2) + "\n", "utf-8")
        folder.rename(out)
    return made


def current(
    target: Target, folder: Path, python: str, cache: Path, tell: Tell, progress: cross_engine.Progress
) -> Path:
    """`folder` with wheels of this very program for one Python: the one that is there, or a new one in its place."""
    with tempfile.TemporaryDirectory() as temporary, one_builder(folder):
        tell("joulemark's own wheel")
        own = _own_wheel(None, Path(temporary))
        if (folder / MANIFEST).exists():
            made = read(folder)
            digests = {entry.name: entry.sha256 for entry in made.files}
            if (
                digests.get(own.name) == sha256_of(own)
                and made.instruction_set == target.instructions.name
                and not faults(folder)
            ):
                return folder
            shutil.rmtree(folder)
        build(target, folder, (python,), cache, own, tell, progress)
    return folder


def read(folder: Path) -> Wheelhouse:
    """The folder's manifest. Raises NotFound, BadInput; the files are looked at by `faults`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise NotFound(f"{folder} is no wheelhouse: it has no {MANIFEST}", "`joulemark wheelhouse build` makes one")
    try:
        with path.open("rb") as file:
            return Wheelhouse.model_validate_json(file.read(_MOST_MANIFEST_BYTES))
    except (OSError, ValidationError) as error:
        raise BadInput(f"{path} cannot be used: {error}", "build the wheelhouse again") from error


def faults(folder: Path, target: Target | None = None) -> list[str]:
    """What is wrong with the folder: files that are missing or changed, and wheels that the target cannot run."""
    made = read(folder)
    found: list[str] = []
    for entry in made.files:
        path = folder / entry.name
        if not path.is_file():
            found.append(f"{entry.name} is missing")
        elif path.stat().st_size != entry.size_bytes or sha256_of(path) != entry.sha256:
            found.append(f"{entry.name} was changed since it was built")
    present = [entry.name for entry in made.files if (folder / entry.name).is_file()]
    instructions = target.instructions if target is not None else INSTRUCTION_SETS.get(made.instruction_set)
    if instructions is None:
        return [*found, f"the instruction set {made.instruction_set!r} is unknown"]
    for python, names in made.pythons.items():
        for name in names:
            if name in present:
                glibc = GLIBC.get(python, (2, 35))
                found += [f"{name}, {why}" for why in elf.misfits(folder / name, _MACHINE, instructions, glibc)]
    return list(dict.fromkeys(found))


# --- collecting -------------------------------------------------------------------------------------------------------
def _own_wheel(given: Path | None, folder: Path) -> Path:
    if given is not None:
        if not given.is_file() or given.suffix != ".whl":
            raise NotFound(
                f"{given} is no wheel", "give joulemark's own wheel: `pip wheel --no-deps .` in a checkout makes it"
            )
        shutil.copy2(given, folder / given.name)
        return folder / given.name
    source = checkout()
    if source is None:
        raise NotFound(
            "joulemark runs from an installed package: its own wheel is not at hand",
            "name it with --joulemark FILE.whl",
        )
    command = pip("wheel", "-q", "--no-deps", "-w", str(folder), str(source))
    run(command, "joulemark's own wheel could not be built")
    return next(folder.glob("joulemark-*.whl"))


def _collect(folder: Path, work: Path, python: str, own: Path, engine: Path) -> tuple[str, ...]:
    """Resolve and fetch for one Python, and write its requirements; the names of its wheels."""
    wanted, lock = work / "wanted.txt", work / f"lock-{python}.txt"
    wanted.write_text(f"joulemark[{','.join(EXTRAS)}] @ {own.resolve().as_uri()}\n", "utf-8")
    platform = f"aarch64-manylinux_2_{min(GLIBC[python][1], _NEWEST_OF_UV)}"
    resolve = [sys.executable, "-m", "uv", "pip", "compile", "-q", "--no-header", "--no-annotate", "--generate-hashes"]
    resolve += ["--only-binary", ":all:", "--python-version", python, "--python-platform", platform]
    resolve += ["--find-links", str(engine.parent), "-o", str(lock), str(wanted)]
    run(resolve, f"the wheels for Python {python} could not be resolved")
    locked = lock.read_text("utf-8")
    pins = {_normal(name): version for name, version in _PINNED.findall(locked)}
    pins.pop("joulemark", None)
    pins.pop("llama-cpp-python", None)
    kept = _blocks(locked, set(pins))
    lock.write_text("".join(kept), "utf-8")
    fetched = work / f"fetched-{python}"
    tag = python.replace(".", "")
    fetch = pip("download", "-q", "--no-deps", "--require-hashes")
    fetch += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python, "-d", str(fetched)]
    fetch += [part for name in (f"cp{tag}", "abi3", "none") for part in ("--abi", name)]
    fetch += [part for name in platforms(python) for part in ("--platform", name)]
    run([*fetch, "-r", str(lock)], f"the wheels for Python {python} could not be fetched")
    names = [own.name, engine.name]
    for path in sorted(fetched.glob("*.whl")):
        names.append(path.name)
        path.replace(folder / path.name)
    (folder / f"requirements-cp{tag}.txt").write_text("".join(_requirements(folder, names)), "utf-8")
    return tuple(names)


def _blocks(locked: str, wanted: set[str]) -> Iterator[str]:
    """The lock's entries, each a line with its continuation lines, of the wanted packages."""
    keep = False
    for line in locked.splitlines(keepends=True):
        if not line[0].isspace():
            matched = _PINNED.match(line)
            keep = matched is not None and _normal(matched[1]) in wanted
        if keep:
            yield line


def platforms(python: str) -> tuple[str, ...]:
    """pip's names for what a system with this Python can load, the newest first."""
    newest = GLIBC[python][1]
    return (*(f"manylinux_2_{minor}_aarch64" for minor in range(newest, _OLDEST_MANYLINUX - 1, -1)), *_NAMED)


def _requirements(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """pip's hash-checking lines for exactly these files."""
    for name in names:
        project, version = name.split("-")[:2]
        yield f"{_normal(project)}=={version} --hash=sha256:{sha256_of(folder / name)}\n"


def _refuse_misfits(folder: Path, by_python: dict[str, tuple[str, ...]], target: Target) -> None:
    for python, names in by_python.items():
        for name in names:
            why = elf.misfits(folder / name, _MACHINE, target.instructions, GLIBC[python])
            if why:
                hint = "this is a defect of the build or of the wheel: report it"
                raise BadInput(f"{name} would not run on {target.name} with Python {python}: {why[0]}", hint)


def _normal(name: str) -> str:
    """A project's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(own: Path) -> str:
    return own.name.split("-")[1]


def _described(path: Path) -> WheelFile:
    return WheelFile(name=path.name, size_bytes=path.stat().st_size, sha256=sha256_of(path))
