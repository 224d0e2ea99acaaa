"""ONNX Runtime on the processor: the engine of ONNX artifacts of both forms. The whole window in one call, without memory of earlier ones.

Tokens come from the artifact's own tokenizer.json through the same library as on the board.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from joulemark import graph_form
from joulemark.errors import EngineFailed, MissingExtra

FORMAT = "onnx"


class Engine:
    """An opened graph."""

    def __init__(self, path: Path, threads: int) -> None:
        try:
            import onnxruntime
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingExtra(
                "onnxruntime or tokenizers is not installed", "pip install 'joulemark[export]'"
            ) from error
        settings: Any = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.log_severity_level = 3
        try:
            self._session: Any = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise EngineFailed(
                f"onnxruntime refuses {path.name}: {error}"[:600], "the graph was not written as it reads it"
            ) from error
        self._folder = path.parent
        self._tokenizer: Any = Tokenizer.from_file(str(path.parent / "tokenizer.json"))
        # As the board's engine does.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def tokenize(self, text: str) -> list[int]:
        """See the contract."""
        return list(self._tokenizer.encode(text).ids)

    def chat_template(self) -> str | None:
        """The chat template beside the graph."""
        settings = json.loads((self._folder / "tokenizer_config.json").read_bytes())
        return settings.get("chat_template")

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """See the contract."""
        count = len(tokens)
        positions = np.arange(count, dtype=np.int64)
        told: dict[str, Any] = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, count), np.int64),
            "position_ids": positions[None],
            "attention_bias": np.zeros((1, 1, count, count), np.float32),
            "key_positions": positions,
            "last_keys": np.array([count - 1], np.int32),
            "total_keys": np.array([count], np.int32),
            "logit_positions": positions,
        }
        given: dict[str, Any] = {}
        for item in self._session.get_inputs():
            past = item.name.startswith(graph_form.PAST)
            given[item.name] = np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32) if past else told[item.name]
        try:
            return self._session.run([graph_form.LOGITS], given)[0][0].astype(np.float32)
        except Exception as error:
            raise EngineFailed(
                f"onnxruntime could not compute the probe: {error}"[:600], "the graph is damaged"
            ) from error

    def close(self) -> None:
        """Nothing to free."""
