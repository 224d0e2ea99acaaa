"""CPython 3.11 for 64-bit ARM with everything that it needs, its own C library included: it runs on any board, whatever its system is.

Owns: the pinned Debian 12 packages that it is made of, fetching them, and laying them out as one folder. Not aware of Joulemark.

    bin/python       a shell script that starts python3.11 through the folder's own loader; sys.executable is this script
    bin/python3.11   lib/ld-linux-aarch64.so.1   lib/*.so*   lib/python3.11/ (the standard library)   licences/

The loader is named explicitly and told where its libraries are, so that nothing of the board's own C library is used (Jetson Nano has
glibc 2.27, these need 2.36) and no variable leaks into programs that are started. Names in .local are not resolved: that module belongs to
the board's C library; say the host's address in numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import lzma
import os
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from joulemark.errors import DigestMismatch, Unavailable

VERSION = "3.11"
MIRRORS = (
    "http://deb.debian.org/{archive}/{path}",
    "http://snapshot.debian.org/archive/{archive}/20261129T000000Z/{path}",
)
"""Debian's own: the current archive, and the one that keeps what a newer version has replaced. What comes is compared with its sha256."""
_TIMEOUT_S = 60
_AR_MAGIC, _AR_HEADER = b"!<arch>\n", 60
_UNUSED = ("ensurepip", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtledemo", "test")


@dataclass(frozen=True)
class Package:
    """One Debian package: where it lies in which archive, its size and digest."""

    archive: str
    path: str
    size_bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """The package's name, without version."""
        return PurePosixPath(self.path).name.partition("_")[0].replace("%2b", "+")


PACKAGES = (
    Package(
        "debian-security",
        "pool/updates/main/p/python3.11/python3.11-minimal_3.11.2-6%2bdeb12u9_arm64.deb",
        1_861_676,
        "617855dbf3299e03873926c75d61feaf3d36924586aecc1951a0b965a95bc694",
    ),
    Package(
        "debian-security",
        "pool/updates/main/p/python3.11/libpython3.11-minimal_3.11.2-6%2bdeb12u9_arm64.deb",
        813_684,
        "dd9847d2f77c5a924b1d3dd953b81f161db9374c94d03b9216191925350928c3",
    ),
    Package(
        "debian-security",
        "pool/updates/main/p/python3.11/libpython3.11-stdlib_3.11.2-6%2bdeb12u9_arm64.deb",
        1_750_132,
        "9937cbe3f647aa89a590fec647438ce02098c113d1c6f70e4cb1230c368d42a4",
    ),
    Package(
        "debian",
        "pool/main/g/glibc/libc6_2.36-9%2bdeb12u14_arm64.deb",
        2_324_660,
        "01f4330719fd4f65580e16ea5a0527f372fca750e8f588d26deaf09f2d3b1cf4",
    ),
    Package(
        "debian",
        "pool/main/g/gcc-12/libgcc-s1_12.2.0-14%2bdeb12u1_arm64.deb",
        34_816,
        "576926b283613db80168ddf76380a3bd877602778cf0d226caa7bfbfa71eacf3",
    ),
    Package(
        "debian",
        "pool/main/g/gcc-12/libstdc%2b%2b6_12.2.0-14%2bdeb12u1_arm64.deb",
        556_608,
        "26e138c677a985775331373828a6c286c551ff397cb735d00e2383cb273d1cb2",
    ),
    Package(
        "debian-security",
        "pool/updates/main/o/openssl/libssl3_3.0.22-1%7edeb12u2_arm64.deb",
        1_829_128,
        "3d04ecd8d0f57fed50d205abaeedfcc84c1960073ea085719c00add44b0ccd7f",
    ),
    Package(
        "debian",
        "pool/main/s/sqlite3/libsqlite3-0_3.40.1-2%2bdeb12u2_arm64.deb",
        785_596,
        "a690f7f2aa6435bd1fd7cbbd2216acb9acbb8c48c9721f2c195766375439eb13",
    ),
    Package(
        "debian",
        "pool/main/z/zlib/zlib1g_1.2.13.dfsg-1_arm64.deb",
        82_744,
        "52b8b8a145bbe1956bba82034f77022cbef0c3d0885c9e32d9817a7932fe1913",
    ),
    Package(
        "debian",
        "pool/main/b/bzip2/libbz2-1.0_1.0.8-5%2bb1_arm64.deb",
        47_452,
        "d3a96ece03326498b39ff093a76800dfcbcb1d4049d6ae6e9f6fa1aa7a590ad6",
    ),
    Package(
        "debian-security",
        "pool/updates/main/x/xz-utils/liblzma5_5.4.1-1%2bdeb12u2_arm64.deb",
        199_704,
        "36358d245f246234721e6c1c2ee5d11a46c1c877023c63f7570df02cd79964f5",
    ),
    Package(
        "debian-security",
        "pool/updates/main/e/expat/libexpat1_2.5.0-1%2bdeb12u5_arm64.deb",
        91_748,
        "4a733e7f636de4a4483e3e5d7b02dc8e788b115361a04dd58df89461ce2ae65a",
    ),
    Package(
        "debian",
        "pool/main/libf/libffi/libffi8_3.4.4-1_arm64.deb",
        20_492,
        "80b5c36177dc0e29d531c7eddbed3cc7355cb490e49f8cfa5959572d161f27b3",
    ),
    Package(
        "debian",
        "pool/main/u/util-linux/libuuid1_2.38.1-5%2bdeb12u3_arm64.deb",
        28_532,
        "3b2d19df0f3190108cf54228c4cfc822226c06d8f3615a5ab16a7dffb1f58aed",
    ),
    Package(
        "debian",
        "pool/main/libx/libxcrypt/libcrypt1_4.4.33-2_arm64.deb",
        90_044,
        "eea0ad76ea5eb507127fea0c291622ea4ecdbb71c4b9a8ed9c76ae33fc1a0127",
    ),
)


def lay_out(folder: Path, cache: Path, progress: Callable[[int, int], None]) -> None:
    """Make the folder from the packages, fetched where the cache has none. Raises Unavailable, DigestMismatch."""
    total, done = sum(package.size_bytes for package in PACKAGES), 0
    for name in ("bin", "lib", "licences"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        with tarfile.open(fileobj=io.BytesIO(_content(fetched(package, cache)))) as archive:
            for member in archive:
                _place(archive, member, folder, package.name)
        done += package.size_bytes
        progress(done, total)
    (folder / "bin" / "python").write_text(_WRAPPER, "utf-8")
    (folder / "bin" / "python").chmod(0o755)


_WRAPPER = """#!/bin/sh
here=$(dirname -- "$(dirname -- "$(readlink -f -- "$0")")")
PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$here/site PYTHONNOUSERSITE=1
export PYTHONPATH PYTHONNOUSERSITE
exec "$here/lib/ld-linux-aarch64.so.1" --library-path "$here/lib" --argv0 "$0" "$here/bin/python3.11" "$@"
"""


def fetched(package: Package, cache: Path) -> Path:
    """The package's file in the cache. Raises Unavailable when no mirror has it, DigestMismatch for other bytes."""
    path = cache / "debian" / f"{package.sha256[:16]}-{package.name}.deb"
    if path.is_file() and _is(path.read_bytes(), package):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    reasons: list[str] = []
    for mirror in MIRRORS:
        place = mirror.format(archive=package.archive, path=package.path)
        try:
            with urllib.request.urlopen(place, timeout=_TIMEOUT_S) as answer:
                content = answer.read(package.size_bytes + 1)
        except (OSError, urllib.error.URLError) as error:
            reasons.append(f"{place}: {error}")
            continue
        if len(content) < package.size_bytes:
            reasons.append(f"{place}: it ended after {len(content)} of {package.size_bytes} bytes")
            continue
        if not _is(content, package):
            raise DigestMismatch(f"{place} is not the pinned file", "a proxy may have changed it; try again elsewhere")
        temporary = path.with_suffix(f".{os.getpid()}.part")
        temporary.write_bytes(content)
        temporary.replace(path)
        return path
    raise Unavailable(f"{package.name} could not be fetched: {'; '.join(reasons)}", "check the network, and try again")


def _is(content: bytes, package: Package) -> bool:
    return len(content) == package.size_bytes and hashlib.sha256(content).hexdigest() == package.sha256


def _content(path: Path) -> bytes:
    """The tar file inside a .deb (an ar archive with data.tar.xz)."""
    data = path.read_bytes()
    place = len(_AR_MAGIC)
    while place + _AR_HEADER <= len(data):
        name = data[place : place + 16].decode("ascii").strip().rstrip("/")
        size = int(data[place + 48 : place + 58])
        place += _AR_HEADER
        if name == "data.tar.xz":
            return lzma.decompress(data[place : place + size])
        place += size + size % 2
    raise DigestMismatch(f"{path.name} has no data.tar.xz", "this is a defect of the pinned list: report it")


def _place(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, package: str) -> None:
    """Put one file of a package where it belongs, or leave it out."""
    path = PurePosixPath(member.name.removeprefix("./"))
    target = next(_target(path, package), None)
    if target is None or not (member.isfile() or member.issym()):
        return
    place = folder / target
    place.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        place.unlink()
    if member.issym():
        # Only links inside one folder, as libraries have them (libz.so.1 → libz.so.1.2.13).
        if "/" not in member.linkname:
            place.symlink_to(member.linkname)
    else:
        file = archive.extractfile(member)
        assert file is not None
        place.write_bytes(file.read())
        place.chmod(0o755 if member.mode & 0o100 else 0o644)


def _target(path: PurePosixPath, package: str) -> Iterator[str]:
    parts = path.parts
    if path.name == "copyright":
        yield f"licences/{package}"
    elif parts[:3] == ("usr", "lib", "python3.11") and not (len(parts) > 3 and parts[3] in _UNUSED):
        yield "/".join(("lib", *parts[2:]))
    elif path == PurePosixPath("usr/bin/python3.11"):
        yield "bin/python3.11"
    elif parts[:2] in (("lib", "aarch64-linux-gnu"), ("usr", "lib")) and ".so" in path.name and len(parts) in (3, 4):
        yield f"lib/{path.name}"
