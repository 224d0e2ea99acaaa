"""Fetching Debian's packages: mirrors that are down, cut answers, other bytes, a damaged cache. The mirrors are folders here."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from joulemark.errors import DigestMismatch, Unavailable
from joulemark_deploy import portable_python
from joulemark_deploy.portable_python import Package, fetched

CONTENT = b"!<arch>\n" + bytes(range(256)) * 40
PACKAGE = Package("debian", "pool/libx_1%2b2_arm64.deb", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def mirrors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two mirrors' files, not there yet."""
    places = [tmp_path / name / "libx_1+2_arm64.deb" for name in ("near", "far")]
    for place in places:
        place.parent.mkdir()
    urls = tuple(f"file://{place.parent}/{{path}}" for place in places)
    monkeypatch.setattr(
        portable_python, "MIRRORS", tuple(url.replace("{path}", "libx_1%2b2_arm64.deb") for url in urls)
    )
    return places


def test_it_is_fetched_once(mirrors: list[Path], tmp_path: Path) -> None:
    mirrors[0].write_bytes(CONTENT)
    path = fetched(PACKAGE, tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    mirrors[0].unlink()
    assert fetched(PACKAGE, tmp_path / "cache") == path
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_mirror_that_is_down_or_cut_short_is_passed_over(mirrors: list[Path], tmp_path: Path) -> None:
    mirrors[1].write_bytes(CONTENT)
    assert fetched(PACKAGE, tmp_path / "one").read_bytes() == CONTENT
    mirrors[0].write_bytes(CONTENT[:1000])
    assert fetched(PACKAGE, tmp_path / "two").read_bytes() == CONTENT


def test_all_reasons_are_said_when_none_has_it(mirrors: list[Path], tmp_path: Path) -> None:
    mirrors[1].write_bytes(CONTENT[:1000])
    with pytest.raises(Unavailable, match=r"near/.*No such file.*far/.*it ended after 1000 of 10248 bytes"):
        fetched(PACKAGE, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.deb"))


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT + b"x"])
def test_other_bytes_are_refused_and_not_kept(content: bytes, mirrors: list[Path], tmp_path: Path) -> None:
    mirrors[0].write_bytes(content)
    with pytest.raises(DigestMismatch, match=r"is not the pinned file"):
        fetched(PACKAGE, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.deb*"))


def test_a_damaged_file_in_the_cache_is_fetched_again(mirrors: list[Path], tmp_path: Path) -> None:
    mirrors[0].write_bytes(CONTENT)
    path = fetched(PACKAGE, tmp_path / "cache")
    path.write_bytes(CONTENT[:500])
    assert fetched(PACKAGE, tmp_path / "cache").read_bytes() == CONTENT
