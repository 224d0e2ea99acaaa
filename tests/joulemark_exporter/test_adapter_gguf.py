"""An adapter put on a running base in llama.cpp against the same adapter folded: the same logits, whatever PEFT's scales were."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from joulemark.errors import BadInput
from joulemark_exporter import adapter_gguf, checkpoint, lora
from tests.fixtures import hub_models
from tests.fixtures.exporting import CASES, logits_of, train, write

llama: Any = llama_cpp


@contextmanager
def opened(base: Path) -> Iterator[Any]:
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.use_mmap = False
    model = llama.llama_model_load_from_file(str(base).encode(), parameters)
    assert model
    yield model
    llama.llama_model_free(model)


def logits(model: Any, adapter: Any, scale: float, tokens: list[int]) -> np.ndarray:
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
    settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.type_k = settings.type_v = llama.GGML_TYPE_F32
    context = llama.llama_init_from_model(model, settings)
    if adapter is not None:
        adapters, scales = (llama.llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(scale)
        code = llama.llama_set_adapters_lora(context, adapters, 1, scales)
        assert code == 0
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens):
        batch.token[position], batch.pos[position], batch.logits[position] = token, position, True
        batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
    assert llama.llama_decode(context, batch) == 0
    count = len(tokens) * hub_models.VOCABULARY
    values = np.ctypeslib.as_array(llama.llama_get_logits(context), (count,)).reshape(len(tokens), -1).copy()
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    return values


@pytest.mark.parametrize("case", ["plain", "patterns", "rslora", "conv1d", "bloom"])
def test_a_hot_adapter_computes_what_the_folded_one_does(case: str, tmp_path: Path) -> None:
    family, settings = CASES[case]
    hub_models.write(tmp_path / "base", family)
    train(tmp_path / "base", tmp_path / "adapter", family, **settings)
    model = checkpoint.open_folder(tmp_path / "base")
    adapter = lora.read_adapter(tmp_path / "adapter")
    target = tmp_path / "adapter.gguf"
    adapter_gguf.write(target, adapter, model)
    base = write(tmp_path / "base", tmp_path / "out")
    tokens = list(range(5, 45))
    with opened(base) as engine:
        loaded = llama.llama_adapter_lora_init(engine, str(target).encode())
        assert loaded
        bare = logits(engine, None, 0.0, tokens)
        for scale in (1.0, 0.5):
            expected = logits_of(lora.fold(model, [(adapter, scale)])).numpy()
            assert np.abs(bare - expected).max() > 0.1
            # ggml's GELU comes from a table of 16-bit floats.
            assert np.abs(logits(engine, loaded, scale, tokens) - expected).max() < (
                1e-3 if family == "llama" else 3e-2
            )


@pytest.mark.parametrize("case", ["dora", "embedding", "whole tensors"])
def test_what_such_a_file_cannot_hold_is_refused(case: str, tmp_path: Path) -> None:
    family, settings = CASES[case]
    hub_models.write(tmp_path / "base", family)
    train(tmp_path / "base", tmp_path / "adapter", family, **settings)
    with pytest.raises(BadInput, match="fold it"):
        adapter_gguf.write(
            tmp_path / "out.gguf", lora.read_adapter(tmp_path / "adapter"), checkpoint.open_folder(tmp_path / "base")
        )
