"""The binary wheel's C interface: what is declared for it is checked against what the library itself says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from joulemark.errors import MissingExtra
from joulemark_agent.backends import _xllamacpp_library as declared

pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: make install-test")


def test_the_structures_are_those_of_the_library_and_a_field_too_few_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    functions = declared.load()
    assert b"CPU" in functions.llama_print_system_info()
    assert functions.llama_context_default_params().swa_full is True
    fields = declared._ContextParameters._fields_  # pyright: ignore[reportPrivateUsage]
    older = type("Older", (declared.ctypes.Structure,), {"_fields_": [f for f in fields if f[0] != "moe_cache_size"]})
    changed = [
        (name, older if name == "llama_context_default_params" else result, arguments)
        for name, result, arguments in declared._FUNCTIONS  # pyright: ignore[reportPrivateUsage]
    ]
    monkeypatch.setattr(declared, "_FUNCTIONS", tuple(changed))
    with pytest.raises(MissingExtra, match=r"lays out Older in another way: .*offload_kqv"):
        declared.load()


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
