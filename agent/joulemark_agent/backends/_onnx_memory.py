"""What an ONNX graph remembers of the sequences that it was fed, for both forms of graphs. Not a plug-in; `onnx` builds on it.

A growing graph has buffers that it appends to. A rebuilt one gives a whole new memory at every call: here the rows of a call stay where it
left them, as (call, row, length), and are only moved when other rows stand beside them in the next call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from joulemark import graph_form
from joulemark_agent.backends._onnx_engine import Graph

Whole = Sequence[int]
"""Whole numbers: tokens, positions, places in a batch."""


@dataclass(frozen=True)
class Beside:
    """Continuations side by side: the positions of their tokens, and a bias (tokens, past + tokens) that hides them from one another."""

    positions: Whole
    bias: Any


class Memory(Protocol):
    """Keys and values of some sequences, side by side. Logits are float32."""

    rows: int
    capacity: int

    def feed(
        self, row: int, tokens: Whole, past: int, wanted: Whole, beside: Beside | None = None, kept: bool = True
    ) -> Any:
        """Append tokens to one row behind `past` keys. Returns the logits (wanted, vocabulary) of the tokens numbered in `wanted`.

        `beside`: the tokens do not just follow the past; only where the graph branches. `kept`: whether anything will stand behind them.
        """
        ...

    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> Any:
        """One more token for each of the first rows, which hold `lengths` keys. Returns the logits (rows, vocabulary). Of the other rows
        only what all share is still there afterwards."""
        ...

    def share(self, end: int, rows: int) -> None:
        """Lets the first `rows` rows begin as the very first does: with its first `end` positions."""
        ...

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Positions start…end−1 of one row into another, whose earlier ones are shared."""
        ...


def memory_of(graph: Graph, rows: int, capacity: int) -> Memory:
    """An empty memory of `rows` sequences of up to `capacity` positions."""
    return (GrowingMemory if graph.form == "growing" else RebuiltMemory)(graph, rows, capacity)


class GrowingMemory:
    """Buffers to which the attention itself appends. Positions are written over, never moved: to forget them is to go back."""

    def __init__(self, graph: Graph, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self._graph = graph
        shapes = {name: (rows, shape[1], capacity, shape[3]) for name, shape in graph.pasts.items()}
        self._arrays = {name: graph.numpy.zeros(shape, graph.numpy.float32) for name, shape in shapes.items()}
        self._bindings: dict[tuple[int, int], Any] = {}

    def feed(
        self, row: int, tokens: Whole, past: int, wanted: Whole, beside: Beside | None = None, kept: bool = True
    ) -> Any:
        """See Memory."""
        del kept  # what nobody keeps is written over
        numpy, count = self._graph.numpy, len(tokens)
        total = past + count
        places = numpy.arange(past, total) if beside is None else numpy.array(beside.positions, numpy.int64)
        mask = numpy.zeros((count, total), numpy.float32) if beside is None else beside.bias
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
        """See Memory."""
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

    def share(self, end: int, rows: int) -> None:
        """See Memory."""
        for row in range(1, rows):
            self.copy(0, row, 0, end)

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """See Memory."""
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


@dataclass(frozen=True)
class _Call:
    """What a call left: values (rows, key heads, positions, head size) by the name of the input that takes them. Rows end together."""

    values: Mapping[str, Any]
    rows: int
    positions: int


@dataclass(frozen=True)
class _Row:
    """The first `length` of the positions of a call's row, which begin `begin` behind the call's own."""

    call: _Call
    row: int
    begin: int
    length: int


class RebuiltMemory:
    """What the last calls left. Rows of unequal lengths end together: that keeps the distances by which windows and ALiBi go; where
    the graph counts positions by itself, that would shift them, and rows must be of one length."""

    def __init__(self, graph: Graph, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self._graph = graph
        self._empty = self._shared = _Row(self._joined([], 0, 1), 0, 0, 0)
        self._kept = [self._empty] * rows

    def feed(
        self, row: int, tokens: Whole, past: int, wanted: Whole, beside: Beside | None = None, kept: bool = True
    ) -> Any:
        """See Memory."""
        assert beside is None, "this memory has no branches"
        numpy, total = self._graph.numpy, past + len(tokens)
        call = self._together([self._of_length(row, past)])
        ids, places = numpy.array([tokens], numpy.int64), numpy.arange(past, total)[None]
        logits, left = self._run(call, ids, numpy.ones((1, total), numpy.int64), places)
        if kept:
            self._kept[row] = _Row(left, 0, 0, total)
        return logits[0][list(wanted)]

    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> Any:
        """See Memory."""
        assert self._graph.uneven or len(set(lengths)) == 1, "this graph cannot step rows of unequal lengths"
        numpy, longest = self._graph.numpy, max(lengths)
        call = self._together([self._of_length(row, length) for row, length in enumerate(lengths)])
        # What other calls left is given back before the next one: it may be as large.
        self._keep(call, lengths)
        places = numpy.array(lengths, numpy.int64)[:, None]
        mask = (numpy.arange(longest + 1)[None] >= longest - places).astype(numpy.int64)
        logits, left = self._run(call, numpy.array(tokens, numpy.int64)[:, None], mask, places)
        self._keep(left, [length + 1 for length in lengths])
        return logits[:, 0]

    def _keep(self, call: _Call, lengths: Sequence[int]) -> None:
        rows = [_Row(call, row, call.positions - length, length) for row, length in enumerate(lengths)]
        self._kept = rows + [self._shared] * (self.rows - len(rows))

    def share(self, end: int, rows: int) -> None:
        """See Memory."""
        del rows
        self._shared = self._of_length(0, end)
        self._kept = [self._shared] * self.rows

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """See Memory. Nothing is copied: both rows are what one call left."""
        del start
        self._kept[target] = self._of_length(source, end)

    def _of_length(self, row: int, length: int) -> _Row:
        kept = self._kept[row] if length else self._empty
        assert length <= kept.length, "a row was asked for more than it was fed"
        return _Row(kept.call, kept.row, kept.begin, length)

    def _together(self, rows: Sequence[_Row]) -> _Call:
        """A call whose rows are these: one that was made, where it has exactly them, or a new one."""
        call, longest = rows[0].call, max(row.length for row in rows)
        whole = (call.rows, call.positions) == (len(rows), longest)
        if whole and all(
            item.call is call and item.row == row and item.begin + item.length == longest
            for row, item in enumerate(rows)
        ):
            return call
        return self._joined(rows, longest, len(rows))

    def _joined(self, rows: Sequence[_Row], longest: int, count: int) -> _Call:
        numpy, runtime = self._graph.numpy, self._graph.runtime
        values: dict[str, Any] = {}
        for name, (_, heads, _, size) in self._graph.pasts.items():
            array = numpy.zeros((count, heads, longest, size), numpy.float32)
            read: dict[int, Any] = {}  # each call is copied out once, however many of its rows are wanted
            for place, item in enumerate(rows):
                if not item.length:
                    continue
                if id(item.call) not in read:
                    read[id(item.call)] = item.call.values[name].numpy()
                end = item.begin + item.length
                array[place, :, longest - item.length :] = read[id(item.call)][item.row, :, item.begin : end]
            values[name] = runtime.OrtValue.ortvalue_from_numpy(array)
        return _Call(values, count, longest)

    def _run(self, call: _Call, ids: Any, mask: Any, places: Any) -> tuple[Any, _Call]:
        binding = self._graph.session.io_binding()
        for name, value in call.values.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_output(name.replace(graph_form.PAST, graph_form.PRESENT))
        given = {"input_ids": ids, "attention_mask": mask}
        if graph_form.POSITIONS in self._graph.inputs:
            given[graph_form.POSITIONS] = places
        logits = self._graph.run(binding, given)
        left = dict(zip(call.values, binding.get_outputs()[:-1], strict=True))
        return logits, _Call(left, call.rows, call.positions + ids.shape[1])
