"""Packing a release: the same content is the same file, whenever and by whomever it was packed."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from joulemark.errors import BadInput
from joulemark_deploy import release
from joulemark_deploy.targets import target_for_processor
from tests.fixtures import card_images


def tree(folder: Path, names: list[str], time_s: int) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        os.utime(path, (time_s, time_s))
    (folder / "lib/link").symlink_to("liba.so")
    os.utime(folder / "lib", (time_s, time_s))
    return folder


def test_the_same_content_is_the_same_file(tmp_path: Path) -> None:
    names = ["release.json", "bin/joulemark", "lib/liba.so", "lib/libb.so", "site/package/module.py"]
    release._pack(tree(tmp_path / "one", names, 1_000_000), tmp_path / "one.tar.gz")  # pyright: ignore[reportPrivateUsage]
    release._pack(tree(tmp_path / "two", names[::-1], 2_000_000), tmp_path / "two.tar.gz")  # pyright: ignore[reportPrivateUsage]
    assert (tmp_path / "one.tar.gz").read_bytes() == (tmp_path / "two.tar.gz").read_bytes()
    with tarfile.open(tmp_path / "one.tar.gz") as archive:
        members = archive.getmembers()
    # The board reads what the file is for from its beginning, without unpacking it.
    assert members[0].name == "release.json"
    assert {(member.uid, member.gid, member.uname, member.mtime) for member in members} == {(0, 0, "", 0)}
    assert next(member for member in members if member.name == "lib/link").linkname == "liba.so"


def test_whatever_the_umask_was_the_service_can_read_it(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        made = tree(tmp_path / "tree", ["release.json", "bin/joulemark", "lib/liba.so", "lib/libb.so"], 1)
        (made / "bin/joulemark").chmod(0o700)
        release._pack(made, tmp_path / "packed.tar.gz")  # pyright: ignore[reportPrivateUsage]
    finally:
        os.umask(before)
    with tarfile.open(tmp_path / "packed.tar.gz") as archive:
        modes = {member.name: member.mode for member in archive}
    assert modes["bin"] == modes["lib"] == modes["bin/joulemark"] == 0o755
    assert modes["release.json"] == modes["lib/liba.so"] == 0o644


def test_the_fast_engine_goes_to_processors_that_have_all_that_it_uses() -> None:
    """Compiled for a Cortex-A76 it has LRCPC and atomics in it, which a processor with dot products may lack (Kunpeng 920)."""
    a76 = 0x119FFB  # what its kernel says
    assert target_for_processor(a76).name == "arm64-dotprod"
    for bit in (8, 9, 10, 15, 20):
        assert target_for_processor(a76 & ~(1 << bit)).name == "arm64"


def test_what_is_no_release_is_refused(tmp_path: Path) -> None:
    assert release.read(card_images.pretended_release(tmp_path)).instruction_set == "armv8.0"
    (tmp_path / "other").write_text("x")
    for path in (tmp_path / "other", tmp_path / "none"):
        with pytest.raises(BadInput, match="no release of Joulemark"):
            release.read(path)
