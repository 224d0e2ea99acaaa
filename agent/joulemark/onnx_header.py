"""Looks at an ONNX file before an engine does: every length inside its bounds, every tensor in the file or in a file of the same artifact.

ONNX Runtime opens whatever file a tensor names, and follows hard links; its protobuf reader takes what it is told. So this walks the
messages of the format (onnx.proto of the ONNX project; field numbers below) with bounds of its own and reads nothing but structure: no
weights, no names but those of files. A graph with training information is refused, and so is one whose functions or branches lie too deep.
The file is read, not mapped: one that shrinks under a mapping kills the process. Sizes are in bytes. Standard library only.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from joulemark.errors import ModelRejected

MAX_DEPTH = 24
MAX_MESSAGES = 5_000_000
MAX_NAME = 1024
MAX_ELEMENTS = 1 << 40
BLOCK = 32 * 1024
KEPT_BLOCKS = 64
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# By message: the fields that hold messages, and which. All others are skipped by their length.
_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _FUNCTION = range(7)
_INSIDE: dict[int, dict[int, int]] = {
    _MODEL: {7: _GRAPH, 25: _FUNCTION},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _TENSOR: {},
}
_TRAINING = 20
_DIMS, _EXTERNAL, _LOCATION = 1, 13, 14


@dataclass(frozen=True)
class OnnxFacts:
    """What was seen: tensors with their bytes elsewhere, by the file's name, and how many messages there are."""

    external: Mapping[str, int]
    tensors: int
    messages: int


@dataclass
class _Seen:
    external: dict[str, int] = field(default_factory=dict[str, int])
    tensors: int = 0
    messages: int = 0


def read_onnx(path: Path, files: Mapping[str, int]) -> OnnxFacts:
    """The structure of the ONNX file at `path`; `files` are the names and sizes of the artifact's files, which tensors may lie in.

    Raises ModelRejected for what is cut, absurd, too deep, or names any other file.
    """
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size < 8:
            raise _rejected("it is too short for a graph")
        seen = _Seen()
        graphs = _walk(_Bytes(stream.fileno()), size, files, seen)
        if graphs != 1:
            raise _rejected(f"it holds {graphs} graphs instead of one")
        return OnnxFacts(seen.external, seen.tensors, seen.messages)


class _Bytes:
    """A file's bytes by their place, read in blocks of which the last few are kept."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def byte(self, place: int) -> int:
        """One byte."""
        number, within = divmod(place, BLOCK)
        block = self._blocks.get(number)
        if block is None:
            block = self._blocks[number] = os.pread(self._descriptor, BLOCK, number * BLOCK)
            if len(self._blocks) > KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        if within >= len(block):
            raise _rejected(f"it became shorter while byte {place} was read")
        return block[within]

    def piece(self, start: int, end: int) -> bytes:
        """A short piece."""
        return os.pread(self._descriptor, end - start, start)


def _walk(data: _Bytes, size: int, files: Mapping[str, int], seen: _Seen) -> int:
    """Visits every message once, without recursion; how many graphs the model has at its top."""
    graphs = 0
    waiting = [(_MODEL, 0, size, 0)]
    while waiting:
        kind, start, end, depth = waiting.pop()
        seen.messages += 1
        if seen.messages > MAX_MESSAGES:
            raise _rejected(f"it has more than {MAX_MESSAGES} parts")
        if depth > MAX_DEPTH:
            raise _rejected(f"its parts lie more than {MAX_DEPTH} deep")
        if kind == _TENSOR:
            _check_tensor(data, start, end, files, seen)
            continue
        inside = _INSIDE[kind]
        for number, wire, first, last in _fields(data, start, end):
            if kind == _MODEL and number == _TRAINING:
                raise _rejected("it brings training information, which no board needs")
            if number not in inside:
                continue
            if wire != _BYTES:
                raise _rejected(f"field {number} of a part is no message")
            if kind == _MODEL and number == 7:
                graphs += 1
            waiting.append((inside[number], first, last, depth + 1))
    return graphs


def _fields(data: _Bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, first byte, end) of each field of a message; of a number (wire type 0) `first` is its value."""
    place = start
    while place < end:
        key, place = _varint(data, place, end)
        number, wire = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise _rejected(f"at byte {place} there is a field {number}")
        if wire == _VARINT:
            value, place = _varint(data, place, end)
            yield number, wire, value, place
            continue
        if wire == _BYTES:
            length, place = _varint(data, place, end)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise _rejected(f"at byte {place} there is a field of a kind ({wire}) that the format has not")
        if length > end - place:
            raise _rejected(
                f"a part at byte {place} says it has {length} bytes, {end - place} are left: the file is cut or forged"
            )
        yield number, wire, place, place + length
        place += length


def _check_tensor(data: _Bytes, start: int, end: int, files: Mapping[str, int], seen: _Seen) -> None:
    """Its shape is a shape, and its bytes, if they lie elsewhere, lie in a file of this artifact."""
    seen.tensors += 1
    elements = 1
    outside: dict[str, str] = {}
    is_outside = False
    for number, wire, first, last in _fields(data, start, end):
        if number == _DIMS:
            for size in [first] if wire == _VARINT else _packed(data, first, last):
                elements *= size
                if elements > MAX_ELEMENTS:  # negative ones are huge as varints
                    raise _rejected("a tensor has a shape that nothing can hold")
        elif number == _EXTERNAL and wire == _BYTES:
            key, value = _entry(data, first, last)
            outside[key] = value
        elif number == _LOCATION and wire == _VARINT:
            is_outside = first != 0
    if outside or is_outside:
        _check_outside(outside, files, seen)


def _check_outside(entry: Mapping[str, str], files: Mapping[str, int], seen: _Seen) -> None:
    name = entry.get("location", "")
    if name not in files:
        raise _rejected(f"a tensor lies in {name[:100]!r}, which is no file of this artifact")
    try:
        offset, length = int(entry.get("offset", "0")), int(entry.get("length", "0"))
    except ValueError:
        raise _rejected("a tensor lies at a place that is no number") from None
    if offset < 0 or length < 0 or offset + length > files[name]:
        raise _rejected(
            f"a tensor lies at bytes {offset} to {offset + length} of {name[:100]!r}, which has {files[name]}"
        )
    seen.external[name] = seen.external.get(name, 0) + 1


def _entry(data: _Bytes, start: int, end: int) -> tuple[str, str]:
    """A key and a value, both short."""
    found = {1: "", 2: ""}
    for number, wire, first, last in _fields(data, start, end):
        if number not in found:
            continue
        if wire != _BYTES or last - first > MAX_NAME:
            raise _rejected("where a tensor lies is said in no way that the format has")
        try:
            found[number] = data.piece(first, last).decode("utf-8")
        except UnicodeDecodeError:
            raise _rejected("where a tensor lies is said in no text") from None
    return found[1], found[2]


def _packed(data: _Bytes, start: int, end: int) -> Iterator[int]:
    place = start
    while place < end:
        value, place = _varint(data, place, end)
        yield value


def _varint(data: _Bytes, place: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= end:
            raise _rejected(f"it ends in the middle of a number at byte {place}: the file is cut")
        byte = data.byte(place)
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise _rejected(f"a number before byte {place} has more than ten bytes")


def _rejected(why: str) -> ModelRejected:
    return ModelRejected(
        f"this is no ONNX graph that may be opened: {why}", "export it again, or fetch it from where it came"
    )
