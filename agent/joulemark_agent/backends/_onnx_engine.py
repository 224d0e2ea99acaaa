"""ONNX Runtime on the processor: an opened graph of one of the forms in `joulemark.graph_form`. Not a plug-in; `_onnx_memory` has what a
graph remembers, `onnx` builds on both.

The file's metadata says what must be known beside the graph. Knows nothing of tasks, plans or time. Logits rows are float32 arrays of the
vocabulary's size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from joulemark import graph_form
from joulemark.errors import EngineFailed, MissingExtra
from joulemark.graph_form import Form, GraphFacts
from joulemark_agent.backends import do_nothing
from joulemark_agent.backends._logits import import_numpy
from joulemark_agent.backends._onnx_tokenizer import INSTALL_HINT

_REASON_CHARACTERS = 500


def import_onnxruntime() -> Any:
    """Raises MissingExtra when ONNX Runtime is not installed or does not load."""
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        raise MissingExtra(f"ONNX Runtime cannot be loaded: {error}", INSTALL_HINT) from error
    return onnxruntime


class Graph:
    """An opened graph. Raises EngineFailed when the engine refuses it or when it is not one of the exporter's."""

    def __init__(self, path: Path, threads: int, beat: Callable[[], None] = do_nothing) -> None:
        self.runtime = import_onnxruntime()
        self.numpy = import_numpy(INSTALL_HINT)
        self._beat = beat
        settings: Any = self.runtime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 4  # what goes wrong comes as an exception, and as no second copy on the terminal
        try:
            self.session: Any = self.runtime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise EngineFailed(
                f"onnxruntime refused {path.name}: {_words(error)}",
                "check that the artifact is complete, and that this onnxruntime is not older than the one that it was made with",
                code="model_load_failed",
            ) from error
        self.facts = _facts(self.session.get_modelmeta().custom_metadata_map, path)
        given: list[Any] = self.session.get_inputs()
        self.pasts = {item.name: item.shape for item in given if item.name.startswith(graph_form.PAST)}
        self.inputs = {item.name for item in given if item.name not in self.pasts}
        form = graph_form.form_of({item.name for item in given})
        sizes = [shape[index] for shape in self.pasts.values() for index in (1, 3)]
        wide = all(item.type == "tensor(float)" for item in given if item.name in self.pasts)
        gives = {name.replace(graph_form.PAST, graph_form.PRESENT) for name in self.pasts} | {graph_form.LOGITS}
        whole = {item.name for item in self.session.get_outputs()} == gives
        if form is None or not wide or not whole or any(not _is_size(size) for size in sizes):
            raise EngineFailed(
                f"{path.name} is not a graph that `joulemark export` wrote", "export the model with the onnx writer"
            )
        self.form: Form = form
        self.branches = form == "growing"
        """Whether positions and a mask can be told, so that continuations stand side by side in a row."""
        self.uneven = graph_form.POSITIONS in self.inputs
        """Whether rows of unequal lengths can step together."""

    def position_bytes(self) -> int:
        """Bytes that one position of the key-value memory takes in all layers, as often as it is there."""
        return graph_form.COPIES[self.form] * sum(4 * shape[1] * shape[3] for shape in self.pasts.values())

    def run(self, binding: Any, given: Mapping[str, Any]) -> Any:
        """Logits (rows, wanted, vocabulary); a binding has the memory's inputs and outputs already. Raises EngineFailed."""
        for name, value in given.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output(graph_form.LOGITS)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineFailed(
                f"onnxruntime could not compute {given['input_ids'].size} tokens: {_words(error)}",
                "use fewer sequences, a smaller batch or a shorter context",
                code="decode_failed",
            ) from error
        self._beat()
        logits = binding.get_outputs()[-1].numpy()
        if logits.shape[-1] != self.facts.vocabulary:
            raise EngineFailed(
                f"the graph's logits are of {logits.shape[-1]} tokens, its metadata says {self.facts.vocabulary}",
                "export the model again",
            )
        return logits


def _facts(metadata: Mapping[str, str], path: Path) -> GraphFacts:
    try:
        return graph_form.from_metadata(metadata)
    except (ValueError, RecursionError) as error:
        raise EngineFailed(
            f"{path.name} does not say what model it is: {' '.join(str(error).split())[:_REASON_CHARACTERS]}",
            "export the model with `joulemark export` and the onnx writer",
        ) from error


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and 1 <= value <= 1 << 20


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:_REASON_CHARACTERS]
