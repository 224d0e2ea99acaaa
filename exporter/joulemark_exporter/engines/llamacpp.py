"""llama.cpp through llama-cpp-python's C interface: the engine of GGUF artifacts. The whole window in one call, float32 or 16-bit memory as
the board has it: the settings are those of the agent's backend, so that what is verified is what will run."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from joulemark.errors import EngineFailed, MissingExtra

FORMAT = "gguf"


class Engine:
    """An opened GGUF file."""

    def __init__(self, path: Path, threads: int) -> None:
        try:
            import llama_cpp
        except ImportError as error:
            raise MissingExtra("llama-cpp-python is not installed", "pip install 'joulemark[export]'") from error
        self._llama: Any = llama_cpp
        self._threads = threads
        self._said: list[str] = []
        self._log = llama_cpp.llama_log_callback(self._hear)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise EngineFailed(
                f"llama.cpp refuses {path.name}: {self._last()}", "the file was not written as llama.cpp reads it"
            )
        self._vocabulary = self._llama.llama_model_get_vocab(self._model)
        self._full_precision = self._file_type() == "0"
        self.vocabulary_size = int(self._llama.llama_vocab_n_tokens(self._vocabulary))

    def _hear(self, level: int, text: bytes, _data: Any) -> None:
        if level in (3, 4):  # warnings and errors
            self._said = [*self._said[-20:], text.decode(errors="replace").strip()]

    def _file_type(self) -> str:
        """`general.file_type`: 0 is float32, to which the agent gives a float32 memory; all others get 16 bits."""
        buffer = ctypes.create_string_buffer(16)
        self._llama.llama_model_meta_val_str(self._model, b"general.file_type", buffer, len(buffer))
        return buffer.value.decode()

    def _last(self) -> str:
        return "; ".join(self._said[-3:]) or "it does not say why"

    def tokenize(self, text: str) -> list[int]:
        """See the contract."""
        data = text.encode()
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        count = self._llama.llama_tokenize(self._vocabulary, data, len(data), tokens, room, True, True)
        if count < 0:
            raise EngineFailed(
                "llama.cpp could not tokenize the probe text", "the tokenizer was not written as llama.cpp reads it"
            )
        return list(tokens[:count])

    def chat_template(self) -> str | None:
        """The chat template in the file."""
        template = self._llama.llama_model_chat_template(self._model, None)
        return template.decode() if template else None

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """See the contract. Raises EngineFailed."""
        llama = self._llama
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = len(tokens)
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.n_seq_max = 1
        parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if self._full_precision:
            parameters.type_k = parameters.type_v = llama.GGML_TYPE_F32
        context = llama.llama_init_from_model(self._model, parameters)
        if not context:
            raise EngineFailed(f"llama.cpp could not make a context: {self._last()}", "is there memory for this model?")
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for position, token in enumerate(tokens):
                batch.token[position], batch.pos[position] = token, position
                batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
                batch.logits[position] = True
            code = llama.llama_decode(context, batch)
            if code != 0:
                raise EngineFailed(
                    f"llama.cpp could not compute the probe ({code}): {self._last()}", "the file is damaged"
                )
            count = len(tokens) * self.vocabulary_size
            address = ctypes.cast(llama.llama_get_logits(context), ctypes.c_void_p).value
            block = (ctypes.c_float * count).from_address(address or 0)
            return np.ctypeslib.as_array(block).reshape(len(tokens), -1).copy()
        finally:
            llama.llama_batch_free(batch)
            llama.llama_free(context)

    def close(self) -> None:
        """Frees the model."""
        self._llama.llama_model_free(self._model)
