"""Wheels for boards: cross-compiled, resolved for the board's Python, checked; what does not fit is refused here and not on the board."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from joulemark.errors import BadInput, Conflict, NotFound
from joulemark_deploy import cross_engine, elf, wheelhouse
from joulemark_deploy.targets import ARMV8, DOTPROD, GLIBC_FLOOR, target_of

pytestmark = pytest.mark.timeout(1700)  # the first cross-compilation takes minutes


def engine(folder: Path) -> Path:
    return next(folder.glob("llama_cpp_python-*.whl"))


def test_a_wheelhouse_is_whole_and_its_board_can_run_it(wheelhouses: dict[str, Path]) -> None:
    for name, folder in wheelhouses.items():
        assert wheelhouse.faults(folder) == []
        made = wheelhouse.read(folder)
        assert (made.target, made.engine) == (name, cross_engine.VERSION)
        assert {entry.name for entry in made.files} == {path.name for path in folder.glob("*.whl")}
        for python, names in made.pythons.items():
            lines = (folder / f"requirements-cp{python.replace('.', '')}.txt").read_text().splitlines()
            assert len(lines) == len(names) > 40
            assert all(" --hash=sha256:" in line and "==" in line for line in lines)


def test_each_python_gets_what_it_needs_and_no_other_one_does(wheelhouses: dict[str, Path]) -> None:
    """`exceptiongroup` and `tomli` are for Python 3.10 alone, whichever Python resolves."""
    pythons = wheelhouse.read(wheelhouses["pi4"]).pythons
    for project in ("exceptiongroup", "tomli"):
        assert any(name.startswith(f"{project}-") for name in pythons["3.10"])
        assert not any(name.startswith(f"{project}-") for name in pythons["3.11"])
    assert any("-cp310-" in name and name.startswith("pydantic_core") for name in pythons["3.10"])
    newest = wheelhouse.read(wheelhouses["pi5"]).pythons["3.13"]
    assert any("-cp313-" in name and name.startswith("pydantic_core") for name in newest)
    assert not any("-cp310-cp310-" in name or "-cp311-cp311-" in name for name in newest)


def test_the_engine_runs_from_the_oldest_glibc_on_and_brings_its_c_library(wheelhouses: dict[str, Path]) -> None:
    for folder in wheelhouses.values():
        found = elf.libraries(engine(folder))
        assert {library.machine for library in found} == {"EM_AARCH64"}
        assert max(library.glibc or (0, 0) for library in found) <= GLIBC_FLOOR


def test_the_instruction_sets_are_what_they_say(wheelhouses: dict[str, Path]) -> None:
    used = {
        name: frozenset().union(*(library.extensions or () for library in elf.libraries(engine(folder))))
        for name, folder in wheelhouses.items()
    }
    assert used == {"pi4": frozenset(), "pi5": frozenset({"dotprod", "fp16"})}


def test_a_pi_5s_wheels_are_refused_for_a_pi_4(wheelhouses: dict[str, Path]) -> None:
    found = wheelhouse.faults(wheelhouses["pi5"], target_of("pi4"))
    assert found and all("dotprod, fp16, which armv8.0 has not" in fault for fault in found)
    assert wheelhouse.faults(wheelhouses["pi4"], target_of("pi5")) == []
    assert elf.misfits(engine(wheelhouses["pi5"]), "EM_X86_64", DOTPROD, (2, 36))
    assert elf.misfits(engine(wheelhouses["pi4"]), "EM_AARCH64", ARMV8, (2, 26))[0].endswith("the board has 2.26")


def test_a_file_that_was_changed_or_lost_is_named(wheelhouses: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(wheelhouses["pi5"], folder)
    changed, lost = sorted(folder.glob("*.whl"))[:2]
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    lost.unlink()
    found = wheelhouse.faults(folder)
    assert f"{changed.name} was changed since it was built" in found
    assert f"{lost.name} is missing" in found


def test_what_is_there_is_not_overwritten_and_what_fails_leaves_nothing(tmp_path: Path) -> None:
    arguments = (tmp_path / "cache", None, lambda _: None, lambda _done, _total: None)
    (tmp_path / "there").mkdir()
    with pytest.raises(Conflict):
        wheelhouse.build(target_of("pi4"), tmp_path / "there", ("3.11",), *arguments)
    with pytest.raises(BadInput, match=r"no wheels for Python 2\.7"):
        wheelhouse.build(target_of("pi4"), tmp_path / "new", ("2.7",), *arguments)
    with pytest.raises(NotFound, match="commodore"):
        target_of("commodore-64")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema_number": 2}', "x" * 100])
def test_a_manifest_that_is_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no wheelhouse"):
        wheelhouse.read(tmp_path)
    (tmp_path / "wheelhouse.json").write_text(text)
    with pytest.raises(BadInput, match=r"wheelhouse\.json cannot be used"):
        wheelhouse.read(tmp_path)


def test_the_engine_is_the_one_of_the_workstation() -> None:
    """Board and workstation run the same engine: its version is named in three places."""
    import tomllib

    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    assert f"llama-cpp-python=={cross_engine.VERSION}" in project["optional-dependencies"]["llama"]
    assert f'VERSION = "{cross_engine.VERSION}"' in Path("deploy/build_engine.py").read_text()
