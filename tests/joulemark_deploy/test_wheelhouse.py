"""What a wheelhouse takes in. That a real one is whole and runs is shown in tests/boards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from joulemark.errors import BadInput, Conflict
from joulemark_deploy import cross_engine, wheelhouse
from joulemark_deploy.targets import target_of
from tests.fixtures.elf_files import NOP, SDOT, library, wheel


def silent(*_: object) -> None:
    pass


def build(folder: Path, monkeypatch: pytest.MonkeyPatch, **found: bytes) -> Path:
    """A wheelhouse for a Pi 4 with one more wheel, whose libraries these are. The engine and our own wheel are plain ones."""
    sources = folder / "sources"
    sources.mkdir()
    engine = wheel(sources, "llama_cpp_python-1-py3-none-linux_aarch64.whl", lib__libllama_so=library((NOP,)))
    other = wheel(sources, "other-1-cp311-cp311-manylinux_2_17_aarch64.whl", **found)
    monkeypatch.setattr(cross_engine, "wheel_for", lambda *_: engine)

    def own_wheel(_given: Path | None, target: Path) -> Path:
        return wheel(target, "joulemark-1-py3-none-any.whl")

    def collect(target: Path, _work: Path, _python: str, own: Path, made: Path) -> tuple[str, ...]:
        shutil.copy(other, target / other.name)
        return own.name, made.name, other.name

    monkeypatch.setattr(wheelhouse, "_own_wheel", own_wheel)
    monkeypatch.setattr(wheelhouse, "_collect", collect)
    out = folder / "wheels"
    wheelhouse.build(target_of("pi4"), out, ("3.11",), folder / "cache", None, silent, silent)
    return out


def test_what_fits_is_described_with_its_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = build(tmp_path, monkeypatch, lib__libllama_so=library((NOP,)))
    made = wheelhouse.read(out)
    assert made.target == "pi4" and len(made.files) == 3
    assert {entry.name for entry in made.files} == {path.name for path in out.glob("*.whl")} == {*made.pythons["3.11"]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (library((SDOT,)), "uses dotprod, which armv8.0 has not"),
        (library((NOP,), glibc=("GLIBC_2.99",)), "needs glibc 2.99, the board has 2.36"),
        (library((NOP,), machine=62), "EM_X86_64"),
    ],
)
def test_a_wheel_that_the_board_cannot_run_is_named_and_nothing_is_left(
    content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match=r"would not run on pi4 with Python 3\.11") as caught:
        build(tmp_path, monkeypatch, lib__libggml_cpu_so=content)
    assert words in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


def test_what_is_there_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheels").mkdir()
    with pytest.raises(Conflict, match="is there already"):
        build(tmp_path, monkeypatch)
