"""llama.cpp through its C interface: a model, a context, one reusable batch. Not a plug-in; `_llama_session` builds on it.

Owns every pointer: `close` frees them in order. Knows nothing of tasks, scoring plans or time. Token ids are ints, log-probabilities
natural logarithms; logits rows are float32 arrays of the vocabulary's size that are valid until the next decode.
The truth is llama.h of the llama.cpp commit that the library was built from.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joulemark.errors import EngineFailed
from joulemark_agent.backends import do_nothing
from joulemark_agent.backends._logits import import_numpy

LOG_LINES_KEPT = 40


@dataclass(frozen=True)
class Library:
    """A llama.cpp that is loaded. `functions` has its C functions, structures and constants under llama.h's names, as ctypes objects;
    `backend` is the plug-in that brought it; `version` says whose build it is; `install` is the pip line."""

    functions: Any
    backend: str
    version: str
    install: str


class Log:
    """Catches the engine's log lines, so that they can go into an error instead of onto the terminal."""

    def __init__(self, llama: Any) -> None:
        self.lines: list[str] = []

        def receive(_level: int, text: bytes, _user: Any) -> None:
            line = text.decode(errors="replace").rstrip("\n")
            if line.strip(" ."):
                self.lines.append(line[:500])
                del self.lines[:-LOG_LINES_KEPT]

        callback: Any = llama.llama_log_callback(receive)
        # The library keeps the pointer for the whole process, whatever becomes of this model: a callback that were collected with it would
        # take the process down at the next line of log. So it is never freed, a hundred bytes for each model that is loaded.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(callback))
        llama.llama_log_set(callback, ctypes.c_void_p(0))

    def reason(self) -> str:
        """The last lines that speak of a failure, else the last line."""
        telling = [line for line in self.lines if "error" in line.lower() or "fail" in line.lower()]
        return "; ".join((telling or self.lines)[-3:]) or "it gave no reason"


class Model:
    """A loaded GGUF file: vocabulary, tokenizer, facts."""

    def __init__(self, path: Path, library: Library) -> None:
        self.library = library
        self.llama = library.functions
        self.log = Log(self.llama)
        self.llama.llama_backend_init()
        parameters = self.llama.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._pointer = self.llama.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._pointer:
            raise EngineFailed(
                f"llama.cpp refused {path.name}: {self.log.reason()}",
                "check that the file is complete (its sha256) and that its architecture is supported by this engine version",
                code="model_load_failed",
            )
        self._vocabulary = self.llama.llama_model_get_vocab(self._pointer)
        self.vocabulary_size: int = self.llama.llama_vocab_n_tokens(self._vocabulary)
        self.trained_context: int = self.llama.llama_model_n_ctx_train(self._pointer)
        self.recurrent = bool(
            self.llama.llama_model_is_recurrent(self._pointer) or self.llama.llama_model_is_hybrid(self._pointer)
        )
        # A float32 file is a reference model: halving its memory's precision would hide what a comparison looks for.
        self.full_precision = self.metadata("general.file_type") == "0"
        self.adds_bos = bool(self.llama.llama_vocab_get_add_bos(self._vocabulary))
        self._bos: int = self.llama.llama_vocab_bos(self._vocabulary)
        self._buffer = ctypes.create_string_buffer(256)

    @property
    def pointer(self) -> Any:
        return self._pointer

    def description(self) -> str:
        """llama.cpp's own words for the model, such as `llama 135M Q4_1`."""
        buffer = ctypes.create_string_buffer(256)
        self.llama.llama_model_desc(self._pointer, buffer, len(buffer))
        return buffer.value.decode(errors="replace")

    def metadata(self, key: str) -> str | None:
        """A metadata value as text, or None."""
        size = self.llama.llama_model_meta_val_str(self._pointer, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        self.llama.llama_model_meta_val_str(self._pointer, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace")

    def _head_size(self, part: str) -> int:
        """Numbers per head of keys (`key`) or values (`value`): what the file says, else the width shared out over the heads."""
        stated = self.metadata(f"{self.metadata('general.architecture')}.attention.{part}_length")
        if stated is not None and stated.isdecimal():
            return int(stated)
        heads = max(1, self.llama.llama_model_n_head(self._pointer))
        return int(self.llama.llama_model_n_embd(self._pointer)) // heads

    def cell_bytes(self) -> int:
        """Bytes of one position of the key-value memory, keys and values over all layers."""
        heads = self.llama.llama_model_n_head_kv(self._pointer) * self.llama.llama_model_n_layer(self._pointer)
        return (4 if self.full_precision else 2) * heads * (self._head_size("key") + self._head_size("value"))

    def attention_share(self) -> float:
        """Multiply-adds that one position of the memory adds to a token, over those of all weights."""
        heads = self.llama.llama_model_n_head(self._pointer) * self.llama.llama_model_n_layer(self._pointer)
        weights = max(1, self.llama.llama_model_n_params(self._pointer))
        return heads * (self._head_size("key") + self._head_size("value")) / weights

    def tokenize(self, text: str) -> list[int]:
        """Token ids, special tokens parsed, BOS in front where the tokenizer's own default says so (tasks.md)."""
        raw = text.encode()
        capacity = len(raw) + 8
        tokens = (ctypes.c_int32 * capacity)()
        count = self.llama.llama_tokenize(self._vocabulary, raw, len(raw), tokens, capacity, False, True)
        if count < 0:
            raise EngineFailed(
                f"the tokenizer refused a text of {len(raw)} bytes",
                "the model's tokenizer may be damaged: check its sha256",
            )
        body = list(tokens[:count])
        return [self._bos, *body] if self.adds_bos else body

    def piece(self, token: int) -> bytes:
        """The bytes of a token; control tokens are empty."""
        size = self.llama.llama_token_to_piece(self._vocabulary, token, self._buffer, len(self._buffer), 0, False)
        if size < 0:
            self._buffer = ctypes.create_string_buffer(-size)
            size = self.llama.llama_token_to_piece(self._vocabulary, token, self._buffer, len(self._buffer), 0, False)
        return self._buffer.raw[: max(size, 0)]

    def special_text(self) -> dict[str, str]:
        """The texts of BOS and EOS, which chat templates may ask for."""
        ids = {"bos_token": self._bos, "eos_token": self.llama.llama_vocab_eos(self._vocabulary)}
        texts = {
            name: self.llama.llama_vocab_get_text(self._vocabulary, token) for name, token in ids.items() if token >= 0
        }
        return {name: (text or b"").decode(errors="replace") for name, text in texts.items()}

    def is_end(self, token: int) -> bool:
        """Whether the token ends a generation (EOS, EOT and the like, by the model's metadata)."""
        return bool(self.llama.llama_vocab_is_eog(self._vocabulary, token))

    def close(self) -> None:
        if self._pointer:
            self.llama.llama_model_free(self._pointer)
            self._pointer = None


class Context:
    """Key-value memory and compute buffers for `cells` positions and `sequences` sequences that share one memory."""

    def __init__(
        self,
        model: Model,
        cells: int,
        sequences: int,
        batch_tokens: int,
        threads: int,
        beat: Callable[[], None] = do_nothing,
    ) -> None:
        llama = model.llama
        self._numpy = import_numpy(model.library.install)
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = cells
        parameters.n_batch = batch_tokens
        parameters.n_ubatch = batch_tokens
        parameters.n_seq_max = sequences
        parameters.n_threads = threads
        parameters.n_threads_batch = threads
        parameters.no_perf = True
        # One memory for all sequences, so that a copy of a prefix costs nothing; full-size windows, so that it can be cut back.
        parameters.kv_unified = True
        parameters.swa_full = True
        # Without flash attention: on the CPU its accuracy depends on the batch's size (its path for few rows adds values in 16 bits), and
        # on a float32 model branches then differ from whole sequences by 2e-3 instead of none. With it ARC was scored about a tenth faster.
        parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if model.full_precision:
            parameters.type_k = parameters.type_v = llama.GGML_TYPE_F32
        self._pointer = llama.llama_init_from_model(model.pointer, parameters)
        if not self._pointer:
            raise EngineFailed(
                f"llama.cpp could not make a context of {cells} positions: {model.log.reason()}",
                "use a shorter context or fewer sequences",
                code="context_failed",
            )
        self._model = model
        self._llama = llama
        self._memory = llama.llama_get_memory(self._pointer)
        self._batch = llama.llama_batch_init(batch_tokens, 0, sequences)
        self.cells: int = llama.llama_n_ctx(self._pointer)
        self.sequences = sequences
        self.batch_tokens = batch_tokens
        self.threads = threads
        self._beat = beat
        self._outputs = 0

    # --- the batch ----------------------------------------------------------------------------------------------------
    def clear_batch(self) -> None:
        """Start a new batch."""
        self._batch.n_tokens = 0
        self._outputs = 0

    def add(self, token: int, position: int, sequences: Sequence[int], output: bool) -> int:
        """Append a token that belongs to `sequences`. Returns the number of its logits row, or -1 when none is asked for."""
        batch = self._batch
        index = batch.n_tokens
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = len(sequences)
        identifiers = batch.seq_id[index]
        for slot, sequence in enumerate(sequences):
            identifiers[slot] = sequence
        batch.logits[index] = output
        batch.n_tokens = index + 1
        if not output:
            return -1
        self._outputs += 1
        return self._outputs - 1

    @property
    def batched(self) -> int:
        """Tokens in the batch."""
        return int(self._batch.n_tokens)

    def decode(self) -> Any:
        """Evaluate the batch. Returns the logits rows that were asked for, shape (rows, vocabulary), valid until the next call.

        Raises EngineFailed when the engine reports an error (1: no room in the memory).
        """
        code = self._llama.llama_decode(self._pointer, self._batch)
        if code != 0:
            why = "no room in its key-value memory" if code == 1 else f"code {code}: {self._model.log.reason()}"
            raise EngineFailed(
                f"llama.cpp could not decode a batch of {self._batch.n_tokens} tokens: {why}",
                "use fewer sequences, a smaller batch or a shorter context",
                code="decode_failed",
            )
        self._beat()
        if not self._outputs:
            return self._numpy.empty((0, self._model.vocabulary_size), dtype=self._numpy.float32)
        address = ctypes.cast(self._llama.llama_get_logits(self._pointer), ctypes.c_void_p).value
        count = self._outputs * self._model.vocabulary_size
        block = (ctypes.c_float * count).from_address(address or 0)
        return self._numpy.frombuffer(block, dtype=self._numpy.float32).reshape(self._outputs, -1)

    # --- the memory ---------------------------------------------------------------------------------------------------
    def reset(self) -> None:
        """Forget everything."""
        self._llama.llama_memory_clear(self._memory, False)

    def copy(self, source: int, target: int) -> None:
        """Let `target` share all positions of `source`."""
        self._llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def remove(self, sequence: int, start: int = -1) -> bool:
        """Drop positions from `start` (-1: all). False when this memory cannot be cut there."""
        return bool(self._llama.llama_memory_seq_rm(self._memory, sequence, start, -1))

    def close(self) -> None:
        if self._pointer:
            with suppress(AttributeError):
                self._llama.llama_batch_free(self._batch)
            self._llama.llama_free(self._pointer)
            self._pointer = None
