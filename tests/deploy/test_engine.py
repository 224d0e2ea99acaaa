"""The engine that deploy/build_engine.py built is the one that is meant."""

from __future__ import annotations

import pytest

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make install")


def test_it_uses_none_of_the_kernels_that_crash():
    """On processors with AMX only this can fail: deploy/engine_only.cmake says why."""
    said = llama_cpp.llama_print_system_info().decode()
    assert "CPU" in said and "AMX" not in said
