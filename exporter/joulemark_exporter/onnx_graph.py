"""A causal language model as an ONNX graph with a key-value memory, through torch's exporter, for every family.

    input_ids (batch, tokens) · attention_mask (batch, past + tokens) · position_ids (batch, tokens) · logit_positions (wanted,)
    past_key_values.N.key / .value (batch, key heads, past, head size)
    → logits (batch, wanted, vocabulary) · present.N.key / .value

`logit_positions` picks the positions whose logits are wanted before the output matrix is applied, which is a fifth of a small model's
work. What an engine must know of the model beside the graph is in the file's metadata, under `joulemark.`. The class computes; nothing is
rewritten here."""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from transformers import DynamicCache

OPSET = 21
LARGEST_FILE = 1_500_000_000
"""Bytes of weights beyond which they go into a file beside the graph: protobuf ends at 2 GiB."""
DATA_NAME = "model.onnx.data"
PREFIX = "joulemark."
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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logit_positions: Tensor,
        past: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """See the module."""
        memory: Any = DynamicCache()
        for layer in range(len(past) // 2):
            memory.update(past[2 * layer], past[2 * layer + 1], layer)
        named: dict[str, Any] = {self._memory: memory, "use_cache": True, "logits_to_keep": logit_positions}
        if self._positions:
            named["position_ids"] = position_ids
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, **named)
        present: list[Tensor] = [tensor for layer in memory.layers for tensor in (layer.keys, layer.values)]
        return (found.logits, *present)


def names(layers: int) -> tuple[list[str], list[str]]:
    """(inputs, outputs) of the graph, in order."""
    parts = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    inputs = [
        "input_ids",
        "attention_mask",
        "position_ids",
        "logit_positions",
        *(f"past_key_values.{part}" for part in parts),
    ]
    return inputs, ["logits", *(f"present.{part}" for part in parts)]


def write(model: Any, path: Path, about: Mapping[str, Any], halved: bool = False) -> tuple[Path, ...]:
    """Writes the graph of a transformers model in float32; returns its files. `halved` stores matrices in 16 bits: they are widened when
    the file is loaded, so that only the weights are rounded. `about` becomes metadata, as JSON values."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    batch, before, tokens = 2, 5, 3  # any numbers above one: ones would be taken for constants
    past = tuple(torch.randn(batch, heads, before, size) for _ in range(2 * config.num_hidden_layers))
    example = (
        torch.ones((batch, tokens), dtype=torch.int64),
        torch.ones((batch, before + tokens), dtype=torch.int64),
        torch.arange(before, before + tokens)[None].repeat(batch, 1),
        torch.tensor([0, tokens - 1]),
        past,
    )
    free = torch.export.Dim.DYNAMIC
    plane = {0: free, 1: free}
    shapes = (plane, plane, plane, {0: free}, tuple({0: free, 2: free} for _ in past))
    inputs, outputs = names(config.num_hidden_layers)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program: Any = torch.onnx.export(
            _WithMemory(model.eval()),
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
    return finish(proto, path, about)


def finish(proto: onnx.ModelProto, path: Path, about: Mapping[str, Any]) -> tuple[Path, ...]:
    """Writes a graph with its metadata: one file, or two where protobuf's limit asks for it. Returns them, the graph first."""
    helper.set_model_props(proto, {f"{PREFIX}{name}": json.dumps(value) for name, value in about.items()})
    large = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > LARGEST_FILE
    onnx.save_model(
        proto, path, save_as_external_data=large, all_tensors_to_one_file=True, location=DATA_NAME, size_threshold=1024
    )
    return (path, path.with_name(DATA_NAME)) if large else (path,)


def _halve(proto: onnx.ModelProto) -> None:
    """Large float32 tensors in 16 bits, each followed by a widening; engines do that once, when they load the file."""
    graph = proto.graph
    widened: list[onnx.NodeProto] = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2 or _size(tensor) < SMALLEST_HALVED:
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
