"""A board's disk image on this workstation: its partitions, and files put into them without root, without mounting, without loop devices.

Owns: finding the boot partition (FAT) and the root partition (ext4), reading and writing files there with mtools and debugfs, and reading
back what was written. Not aware of what the files mean. debugfs ends with status 0 whatever happens: only what is read back counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from joulemark.errors import BadInput, NoSpace, ToolFailed
from joulemark_deploy.digests import sha256_of
from joulemark_deploy.tools import run

_PROGRAMS = {
    "sfdisk": "fdisk",
    "mcopy": "mtools",
    "mmd": "mtools",
    "mdel": "mtools",
    "mtype": "mtools",
    "debugfs": "e2fsprogs",
}
_MOST_PARTITIONS = 128
_MOST_READ_BYTES = 1 << 20
_SECTOR_BYTES = 512
_EXT_MAGIC_AT, _EXT_MAGIC = 1024 + 56, b"\x53\xef"
_EXT_INCOMPATIBLE_AT, _EXT_NEEDS_RECOVERY = 1024 + 96, 0x4
_FAT_MARKS = ((82, b"FAT32   "), (54, b"FAT16   "))
_TIMEOUT_S = 600


@dataclass(frozen=True)
class Partition:
    """One partition; `name` is GPT's, empty elsewhere; `system` is what its first bytes say: fat, ext4 or nothing."""

    start_bytes: int
    size_bytes: int
    name: str
    system: str


class Files(Protocol):
    """The files of one partition. Paths are absolute and ours: plain characters, no blanks."""

    def read(self, path: str) -> bytes | None:
        """The content (the first MiB), None when there is no such file. A symbolic link at the end is not followed."""
        ...

    def write(self, path: str, content: bytes | Path, mode: int = 0o644) -> None:
        """Make or replace a file, and the folders above it, owned by root. Raises NoSpace, ToolFailed."""
        ...


class DiskImage:
    """An image in a file. Raises BadInput for what is none, ToolFailed where a program that works on images is missing."""

    def __init__(self, path: Path) -> None:
        for program, package in _PROGRAMS.items():
            if _program(program) is None:
                raise ToolFailed(f"{program} is not installed", f"on Debian and Ubuntu: sudo apt-get install {package}")
        self.path = path
        self.partitions = _partitions(path)

    def boot(self) -> FatFiles | None:
        """The first FAT partition: what a Raspberry Pi's firmware reads."""
        return next((FatFiles(self.path, found) for found in self.partitions if found.system == "fat"), None)

    def root(self) -> ExtFiles | None:
        """The system's root: the partition that NVIDIA names APP, else the largest ext4. Raises BadInput for an unclean one."""
        found = [partition for partition in self.partitions if partition.system == "ext4"]
        named = [partition for partition in found if partition.name == "APP"]
        chosen = named[0] if named else max(found, key=lambda partition: partition.size_bytes, default=None)
        if chosen is None:
            return None
        if _needs_recovery(self.path, chosen):
            raise BadInput(
                f"the root file system in {self.path} was not closed cleanly: its journal would undo what is written now",
                "use an image as its maker published it, or run e2fsck on the partition",
            )
        return ExtFiles(self.path, chosen)


class FatFiles:
    """Files of a FAT partition, by mtools. Names are found whatever their case, as the kernel does."""

    def __init__(self, image: Path, partition: Partition) -> None:
        self._options = ["-i", f"{image}@@{partition.start_bytes}"]

    def read(self, path: str) -> bytes | None:
        """See Files."""
        return _output([*_command("mtype"), *self._options, f"::{path}"])

    def write(self, path: str, content: bytes | Path, mode: int = 0o644) -> None:
        """See Files; FAT keeps no modes."""
        for folder in reversed(PurePosixPath(path).parents):
            # Fails for a folder that is there; whether it is shows when the file is written.
            if str(folder) != "/":
                _quietly([*_command("mmd"), "-D", "s", *self._options, f"::{folder}"])
        with _as_file(content) as source:
            try:
                run(
                    [*_command("mcopy"), "-o", "-m", *self._options, str(source), f"::{path}"],
                    f"{path} could not be put into the boot partition",
                    environment=_ENVIRONMENT,
                )
            except ToolFailed as error:
                if "full" in error.message.lower():
                    raise NoSpace(
                        f"the boot partition is full: {path} does not fit", "use an image with a larger boot partition"
                    ) from error
                raise
            _compare(source, _digest([*_command("mtype"), *self._options, f"::{path}"]), path)

    def remove(self, path: str) -> None:
        """Take a file away; it may be missing."""
        _quietly([*_command("mdel"), *self._options, f"::{path}"])


class ExtFiles:
    """Files of an ext4 partition, by debugfs."""

    def __init__(self, image: Path, partition: Partition) -> None:
        self._target = f"{image}?offset={partition.start_bytes}"

    def read(self, path: str) -> bytes | None:
        """See Files."""
        if self._kind(path) != "regular":
            return None
        return _output([*_command("debugfs"), "-R", f"cat {path}", self._target])

    def exists(self, path: str) -> bool:
        """Whether anything has this name: a file, a folder or a link."""
        return bool(self._kind(path))

    def link(self, path: str) -> str | None:
        """Where a symbolic link points, None when the path is none."""
        said = self._ask(f"stat {path}")
        if "Type: symlink" not in said:
            return None
        for line in said.splitlines():
            if line.startswith("Fast link dest:"):
                return line.partition('"')[2].rstrip('"')
        return (_output([*_command("debugfs"), "-R", f"cat {path}", self._target]) or b"").decode("utf-8", "replace")

    def write(self, path: str, content: bytes | Path, mode: int = 0o644) -> None:
        """See Files."""
        with _as_file(content) as source:
            commands = [f"rm {path}"] if self.exists(path) else []
            commands += [f'write "{source}" {path}', *self._owned(path, 0o100000 | mode)]
            self._change([*self._folders(path), *commands])
            _compare(source, _digest([*_command("debugfs"), "-R", f"cat {path}", self._target]), path)

    def make_link(self, path: str, target: str) -> None:
        """Make or replace a symbolic link."""
        commands = [f"rm {path}"] if self.exists(path) else []
        self._change([*self._folders(path), *commands, f"symlink {path} {target}", *self._owned(path, None)])
        if self.link(path) != target:
            raise ToolFailed(
                f"the link {path} could not be made in the image", "is the image damaged, or its disk full?"
            )

    def _folders(self, path: str) -> list[str]:
        missing = [str(folder) for folder in reversed(PurePosixPath(path).parents) if not self.exists(str(folder))]
        return [line for folder in missing for line in (f"mkdir {folder}", *self._owned(folder, 0o040755))]

    def _owned(self, path: str, mode: int | None) -> list[str]:
        """A file belongs to whoever ran the tool, unless told."""
        lines = [f"sif {path} uid 0", f"sif {path} gid 0"]
        return lines if mode is None else [*lines, f"sif {path} mode 0{mode:o}"]

    def _kind(self, path: str) -> str:
        said = self._ask(f"stat {path}")
        _, found, rest = said.partition("Type: ")
        return rest.split(maxsplit=1)[0] if found else ""

    def _ask(self, request: str) -> str:
        return (_output([*_command("debugfs"), "-R", request, self._target]) or b"").decode("utf-8", "replace")

    def _change(self, commands: Sequence[str]) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".debugfs") as script:
            script.write("\n".join(commands) + "\n")
            script.flush()
            run(
                [*_command("debugfs"), "-w", "-f", script.name, self._target],
                "the image's root file system could not be changed",
            )


_ENVIRONMENT: Mapping[str, str] = {**os.environ, "MTOOLSRC": os.devnull, "MTOOLS_SKIP_CHECK": "1", "LC_ALL": "C.UTF-8"}
"""Nobody's drive letters and preferences; a partition is taken for what its own first sector says."""


def _program(name: str) -> str | None:
    """These programs often lie where only root's PATH looks."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")


def _command(name: str) -> list[str]:
    return [_program(name) or name]


def _partitions(path: Path) -> tuple[Partition, ...]:
    said = run(
        [*_command("sfdisk"), "--json", str(path)],
        f"{path} has no partition table",
        "give the disk image itself: .img, or packed as .xz, .gz, .bz2 or .zip",
    )
    try:
        table = json.loads(said[said.index("{") :])["partitiontable"]
        sector = int(table.get("sectorsize", _SECTOR_BYTES))
        entries = [
            (int(entry["start"]) * sector, int(entry["size"]) * sector, str(entry.get("name", "")))
            for entry in table["partitions"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"the partition table of {path} cannot be read: {error}", "is the image complete?") from error
    size = path.stat().st_size
    for start, length, _ in entries[:_MOST_PARTITIONS]:
        if start + length > size:
            raise BadInput(
                f"{path} is cut off: a partition ends at {(start + length) / 1e6:.0f} MB, the file at {size / 1e6:.0f} MB",
                "fetch it again and compare its checksum",
            )
    return tuple(Partition(*entry, _system(path, entry[0])) for entry in entries[:_MOST_PARTITIONS])


def _system(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        first = file.read(4096)
    if any(first[at : at + len(mark)] == mark for at, mark in _FAT_MARKS) and first[510:512] == b"\x55\xaa":
        return "fat"
    return "ext4" if first[_EXT_MAGIC_AT : _EXT_MAGIC_AT + 2] == _EXT_MAGIC else ""


def _needs_recovery(path: Path, partition: Partition) -> bool:
    with path.open("rb") as file:
        file.seek(partition.start_bytes + _EXT_INCOMPATIBLE_AT)
        return bool(int.from_bytes(file.read(4), "little") & _EXT_NEEDS_RECOVERY)


@contextlib.contextmanager
def _printing(command: Sequence[str]) -> Generator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """A program and what it prints, piece by piece; it has ended afterwards."""
    with subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=dict(_ENVIRONMENT),
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout


def _output(command: Sequence[str]) -> bytes | None:
    """The first MiB that a program prints; None when it fails."""
    with _printing(command) as (process, printed):
        found = printed.read(_MOST_READ_BYTES)
        if len(found) == _MOST_READ_BYTES:
            process.kill()
            return found
    return found if process.returncode == 0 else None


def _quietly(command: Sequence[str]) -> None:
    subprocess.run(
        list(command),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=dict(_ENVIRONMENT),
        timeout=_TIMEOUT_S,
        check=False,
    )


@contextlib.contextmanager
def _as_file(content: bytes | Path) -> Generator[Path]:
    """The tools take files. What is secret lies in one that only its owner reads."""
    if isinstance(content, Path):
        yield content
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        yield Path(file.name)


def _digest(command: Sequence[str]) -> str:
    """The SHA-256 of all that a program prints."""
    digest = hashlib.sha256()
    with _printing(command) as (_, printed):
        while piece := printed.read(_MOST_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _compare(source: Path, digest: str, path: str) -> None:
    if sha256_of(source) != digest:
        raise ToolFailed(
            f"{path} reads back differently from what was put into the image", "is the image damaged, or its disk full?"
        )
