"""Bringing files to a board over a connection that breaks: `ssh` is a script here that does what ssh does with a shell on this machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from joulemark.errors import BadInput, ToolFailed
from joulemark_deploy import remote
from joulemark_deploy.remote import Board

_SSH = r"""#!/bin/sh
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    [ "$1" = -O ] && exit 0
    shift
done
shift 2
case $1 in
*"tar -xf"*)
    echo >> "$LOG"
    n=$(wc -l < "$LOG")
    mode=$(sed -n "${n}p" "$PLAN")
    ;;
*) mode=whole ;;
esac
case ${mode:-whole} in
whole) exec sh -c "$1" ;;
cut-*) head -c "${mode#cut-}" | sh -c "$1" 2>/dev/null; echo "Connection reset by peer" >&2; exit 255 ;;
spoil) sh -c "$1" && for file in "$THERE"/*; do printf x >> "$file"; done ;;
esac
"""


class Line:
    """The connection: what happens at each try, and what was sent."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        programs = tmp_path / "programs"
        programs.mkdir()
        (programs / "ssh").write_text(_SSH, "utf-8")
        (programs / "ssh").chmod(0o755)
        self.there, self._plan, self._log = tmp_path / "there", tmp_path / "plan", tmp_path / "log"
        self.waits: list[float] = []
        for name, value in {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PLAN": str(self._plan),
            "LOG": str(self._log),
            "THERE": str(self.there),
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(remote.time, "sleep", self.waits.append)
        self.files = []
        for name, size in (("first.whl", 300_000), ("second.whl", 200_000), ("third.whl", 0)):
            path = tmp_path / name
            path.write_bytes(os.urandom(size))
            self.files.append(path)

    def bring(self, *tries: str) -> list[set[str]]:
        """Bring all files with these fates; which names each try began to send."""
        self._plan.write_text("".join(f"{each}\n" for each in tries), "utf-8")
        self._log.unlink(missing_ok=True)
        begun: list[set[str]] = []
        before: list[int] = []

        def sent(path: Path, done: int, total: int) -> None:
            if not begun or total != before[-1]:
                begun.append(set())
                before.append(total)
            begun[-1].add(path.name)

        with Board("pi@board") as board:
            board.bring(self.files, str(self.there), sent)
        return begun

    def tries(self) -> int:
        """How often files were sent."""
        return len(self._log.read_text("utf-8").splitlines()) if self._log.exists() else 0


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    return Line(tmp_path, monkeypatch)


def _assert_whole(line: Line) -> None:
    for path in line.files:
        assert (line.there / path.name).read_bytes() == path.read_bytes()


def test_files_arrive_whole_and_private_and_are_not_sent_again(line: Line) -> None:
    line.bring()
    _assert_whole(line)
    assert line.there.stat().st_mode & 0o777 == 0o700
    assert all((line.there / path.name).stat().st_mode & 0o777 == 0o600 for path in line.files)
    assert line.bring() == []
    assert line.tries() == 0


def test_a_board_that_speaks_another_language_is_understood(line: Line, tmp_path: Path) -> None:
    program = tmp_path / "programs" / "sha256sum"
    real = shutil.which("sha256sum")
    program.write_text(
        f'#!/bin/sh\n[ "$LC_ALL" = C ] || exec sh -c \'{real} "$@" | sed "s/: OK$/: Réussi/"\' - "$@"\nexec {real} "$@"\n'
    )
    program.chmod(0o755)
    line.bring()
    _assert_whole(line)
    assert line.bring() == [] and line.tries() == 0


def test_a_connection_that_breaks_goes_on_with_what_is_lacking(line: Line) -> None:
    begun = line.bring("cut-400000")
    _assert_whole(line)
    assert line.tries() == 2
    assert begun[0] >= {"first.whl", "second.whl"}
    assert begun[1] == {"second.whl"}  # and the third, of which nothing is to be read
    assert line.waits == [2.0]


def test_one_that_always_breaks_is_said_with_its_words_and_keeps_what_is_whole(line: Line) -> None:
    with pytest.raises(ToolFailed, match=r"could not be brought to pi@board: Connection reset by peer"):
        line.bring(*["cut-400000"] + ["cut-1000"] * 3)
    assert (line.there / "first.whl").read_bytes() == line.files[0].read_bytes()
    assert line.waits == [2.0, 4.0, 8.0]


def test_what_arrives_otherwise_than_it_was_sent_is_found(line: Line) -> None:
    with pytest.raises(
        ToolFailed, match=r"what arrived at pi@board is not what was sent: first\.whl, second\.whl, third\.whl"
    ):
        line.bring(*["spoil"] * 4)


@pytest.mark.parametrize("name", ["", "-oProxyCommand=sh", "pi@-host", "pi@host;sh", "pi@host name", "a" * 400])
def test_what_is_no_address_never_reaches_ssh(name: str) -> None:
    with pytest.raises(BadInput, match=r"is no user@address"):
        Board(name)
