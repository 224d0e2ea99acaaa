"""A causal language model as an ONNX graph with a key-value memory, through torch's exporter, for every family.

Its form is the growing one of `joulemark.graph_form`. Picking positions before the output matrix is applied saves a fifth of a small
model's work. The class computes; nothing is rewritten here but floats stored in 16 bits."""

from __future__ import annotations

import inspect
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from joulemark import graph_form
from joulemark.graph_form import GraphFacts
from joulemark_exporter.families import Memory
from joulemark_exporter.onnx_attention import Attention, Given, PassedThrough

OPSET = 21
LARGEST_FILE = 1_500_000_000
"""Bytes of weights beyond which they go into a file beside the graph: protobuf ends at 2 GiB."""
DATA_NAME = "model.onnx.data"
SMALLEST_HALVED = 1 << 12
"""Numbers below which a tensor stays in 32 bits."""


class _WithMemory(nn.Module):
    """The model with its memory as plain tensors, in and out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        self._memory = "cache" if "cache" in parameters else "past_key_values"
        self._positions = "position_ids" in parameters
        self._attention = Attention(model)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_bias: Tensor,
        key_positions: Tensor,
        last_keys: Tensor,
        total_keys: Tensor,
        logit_positions: Tensor,
        past: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """See the module."""
        self._attention.begin(Given(position_ids, attention_bias, key_positions, last_keys, total_keys, past))
        named: dict[str, Any] = {self._memory: PassedThrough(), "use_cache": True, "logits_to_keep": logit_positions}
        if self._positions:
            named["position_ids"] = position_ids
        found = self.model(input_ids=input_ids, **named)
        return (found.logits, *self._attention.present)


def names(layers: int) -> tuple[list[str], list[str]]:
    """(inputs, outputs) of the graph, in order."""
    parts = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    inputs = [*graph_form.GROWING_INPUTS, *(f"{graph_form.PAST}{part}" for part in parts)]
    return inputs, [graph_form.LOGITS, *(f"{graph_form.PRESENT}{part}" for part in parts)]


def write(model: Any, memory: Memory, path: Path, facts: GraphFacts, halved: bool = False) -> tuple[Path, ...]:
    """Writes the graph of a transformers model, which is changed, in float32; returns its files.

    `halved` stores matrices in 16 bits: they are widened when the file is loaded, so that only the weights are rounded (scales of packed
    matrices are halves already: they lose nothing). `facts` become metadata."""
    batch, capacity, tokens, keys = 2, 11, 3, 8  # any numbers above one: ones would be taken for constants
    past = tuple(torch.zeros(batch, memory.heads, capacity, memory.head_size) for _ in range(2 * memory.layers))
    example = (
        torch.ones((batch, tokens), dtype=torch.int64),
        torch.arange(keys - tokens, keys)[None].repeat(batch, 1),
        torch.zeros((1, 1, tokens, keys)),
        torch.arange(keys),
        torch.full((batch,), keys - 1, dtype=torch.int32),
        torch.tensor([keys], dtype=torch.int32),
        torch.tensor([0, tokens - 1]),
        past,
    )
    free = torch.export.Dim.DYNAMIC
    plane, line = {0: free, 1: free}, {0: free}
    shapes = (plane, plane, {2: free, 3: free}, line, line, None, line, tuple({0: free, 2: free} for _ in past))
    inputs, outputs = names(memory.layers)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program: Any = torch.onnx.export(
            _WithMemory(model).eval(),
            example,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=shapes,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
        )
    proto = program.model_proto
    if halved:
        _halve(proto)
    return save(proto, path, facts)


def save(proto: onnx.ModelProto, path: Path, facts: GraphFacts) -> tuple[Path, ...]:
    """Writes a graph with its metadata: one file, or two where protobuf's limit asks for it. Returns them, the graph first."""
    helper.set_model_props(proto, graph_form.to_metadata(facts))
    large = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > LARGEST_FILE
    onnx.save_model(
        proto, path, save_as_external_data=large, all_tensors_to_one_file=True, location=DATA_NAME, size_threshold=1024
    )
    return (path, path.with_name(DATA_NAME)) if large else (path,)


def _halve(proto: onnx.ModelProto) -> None:
    """Large float32 matrices in 16 bits, each followed by a widening; engines do that once, when they load the file."""
    graph = proto.graph
    widened: list[onnx.NodeProto] = []
    for tensor in graph.initializer:
        wide = tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and _size(tensor) >= SMALLEST_HALVED
        if not wide:
            continue
        name = tensor.name
        narrow = numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float16"), f"{name}.half")
        tensor.CopyFrom(narrow)
        widened.append(helper.make_node("Cast", [narrow.name], [name], f"{name}.widen", to=TensorProto.FLOAT))
    nodes = [*widened, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _size(tensor: TensorProto) -> int:
    size = 1
    for dimension in tensor.dims:
        size *= dimension
    return size
