"""What fits a board, by what the engine holds once it has loaded the weights, not by the size of the file."""

from __future__ import annotations

import importlib

import pytest

from joulemark.errors import BadInput, NotFound
from joulemark.wire import FileEntry, Manifest, content_id
from joulemark_agent.fitting import ENGINE_OVERHEAD_BYTES, cache_budget, choose_backend, misfit

MB = 1_000_000


def manifest(loaded: int | None = None) -> Manifest:
    return Manifest(
        name="graph",
        format="onnx",
        files=(FileEntry(path="model.onnx", size_bytes=94 * MB, sha256="0" * 64),),
        architecture="llama",
        quantization="GPTQ-4-g32",
        parameters=135_000_000,
        weight_bytes=94 * MB,
        context_tokens=8192,
        loaded_weight_bytes=loaded,
    )


@pytest.mark.parametrize(("loaded", "held"), [(None, 94 * MB), (184 * MB, 184 * MB), (1, 94 * MB)])
def test_loaded_weights_and_the_engine_must_fit(loaded: int | None, held: int) -> None:
    needed = held + ENGINE_OVERHEAD_BYTES
    assert misfit(needed, manifest(loaded)) is None and misfit(None, manifest(loaded)) is None
    problem = misfit(needed - 1, manifest(loaded))
    assert problem is not None and problem.code == "does_not_fit"
    assert f"about {needed / 1e6:.0f} MB" in problem.message
    # Half of what they leave may go to keys and values.
    assert cache_budget(needed + 50 * MB, manifest(loaded)) == 25 * MB
    assert cache_budget(needed - 1, manifest(loaded)) == 0
    assert cache_budget(None, manifest(loaded)) == held


def test_an_artifact_whose_weights_load_as_they_are_keeps_its_id() -> None:
    plain = manifest()
    assert "loaded_weight_bytes" not in plain.model_dump()
    assert content_id(plain) != content_id(manifest(184 * MB))
    assert Manifest.model_validate_json(manifest(184 * MB).model_dump_json()) == manifest(184 * MB)


def test_the_first_backend_that_opens_the_format_and_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ("llamacpp", "xllamacpp", "onnx")
    missing: set[str] = set()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else object())
    monkeypatch.setattr(
        "joulemark.plugins.load", lambda _, name: importlib.import_module("joulemark_agent.backends." + name)
    )
    assert choose_backend(wanted, "gguf") == "llamacpp"
    assert choose_backend(wanted, "onnx") == "onnx"
    missing.add("llama_cpp")
    assert choose_backend(wanted, "gguf") == "xllamacpp"
    missing.add("xllamacpp")
    assert choose_backend(wanted, "gguf") == "llamacpp", "whose error says how to install it"


def test_the_first_backend_that_opens_the_format() -> None:
    assert choose_backend(("llamacpp", "onnx"), "onnx") == "onnx"
    with pytest.raises(BadInput, match="no backend of llamacpp opens a onnx artifact"):
        choose_backend(("llamacpp",), "onnx")
    with pytest.raises(NotFound):
        choose_backend(("nonesuch",), "onnx")
