"""Files that are whole or not there, and what a killed writer leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from joulemark.durable import replace_file

SLOW = """
import sys, time
from pathlib import Path
from joulemark.durable import replace_file
def pieces():
    yield bytes(1000)
    print("writing", flush=True)
    time.sleep(60)
replace_file(Path(sys.argv[1]), pieces())
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of writing `model`, whose temporary file is old."""
    command = [sys.executable, "-c", SLOW, str(tmp_path / "model")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    (left,) = tmp_path.glob(".model.*")
    os.utime(left, (time.time() - 3600, time.time() - 3600))
    yield process
    process.kill()
    process.wait(10)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path, writer: subprocess.Popen[str]):
    (tmp_path / ".model.bak.abcdefgh").write_bytes(b"of another file")
    writer.send_signal(signal.SIGKILL)
    writer.wait(10)
    assert len(names(tmp_path)) == 2
    replace_file(tmp_path / "model", [b"whole"])
    assert names(tmp_path) == [".model.bak.abcdefgh", "model"] and (tmp_path / "model").read_bytes() == b"whole"


def test_a_living_writer_keeps_what_it_writes(tmp_path: Path, writer: subprocess.Popen[str]):
    replace_file(tmp_path / "model", [b"whole"])
    assert len(names(tmp_path)) == 2 and writer.poll() is None


def test_a_leftover_that_is_a_pipe_or_a_link_stops_nobody(tmp_path: Path):
    os.mkfifo(tmp_path / ".model.abcdefgh")
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / ".model.ijklmnop").symlink_to(tmp_path / "mine")
    long_ago = time.time() - 3600
    for left in (".model.abcdefgh", "mine"):
        os.utime(tmp_path / left, (long_ago, long_ago))
    replace_file(tmp_path / "model", [b"whole"])
    assert (tmp_path / "model").read_bytes() == b"whole" and (tmp_path / "mine").read_bytes() == b"mine"


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    replace_file(tmp_path / "model", [b"old"])

    def breaks() -> Iterator[bytes]:
        yield b"new"
        raise OSError(5, "pulled out")

    with pytest.raises(OSError, match="pulled out"):
        replace_file(tmp_path / "model", breaks())
    assert names(tmp_path) == ["model"] and (tmp_path / "model").read_bytes() == b"old"


def test_a_file_system_without_modes_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A FAT stick that root has mounted for everybody refuses chmod."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    replace_file(tmp_path / "model", [b"whole"])
    assert names(tmp_path) == ["model"]
