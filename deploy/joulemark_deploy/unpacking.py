"""A board's image, plain or packed, as a file of its own that may be changed. What packs it is told from its first bytes, not its name.

Owns: xz, gzip, bzip2 and zip of one image, bounds on what comes out, the comparison with a published checksum. Not aware of partitions.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import hmac
import lzma
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO

from joulemark.errors import BadInput, DigestMismatch, NoSpace, NotFound

_PIECE_BYTES = 4 << 20
_RESERVE_BYTES = 1 << 30
_MOST_BYTES = 64 << 30
_SECTOR_BYTES = 512
_ZSTANDARD = b"\x28\xb5\x2f\xfd"
Progress = Callable[[int, int], None]
"""(bytes of the source that were read, bytes that it has)"""


def unpack(source: Path, out: Path, published: str | None, progress: Progress) -> None:
    """Write the image that is in `source` to the new file `out`, leaving holes where it has zeros.

    `published` is the SHA-256 of `source` that its maker names. Raises NotFound, BadInput for what is damaged or no image, DigestMismatch,
    NoSpace when less than 1 GiB of disk would be left.
    """
    try:
        size = source.stat().st_size
        file = source.open("rb")
    except OSError as error:
        raise NotFound(f"{source} cannot be read: {error.strerror}", "give the path of an image") from error
    with file:
        if published is not None:
            _compare(file, source, published)
        read = _Counted(file, size, progress)
        try:
            with _plain(read, source) as image, out.open("xb") as target:
                _copy(image, target, out)
            progress(size, size)
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, OSError) as error:
            if isinstance(error, NoSpace):
                raise
            raise BadInput(
                f"{source} cannot be unpacked: {error}", "fetch it again and compare its checksum (--sha256)"
            ) from error


class _Counted:
    """A file that tells how much of it was read."""

    def __init__(self, file: IO[bytes], size: int, progress: Progress) -> None:
        self._file, self._size, self._progress = file, size, progress

    def read(self, size: int = -1) -> bytes:
        piece = self._file.read(size)
        self._progress(min(self._file.tell(), self._size), self._size)
        return piece

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


@contextlib.contextmanager
def _plain(file: _Counted, source: Path) -> Generator[IO[bytes]]:
    first = file.read(8)
    file.seek(0)
    if first.startswith(b"\xfd7zXZ\0"):
        with lzma.open(file) as image:  # pyright: ignore[reportArgumentType,reportCallIssue]
            yield image
    elif first.startswith(b"\x1f\x8b"):
        with gzip.open(file) as image:  # pyright: ignore[reportArgumentType,reportCallIssue]
            yield image  # pyright: ignore[reportReturnType]
    elif first.startswith(b"BZh"):
        with bz2.open(file) as image:  # pyright: ignore[reportArgumentType,reportCallIssue]
            yield image  # pyright: ignore[reportReturnType]
    elif first.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(file) as archive, archive.open(_only_image(archive, source)) as image:  # pyright: ignore[reportArgumentType]
            yield image
    elif first.startswith(_ZSTANDARD):
        raise BadInput(f"{source} is packed with Zstandard", f"zstd -d {source}, then give what comes out")
    else:
        yield file  # pyright: ignore[reportReturnType]


def _only_image(archive: zipfile.ZipFile, source: Path) -> zipfile.ZipInfo:
    found = [member for member in archive.infolist() if member.filename.endswith((".img", ".raw"))]
    if len(found) != 1:
        raise BadInput(f"{source} holds {len(found)} images", "unpack it and give the image that is meant")
    return found[0]


def _compare(file: IO[bytes], source: Path, published: str) -> None:
    digest = hashlib.sha256()
    while piece := file.read(_PIECE_BYTES):
        digest.update(piece)
    file.seek(0)
    if not hmac.compare_digest(digest.hexdigest(), published.strip().lower()):
        raise DigestMismatch(f"{source} has the SHA-256 {digest.hexdigest()}, not the one given", "fetch it again")


def _copy(image: IO[bytes], target: IO[bytes], out: Path) -> None:
    done = 0
    while piece := image.read(_PIECE_BYTES):
        done += len(piece)
        if done > _MOST_BYTES:
            raise BadInput(
                f"what comes out is larger than {_MOST_BYTES >> 30} GiB", "that is no image of a board's card"
            )
        if piece.strip(b"\0"):
            if shutil.disk_usage(out.parent).free < len(piece) + _RESERVE_BYTES:
                raise NoSpace(
                    f"{out.parent} has less than {(_RESERVE_BYTES >> 30) + 1} GB left",
                    "make room there, or set TMPDIR to another disk",
                )
            target.write(piece)
        else:
            target.seek(len(piece), os.SEEK_CUR)
    if done == 0 or done % _SECTOR_BYTES:
        raise BadInput(f"what comes out has {done} bytes: no disk has that size", "give the image of a whole card")
    target.truncate(done)
