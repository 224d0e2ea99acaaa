"""What a board can run: machine, glibc, instructions; and files that are no wheels."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from joulemark.errors import BadInput
from joulemark_deploy import elf
from joulemark_deploy.targets import ARMV8, DOTPROD
from tests.fixtures.elf_files import (
    BFDOT,
    FADD_HALF,
    FADD_SINGLE,
    NOP,
    SDOT,
    SMMLA,
    UDOT,
    X86_64,
    library,
    wheel,
)


def found(tmp_path: Path, *instructions: int, **more: object) -> list[str]:
    content = library(instructions or (NOP,), **more)  # type: ignore[arg-type]
    return elf.misfits(wheel(tmp_path, lib__libggml_cpu_so=content), "EM_AARCH64", ARMV8, (2, 27))


def test_plain_code_for_an_old_system_fits(tmp_path: Path) -> None:
    assert found(tmp_path, NOP, FADD_SINGLE) == []


@pytest.mark.parametrize(
    ("instruction", "extension"),
    [(SDOT, "dotprod"), (UDOT, "dotprod"), (SMMLA, "i8mm"), (BFDOT, "bf16"), (FADD_HALF, "fp16")],
)
def test_an_instruction_that_the_processor_has_not_is_found(instruction: int, extension: str, tmp_path: Path) -> None:
    (why,) = found(tmp_path, NOP, NOP, instruction, NOP)
    assert why == f"lib/libggml-cpu.so: its code uses {extension}, which armv8.0 has not: it would die with SIGILL"


def test_what_the_newer_processor_has_fits_there_and_no_more(tmp_path: Path) -> None:
    path = wheel(tmp_path, libggml_cpu_so=library((SDOT, FADD_HALF)))
    assert elf.misfits(path, "EM_AARCH64", DOTPROD, (2, 27)) == []
    newer = wheel(tmp_path, name="x-1-py3-none-any.whl", libggml_cpu_so=library((SDOT, SMMLA)))
    (why,) = elf.misfits(newer, "EM_AARCH64", DOTPROD, (2, 27))
    assert "uses i8mm, which armv8.2-dotprod has not" in why


def test_libraries_that_choose_when_they_run_are_not_decoded(tmp_path: Path) -> None:
    assert elf.misfits(wheel(tmp_path, numpy_so=library((SDOT,))), "EM_AARCH64", ARMV8, (2, 27)) == []


def test_data_between_instructions_is_passed_over(tmp_path: Path) -> None:
    assert found(tmp_path, NOP, 0x00000000, 0xFFFFFFFF, SDOT)[0].count("dotprod") == 1


def test_glibc_that_the_board_has_not(tmp_path: Path) -> None:
    (why,) = found(tmp_path, glibc=("GLIBC_2.17", "GLIBC_2.34", "GLIBC_2.9"))
    assert why.endswith("it needs glibc 2.34, the board has 2.27")
    assert found(tmp_path, glibc=("GLIBC_2.27", "GLIBC_2.4", "GLIBC_PRIVATE")) == []


def test_another_machine(tmp_path: Path) -> None:
    (why,) = found(tmp_path, machine=X86_64)
    assert why.endswith("it is for EM_X86_64, the board is EM_AARCH64")


def test_a_wheel_without_libraries_fits_everywhere(tmp_path: Path) -> None:
    assert elf.misfits(wheel(tmp_path, readme=b"words"), "EM_AARCH64", ARMV8, (2, 17)) == []


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\3\4" + bytes(40)])
def test_no_wheel(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.whl"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"x\.whl is no wheel"):
        elf.libraries(path)


def test_a_wheel_that_is_larger_than_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elf, "_MOST_BYTES", 100)
    with pytest.raises(BadInput, match="larger than any wheel"):
        elf.libraries(wheel(tmp_path, x_so=library()))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 900), st.binary(min_size=1, max_size=8))
def test_a_damaged_library_is_read_or_refused(place: int, damage: bytes) -> None:
    import tempfile

    whole = library((SDOT, NOP) * 20, glibc=("GLIBC_2.17", "GLIBC_2.34"))
    content = bytearray(whole)
    content[place : place + len(damage)] = damage
    with tempfile.TemporaryDirectory() as folder:
        path = wheel(Path(folder), libggml_cpu_so=bytes(content[: max(len(whole), place)]))
        try:
            found = elf.libraries(path)
        except BadInput:
            return
        assert len(found) <= 1


def test_the_hand_made_library_is_one() -> None:
    content = library()
    assert struct.unpack_from("<H", content, 18)[0] == 183
