"""The binary wheel's C interface: what is declared for it is checked against what the library itself says."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from joulemark.errors import MissingExtra
from joulemark_agent.backends import _xllamacpp_library as declared

pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: make install-test")


def test_the_functions_answer() -> None:
    functions = declared.load()
    assert b"CPU" in functions.llama_print_system_info()
    assert functions.llama_context_default_params().swa_full is True


@pytest.mark.parametrize(
    ("source", "field", "odd"),
    [
        ("llama_context_default_params", "moe_cache_size", "offload_kqv False"),
        ("llama_context_default_params", "n_outputs_max_per_seq", "n_threads 1"),
        ("llama_model_default_params", "lazy_mode", "main_gpu 1"),
    ],
)
def test_a_field_too_few_is_noticed(source: str, field: str, odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = [
        (name, shortened(result, field) if name == source else result, arguments)
        for name, result, arguments in declared._FUNCTIONS  # pyright: ignore[reportPrivateUsage]
    ]
    monkeypatch.setattr(declared, "_FUNCTIONS", tuple(changed))
    with pytest.raises(MissingExtra, match=r"lays out Shortened in another way") as caught:
        declared.load()
    assert odd in caught.value.message


def shortened(structure: Any, field: str) -> Any:
    fields = [entry for entry in structure._fields_ if entry[0] != field]
    assert len(fields) == len(structure._fields_) - 1
    return type("Shortened", (ctypes.Structure,), {"_fields_": fields})


@pytest.mark.parametrize("version", ["2026.9.11063", "2026.11.1"])
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.raises(MissingExtra, match=f"xllamacpp {version} is installed, but only {declared.VERSION}") as caught:
        declared.load()
    assert "joulemark[xllamacpp]" in (caught.value.hint or "")


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    with pytest.raises(MissingExtra, match=r"without xllamacpp\.abi3\.so"):
        declared.load()
    (tmp_path / "xllamacpp.abi3.so").write_bytes(b"no library")
    with pytest.raises(MissingExtra, match=r"cannot be loaded: .*(invalid ELF header|file too short)"):
        declared.load()

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(MissingExtra, match="xllamacpp is not installed"):
        declared.load()
