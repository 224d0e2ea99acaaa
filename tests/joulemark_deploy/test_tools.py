"""Other people's programs: what they said becomes ours when they fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from joulemark.errors import ToolFailed
from joulemark_deploy.tools import pip, run


def test_what_it_printed_and_each_line_are_given() -> None:
    lines: list[bytes] = []
    said = run(["sh", "-c", "echo one; echo two >&2"], "it failed", each_line=lines.append)
    assert said.splitlines() == ["one", "two"]
    assert lines == [b"one\n", b"two\n"]


def test_its_last_words_and_exit_status_are_in_the_error() -> None:
    with pytest.raises(ToolFailed, match=r"(?s)the build broke \(exit status 7\):.*no space left"):
        run(["sh", "-c", "echo no space left; exit 7"], "the build broke")


def test_one_that_is_not_installed() -> None:
    with pytest.raises(ToolFailed, match=r"no-such-program-here cannot be started"):
        run(["no-such-program-here"], "it failed")


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_one_that_ends_without_reading_its_input(size: int) -> None:
    """As ssh does when the board is not there: its words count, not that the pipe broke."""
    with pytest.raises(ToolFailed, match=r"could not resolve hostname"):
        run(["sh", "-c", "exec <&-; echo could not resolve hostname; exit 255"], "no board", stdin=b"x" * size)


def test_pip_is_that_of_the_python_that_is_named(tmp_path: Path) -> None:
    assert pip("install", "-q")[:4] == [sys.executable, "-m", "pip", "install"]
    assert pip("wheel", python=tmp_path / "python")[0] == str(tmp_path / "python")
