"""Whether a board can run a wheel: the machine of its libraries, the glibc they need, the instructions of our own kernels.

Owns: reading ELF files inside a wheel, with bounds, and saying what does not fit. Not aware of how the wheel came about. Files are read
with pyelftools, instructions decoded with capstone; nothing is loaded or run.

Libraries of others choose their instructions when they run (numpy, onnxruntime), so that finding one says nothing. Only libraries that
choose nothing are decoded: ggml's kernels, `libggml-cpu`.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

from joulemark.errors import BadInput
from joulemark_deploy.targets import InstructionSet

_MOST_BYTES = 512 * 1024 * 1024
_MOST_FILES = 20_000
_MOST_VERSIONS = 500
_DECODED = "libggml-cpu"
_DOTPROD = frozenset({"sdot", "udot"})
_I8MM = frozenset({"smmla", "ummla", "usmmla", "usdot", "sudot"})
_BF16 = frozenset({"bfdot", "bfmmla", "bfmlalb", "bfmlalt"})
_HALF = frozenset({"fmla", "fmls", "fmul", "fadd", "fsub", "fmax", "fmin", "fmaxnm", "fminnm", "fabs", "fneg"})


@dataclass(frozen=True)
class Library:
    """One ELF file of a wheel. `glibc` is the newest version that it asks for; `extensions` those that its code uses, None: not decoded."""

    path: str
    machine: str
    glibc: tuple[int, int] | None
    extensions: frozenset[str] | None


def libraries(wheel: Path) -> list[Library]:
    """The ELF files of a wheel. Raises BadInput for what is no wheel, or larger than any."""
    found: list[Library] = []
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = archive.infolist()
            if len(entries) > _MOST_FILES or sum(entry.file_size for entry in entries) > _MOST_BYTES:
                raise BadInput(f"{wheel.name} is larger than any wheel for a board", "use the wheel that pip downloads")
            for entry in entries:
                with archive.open(entry) as file:
                    if file.read(4) != b"\x7fELF":
                        continue
                found.append(_library(entry.filename, archive.read(entry)))
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:  # the second: a compression that zipfile lacks
        raise BadInput(f"{wheel.name} is no wheel: {error}", "download or build it again") from error
    except (ELFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError) as error:
        raise BadInput(f"{wheel.name} holds a library that cannot be read: {error}", "build it again") from error
    return found


def misfits(wheel: Path, machine: str, instructions: InstructionSet, glibc: tuple[int, int]) -> list[str]:
    """Why a board of this machine (`EM_AARCH64`), instruction set and glibc cannot run the wheel; empty when it can."""
    return [
        f"{library.path}: {why}"
        for library in libraries(wheel)
        for why in _misfits(library, machine, instructions, glibc)
    ]


def _misfits(library: Library, machine: str, instructions: InstructionSet, glibc: tuple[int, int]) -> Iterator[str]:
    if library.machine != machine:
        yield f"it is for {library.machine}, the board is {machine}"
        return
    if library.glibc is not None and library.glibc > glibc:
        yield f"it needs glibc {_dotted(library.glibc)}, the board has {_dotted(glibc)}"
    beyond = sorted((library.extensions or frozenset()) - instructions.extensions)
    if beyond:
        yield f"its code uses {', '.join(beyond)}, which {instructions.name} has not: it would die with SIGILL"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _library(path: str, content: bytes) -> Library:
    elf = ELFFile(io.BytesIO(content))
    machine = str(elf["e_machine"])
    decode = machine == "EM_AARCH64" and Path(path).name.startswith(_DECODED)
    return Library(path, machine, _glibc(elf), _extensions(elf) if decode else None)


def _glibc(elf: ELFFile) -> tuple[int, int] | None:
    """The newest GLIBC_x.y among the needed symbol versions."""
    versions: list[tuple[int, int]] = []
    for section in elf.iter_sections():
        if isinstance(section, GNUVerNeedSection):
            # Both counts come from the file, and their next pointers may lead in circles.
            for _, needed in islice(section.iter_versions(), _MOST_VERSIONS):
                for version in islice(needed, _MOST_VERSIONS):
                    name, _, number = str(version.name).partition("_")
                    parts = number.split(".")
                    if name == "GLIBC" and len(parts) >= 2 and all(part.isdecimal() for part in parts[:2]):
                        versions.append((int(parts[0]), int(parts[1])))
    return max(versions, default=None)


def _extensions(elf: ELFFile) -> frozenset[str]:
    """Which extensions of ARMv8.0 the code uses."""
    import capstone

    engine: Any = capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_LITTLE_ENDIAN)
    engine.skipdata = True
    found: set[str] = set()
    for section in elf.iter_sections():
        if section["sh_type"] == "SHT_PROGBITS" and section["sh_flags"] & 4:  # SHF_EXECINSTR
            for _, _, mnemonic, operands in engine.disasm_lite(section.data(), section["sh_addr"]):
                if mnemonic in _DOTPROD:
                    found.add("dotprod")
                elif mnemonic in _I8MM:
                    found.add("i8mm")
                elif mnemonic in _BF16:
                    found.add("bf16")
                elif mnemonic in _HALF and (".8h" in operands or ".4h" in operands):
                    found.add("fp16")
                elif operands.startswith("z") and operands[1:2].isdecimal():
                    found.add("sve")
    return frozenset(found)
