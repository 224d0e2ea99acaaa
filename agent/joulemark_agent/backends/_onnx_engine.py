"""ONNX Runtime on the processor: an opened graph, and memories that grow in place. Not a plug-in; `onnx` builds on it.

Graphs have the form of `joulemark.graph_form`: the attention appends a token's keys and values to the buffer that it is given, masks come
as a bias, and the file's metadata says what must be known beside the graph. Knows nothing of tasks, plans or time. Logits rows are float32
arrays of the vocabulary's size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from joulemark import graph_form
from joulemark.errors import EngineFailed, MissingExtra
from joulemark.graph_form import GraphFacts
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
        inputs = {item.name: item.shape for item in self.session.get_inputs()}
        self._pasts = {name: shape for name, shape in inputs.items() if name.startswith(graph_form.PAST)}
        sizes = [shape[index] for shape in self._pasts.values() for index in (1, 3)]
        if (
            not self._pasts
            or inputs.keys() - self._pasts.keys() != set(graph_form.INPUTS)
            or any(not _is_size(size) for size in sizes)
        ):
            raise EngineFailed(
                f"{path.name} is not a graph that `joulemark export` wrote", "export the model with the onnx writer"
            )

    def position_bytes(self) -> int:
        """Bytes of the key-value memory that one position takes in all layers."""
        return sum(4 * shape[1] * shape[3] for shape in self._pasts.values())

    def memory(self, rows: int, capacity: int) -> Memory:
        """An empty key-value memory of `rows` sequences."""
        shapes = {name: (rows, shape[1], capacity, shape[3]) for name, shape in self._pasts.items()}
        return Memory(self, {name: self.numpy.zeros(shape, self.numpy.float32) for name, shape in shapes.items()})

    def run(self, binding: Any, given: Mapping[str, Any]) -> Any:
        """Logits (rows, wanted, vocabulary). Raises EngineFailed."""
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


class Memory:
    """Keys and values of some sequences, side by side. Positions are written over, never moved: to forget them is to go back."""

    def __init__(self, graph: Graph, arrays: Mapping[str, Any]) -> None:
        self._graph = graph
        self._arrays = arrays
        self._bindings: dict[tuple[int, int], Any] = {}
        first = next(iter(arrays.values()))
        self.rows: int = first.shape[0]
        self.capacity: int = first.shape[2]

    def feed(
        self,
        row: int,
        tokens: Sequence[int],
        past: int,
        wanted: Sequence[int],
        positions: Sequence[int] | None = None,
        bias: Any = None,
    ) -> Any:
        """Append tokens to one row behind `past` keys. Returns the logits (wanted, vocabulary) of the tokens numbered in `wanted`.

        `positions` are those of the tokens, where they do not just follow the past; `bias` (tokens, past + tokens) hides keys from them.
        """
        numpy, count = self._graph.numpy, len(tokens)
        total = past + count
        places = numpy.arange(past, total) if positions is None else numpy.array(positions, numpy.int64)
        mask = numpy.zeros((count, total), numpy.float32) if bias is None else bias
        given = {
            "input_ids": numpy.array([tokens], numpy.int64),
            "position_ids": places[None],
            "attention_bias": mask[None, None],
            "key_positions": numpy.concatenate([numpy.arange(past), places]),
            "last_keys": numpy.array([total - 1], numpy.int32),
            "total_keys": numpy.array([total], numpy.int32),
            "logit_positions": numpy.array(wanted, numpy.int64),
        }
        return self._graph.run(self._binding(row, row + 1), given)[0]

    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> Any:
        """One more token for each of the first rows, which hold `lengths` keys. Returns the logits (rows, vocabulary)."""
        numpy, total = self._graph.numpy, max(lengths) + 1
        given = {
            "input_ids": numpy.array(tokens, numpy.int64)[:, None],
            "position_ids": numpy.array(lengths, numpy.int64)[:, None],
            "attention_bias": numpy.zeros((1, 1, 1, total), numpy.float32),
            "key_positions": numpy.arange(total),
            "last_keys": numpy.array(lengths, numpy.int32),
            "total_keys": numpy.array([total], numpy.int32),
            "logit_positions": numpy.zeros(1, numpy.int64),
        }
        return self._graph.run(self._binding(0, len(tokens)), given)[:, 0]

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Positions start…end−1 of one row into another."""
        for array in self._arrays.values():
            array[target, :, start:end] = array[source, :, start:end]

    def _binding(self, first: int, end: int) -> Any:
        """Rows first…end−1 as input and output of the graph, the same buffer for both."""
        if (first, end) not in self._bindings:
            runtime, binding = self._graph.runtime, self._graph.session.io_binding()
            for name, array in self._arrays.items():
                shared = runtime.OrtValue.ortvalue_from_numpy(array[first:end])
                binding.bind_ortvalue_input(name, shared)
                binding.bind_ortvalue_output(name.replace(graph_form.PAST, graph_form.PRESENT), shared)
            self._bindings[first, end] = binding
        return self._bindings[first, end]


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
