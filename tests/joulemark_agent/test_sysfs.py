"""Reading kernel files: every way of having no value has its own reason, and none of them is 0."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from joulemark_agent import sysfs
from joulemark_agent.sysfs import NO_READING, KeptFile, Unreadable, entries, read_number, read_text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("abc\n", "not a number"),
        ("nan\n", "not a number"),
        ("inf\n", "not a number"),
        ("-256000\n", "sentinel"),
        ("12 34\n", "not a number"),
    ],
)
def test_a_file_without_a_number_says_why(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "value"
    path.write_text(content)
    once = read_number(path, sentinels=(NO_READING,))
    assert isinstance(once, Unreadable)
    assert once.reason == reason
    kept = KeptFile(path, sentinels=(NO_READING,))
    assert kept.number() is None
    assert kept.last is not None
    assert kept.last.reason == reason
    assert kept.failures == 1
    kept.close()


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOENT, "not there"),
        (errno.ENODEV, "not there"),
        (errno.ESRCH, "not there"),
        (errno.EACCES, "not permitted"),
        (errno.EPERM, "not permitted"),
        (errno.EIO, "read error"),
        (errno.EREMOTEIO, "read error"),
    ],
)
def test_an_errno_becomes_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str) -> None:
    path = tmp_path / "value"
    path.write_text("5\n")
    kept = KeptFile(path)
    assert kept.number() == 5.0

    def refuse(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(sysfs.os, "pread", refuse)
        assert kept.number() is None
    assert kept.last == Unreadable(str(path), reason, errno.errorcode[number])  # type: ignore[arg-type]
    assert kept.number() == 5.0, "it comes back when the device does"
    assert kept.failures == 1
    kept.close()


def test_a_kept_file_shows_new_values_and_notices_deletion_and_return(tmp_path: Path) -> None:
    path = tmp_path / "value"
    path.write_text("1\n")
    kept = KeptFile(path)
    assert kept.number() == 1.0
    path.write_text("22\n")
    assert kept.number() == 22.0
    path.unlink()
    assert kept.number() is None
    assert kept.last is not None
    assert kept.last.reason == "not there"
    path.write_text("3\n")
    assert kept.number() == 3.0
    explanation = kept.explanation()
    assert explanation is not None
    assert explanation.startswith("1 reads gave nothing")
    kept.close()


def test_real_proc_files_read_anew_through_one_descriptor() -> None:
    kept = KeptFile(Path("/proc/self/stat"))
    first = kept.read()
    sum(range(10_000_000))  # uses a clock tick of processor time
    second = kept.read()
    kept.close()
    assert isinstance(first, bytes)
    assert isinstance(second, bytes)
    assert first != second


def test_missing_text_and_folder(tmp_path: Path) -> None:
    missing = read_text(tmp_path / "none")
    assert isinstance(missing, Unreadable)
    assert missing.reason == "not there"
    assert entries(tmp_path / "none") == []


def test_entries_are_in_numeric_order(tmp_path: Path) -> None:
    for name in ("zone10", "zone2", "zone1", "other"):
        (tmp_path / name).mkdir()
    assert [path.name for path in entries(tmp_path)] == ["other", "zone1", "zone2", "zone10"]
