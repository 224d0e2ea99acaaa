"""deploy/privileges.sh: whoever may ask root for a power mode gets that and nothing else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fixtures.root_helper import SCRIPT, environment


def ask(question: bytes, folder: Path) -> tuple[int, str, list[str]]:
    """Status, output, and what nvpmodel was called with."""
    called = folder / "called"
    (folder / "nvpmodel").write_text(
        f'#!/bin/sh\necho "$@" >>{called}\nread -r answer || echo "restart? no answer"\nexit 3\n'
    )
    (folder / "nvpmodel").chmod(0o755)
    command = ["sh", str(SCRIPT), "power-mode"]
    done = subprocess.run(
        command, input=question, env=environment(folder), capture_output=True, check=False, timeout=20
    )
    return done.returncode, done.stdout.decode(), called.read_text().splitlines() if called.exists() else []


@pytest.mark.parametrize("question", [b"2", b"2\n", b"0", b"1234\n"])
def test_a_number_is_nvpmodels_and_nobody_says_yes_to_a_restart(question: bytes, tmp_path: Path) -> None:
    assert ask(question, tmp_path) == (3, "restart? no answer\n", [f"-m {question.decode().strip()}"])


@pytest.mark.parametrize(
    "question",
    [b"", b"\n", b"-1", b"12345", b"2 -f x", b"2;id", b"2\n3\n", b"$(id)", b"\x00\xff", b"2" * 1_000_000, "२".encode()],
)
def test_anything_else_is_refused(question: bytes, tmp_path: Path) -> None:
    assert ask(question, tmp_path) == (2, "no number of a power mode\n", [])


@pytest.mark.parametrize("words", [[], ["everything"]])
def test_it_does_what_it_is_named_for_and_no_more(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", str(SCRIPT), *words], env=environment(tmp_path), capture_output=True, check=False, timeout=20
    )
    assert done.returncode == 2 and b"usage" in done.stderr
