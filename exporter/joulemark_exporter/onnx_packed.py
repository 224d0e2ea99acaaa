"""Matrices of integers inside ONNX graphs: the modules that take the place of torch's, and reading the integers back from a file.

    MatMulNBits           integers uint8 (rows, groups, bytes), two values a byte for four bits, the first one low; value s·(n − z)
    GatherBlockQuantized  the same bytes, rows picked by token

Nothing is rounded here but what a recipe's `embedding = "Q8_0"` asks for, on the grid of that type. Scales are halves, stored in 16 bits.
Truth: onnxruntime's ContribOperators.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from joulemark.errors import BadInput
from joulemark_exporter.families import HEAD
from joulemark_exporter.group_quantized import GroupQuantized, IntegerForm
from joulemark_exporter.quantizers import Choices, Integers, Rounded, Task
from joulemark_exporter.rounding import Rounding, round_to_grid

BITS = (4, 8)
SMALLEST_GROUP = 16
EIGHT_BITS = Rounding(8, 32)
"""The grid of Q8_0."""
EMBEDDINGS = ("Q8_0", "F16")
"""The types of embedding and output matrix that a graph of integers can hold."""
GATHER = "GatherBlockQuantized"
MULTIPLY = "MatMulNBits"
Factory = Callable[[Any], nn.Module]


def misfit(form: IntegerForm) -> str | None:
    """Why such integers cannot be put into a graph, or None when they can."""
    power = form.group_size >= SMALLEST_GROUP and not form.group_size & (form.group_size - 1)
    if form.bits not in BITS or not power or not form.contiguous:
        return "onnxruntime computes with 4 or 8 bits in contiguous groups of 16, 32, 64 …: change bits and group_size"
    if form.embedding not in EMBEDDINGS:
        return f"an embedding of type {form.embedding} has no place in a graph: use {' or '.join(EMBEDDINGS)}"
    return None


class Packed(nn.Module):
    """A matrix (rows, columns) as bytes and scales."""

    integers: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, matrix: GroupQuantized) -> None:
        super().__init__()
        self.rows, self.columns = matrix.shape
        self.bits, self.group_size = matrix.bits, matrix.group_size
        self.register_buffer("integers", torch.from_numpy(pack(matrix)))
        self.register_buffer("scales", torch.from_numpy(matrix.scales.astype(np.float32)))
        zeros = None if matrix.symmetric else torch.from_numpy(_nibbles(matrix.zeros, matrix.bits))
        self.register_buffer("zeros", zeros)


class PackedLinear(nn.Module):
    """In the place of a linear layer. `accuracy_level` 4 rounds activations to eight bits, 1 keeps them in 32."""

    def __init__(self, packed: Packed, bias: Tensor | None, accuracy_level: int) -> None:
        super().__init__()
        self.packed, self.accuracy_level = packed, accuracy_level
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        """(…, columns) → (…, rows)."""
        packed = self.packed
        attributes: Any = {
            "K": packed.columns,
            "N": packed.rows,
            "bits": packed.bits,
            "block_size": packed.group_size,
            "accuracy_level": self.accuracy_level,
        }
        given: list[Tensor | None] = [states, packed.integers, packed.scales]
        if packed.zeros is not None or self.bias is not None:
            given += [packed.zeros, None, self.bias]
        shape = (*states.shape[:-1], packed.rows)
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits", given, attributes, dtype=torch.float32, shape=shape, version=1
        )


class PackedEmbedding(nn.Module):
    """In the place of a token embedding; `scale` is what the model multiplies its rows by."""

    def __init__(self, packed: Packed, scale: float | None) -> None:
        super().__init__()
        self.packed, self.scale = packed, scale

    def forward(self, tokens: Tensor) -> Tensor:
        """(…) → (…, columns)."""
        packed = self.packed
        groups = packed.columns // packed.group_size
        attributes: Any = {"gather_axis": 0, "quantize_axis": 2, "block_size": packed.group_size, "bits": packed.bits}
        found = torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized",
            [packed.integers, tokens, packed.scales.reshape(packed.rows, groups, 1)],
            attributes,
            dtype=torch.float32,
            shape=(*tokens.shape, groups, packed.group_size),
            version=1,
        )
        rows = found.reshape(*tokens.shape, packed.columns)
        return rows if self.scale is None else rows * self.scale


def modules(task: Task, choices: Choices, accuracy_level: int) -> dict[str, Factory]:
    """What takes the place of which submodule. A tied output matrix and embedding share their bytes."""
    found: dict[str, Factory] = {}
    for name, choice in choices.by_name.items():
        if isinstance(choice, Integers):
            found[module(name)] = _linear(Packed(choice.load()), accuracy_level)
    embedding = choices.by_name[task.family.embedding]
    if packable(task, task.family.embedding, embedding):
        packed = Packed(_eight_bits(task, task.family.embedding))
        found[module(task.family.embedding)] = _embedding(packed)
        if task.family.is_tied(task.model.config):
            found[module(HEAD)] = _linear(packed, accuracy_level)
    if HEAD in choices.by_name and packable(task, HEAD, choices.by_name[HEAD]):
        found[module(HEAD)] = _linear(Packed(_eight_bits(task, HEAD)), accuracy_level)
    return found


def packed_names(task: Task, choices: Choices) -> dict[str, str]:
    """The submodule of every packed matrix, by state_dict name. A tied embedding is found under the output matrix's."""
    found = {name: module(name) for name, choice in choices.by_name.items() if isinstance(choice, Integers)}
    if found:
        tied = task.family.is_tied(task.model.config)
        for name, under in ((task.family.embedding, HEAD if tied else task.family.embedding), (HEAD, HEAD)):
            if name in choices.by_name and packable(task, name, choices.by_name[name]):
                found[name] = module(under)
    return found


def packable(task: Task, name: str, choice: Any) -> bool:
    """Whether an embedding or output matrix is stored in eight bits."""
    columns = task.model.weights[name].shape[1]
    return isinstance(choice, Rounded) and choice.type_name == "Q8_0" and columns % EIGHT_BITS.group_size == 0


def module(name: str) -> str:
    """The submodule that a weight belongs to."""
    return name.removesuffix(".weight")


def _eight_bits(task: Task, name: str) -> GroupQuantized:
    return round_to_grid(task.model.weights[name].whole(), EIGHT_BITS, threads=task.threads)


def _linear(packed: Packed, accuracy_level: int) -> Factory:
    return lambda replaced: PackedLinear(packed, getattr(replaced, "bias", None), accuracy_level)


def _embedding(packed: Packed) -> Factory:
    def make(replaced: Any) -> nn.Module:
        scale = getattr(replaced, "scalar_embed_scale", None)
        return PackedEmbedding(packed, None if scale is None else float(scale))

    return make


# --- bytes ------------------------------------------------------------------------------------------------------------
def pack(matrix: GroupQuantized) -> NDArray[np.uint8]:
    """(rows, groups, bytes of a group)."""
    rows, columns = matrix.shape
    grouped = matrix.integers.reshape(rows, columns // matrix.group_size, matrix.group_size)
    return _nibbles(grouped, matrix.bits)


def _nibbles(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Small integers packed along the last axis, which is filled up with zeros where it is odd."""
    if bits == 8:
        return np.ascontiguousarray(values)
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], 1), np.uint8)], axis=-1)
    return values[..., ::2] | (values[..., 1::2] << np.uint8(4))


def _apart(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The inverse of `_nibbles`."""
    if bits == 8:
        return packed
    return np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1).reshape(*packed.shape[:-1], -1)


def read_back(proto: onnx.ModelProto, names: Iterable[str]) -> dict[str, GroupQuantized]:
    """The matrices of a graph file by the names of the submodules that use them. Raises BadInput where one is missing."""
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    makers = {node.output[0]: node for node in proto.graph.node if node.op_type in ("Cast", "Reshape")}

    def value(name: str) -> NDArray[Any]:
        while name not in stored:
            name = makers[name].input[0]
        return numpy_helper.to_array(stored[name])

    found: dict[str, GroupQuantized] = {}
    for node in proto.graph.node:
        if node.op_type == GATHER:
            integers, scales, zeros = node.input[0], node.input[2], ""
        elif node.op_type == MULTIPLY:
            integers, scales, zeros = node.input[1], node.input[2], node.input[3] if len(node.input) > 3 else ""
        else:
            continue
        about = {item.name: item.i for item in node.attribute}
        module = integers.removeprefix("model.").removesuffix(".packed.integers")
        points = value(zeros) if zeros else None
        found[module] = _unpack(value(integers), value(scales), points, about["bits"], about["block_size"])
    missing = [name for name in names if name not in found]
    if missing:
        raise BadInput(f"the written graph has no integers of {missing[0]}", "this is a defect: report it")
    return found


def _unpack(
    packed: NDArray[Any], scales: NDArray[Any], points: NDArray[Any] | None, bits: int, group_size: int
) -> GroupQuantized:
    rows, groups = packed.shape[:2]
    integers = np.ascontiguousarray(_apart(packed, bits).reshape(rows, groups * group_size))
    zeros = np.full((rows, groups), 1 << (bits - 1), np.uint8)
    if points is not None:
        zeros = np.ascontiguousarray(_apart(points, bits)[:, :groups])
    halves = scales.astype(np.float16).reshape(rows, groups)
    return GroupQuantized(bits, group_size, points is None, integers, halves, zeros)
