"""Four-bit ONNX graphs from GPTQ's integers, through onnxruntime-genai's model builder in a process of its own.

Owns the call, and what is changed in the graph it writes: the wanted positions are picked before the output matrix is applied, and that
matrix is stored in eight bits on our own grid. The builder would round it and the embedding to four bits without having been asked, so
both are kept out of its hands. Truth: onnxruntime_genai.models.builder 0.18; MatMulNBits in onnxruntime's ContribOperators.md."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from joulemark.errors import EngineFailed
from joulemark_exporter import onnx_graph
from joulemark_exporter.rounding import Rounding, round_to_grid

BUILDABLE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
"""Model types that the builder knows, of ours. It has no GPT-2, OPT and BLOOM."""
HEAD = "/lm_head/MatMul"
EMBEDDING = "/model/embed_tokens/Gather"
HEAD_BLOCK = 32
TAIL_BYTES = 1500
MICROSOFT = "com.microsoft"


def write(
    checkpoint: Path, work: Path, path: Path, about: Mapping[str, Any], head_size: int, accuracy_level: int
) -> tuple[Path, ...]:
    """Builds a graph from a GPTQ checkpoint; returns its files. Raises EngineFailed with the builder's last words."""
    built = work / "built"
    _build(checkpoint, built, work / "builder-cache", accuracy_level)
    proto = onnx.load(built / "model.onnx")
    _state_head_size(proto, head_size)
    _pick_positions(proto)
    _store_head_in_eight_bits(proto, accuracy_level)
    return onnx_graph.finish(proto, path, about)


def _build(checkpoint: Path, out: Path, cache: Path, accuracy_level: int) -> None:
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(checkpoint),
        "-o",
        str(out),
        "-c",
        str(cache),
    ]
    options = [f"accuracy_level={accuracy_level}", f"nodes_to_exclude={HEAD},{EMBEDDING}", "shared_embeddings=false"]
    command += ["-p", "int4", "-e", "cpu", "--extra_options", *options]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
    )
    if done.returncode != 0 or not (out / "model.onnx").is_file():
        raise EngineFailed(
            f"onnxruntime-genai's builder failed ({done.returncode}): {done.stderr[-TAIL_BYTES:].strip()}",
            "use fp32 or fp16, or the GGUF format; the builder knows " + ", ".join(BUILDABLE),
        )


def _state_head_size(proto: onnx.ModelProto, head_size: int) -> None:
    """The builder leaves the last dimension of the memory open; an engine must know it to begin with an empty one."""
    for item in (*proto.graph.input, *proto.graph.output):
        if item.name.startswith(("past_key_values.", "present.")):
            item.type.tensor_type.shape.dim[3].dim_value = head_size


def _pick_positions(proto: onnx.ModelProto) -> None:
    """Puts `logit_positions` (wanted,) before the output matrix."""
    head = _head(proto)
    graph = proto.graph
    graph.input.append(helper.make_tensor_value_info("logit_positions", TensorProto.INT64, ["wanted"]))
    picked = helper.make_node(
        "Gather", [head.input[0], "logit_positions"], ["logit_positions/states"], "logit_positions/Gather", axis=1
    )
    head.input[0] = picked.output[0]
    graph.node.insert(list(graph.node).index(head), picked)
    logits = next(item for item in graph.output if item.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "wanted"


def _head(proto: onnx.ModelProto) -> onnx.NodeProto:
    found = [node for node in proto.graph.node if node.name == HEAD]
    if len(found) != 1 or found[0].op_type != "MatMul":
        raise EngineFailed(
            "the builder's graph has no output matrix where it was expected",
            "this version of the builder is not known: use 0.18",
        )
    return found[0]


def _store_head_in_eight_bits(proto: onnx.ModelProto, accuracy_level: int) -> None:
    """The output matrix as MatMulNBits: symmetric integers in blocks of 32, as Q8_0 has them."""
    head, graph = _head(proto), proto.graph
    stored = next(tensor for tensor in graph.initializer if tensor.name == head.input[1])
    weights = np.ascontiguousarray(numpy_helper.to_array(stored).T.astype(np.float32))
    rows, columns = weights.shape
    if columns % HEAD_BLOCK:
        return
    matrix = round_to_grid(weights, Rounding(8, HEAD_BLOCK))
    names = [f"{stored.name}.integers", f"{stored.name}.scales"]
    integers = matrix.integers.reshape(rows, columns // HEAD_BLOCK, HEAD_BLOCK)
    graph.initializer.append(numpy_helper.from_array(integers, names[0]))
    graph.initializer.append(numpy_helper.from_array(matrix.scales.astype(np.float32), names[1]))
    attributes: Any = {"K": columns, "N": rows, "bits": 8, "block_size": HEAD_BLOCK, "accuracy_level": accuracy_level}
    replaced = helper.make_node(
        "MatMulNBits", [head.input[0], *names], list(head.output), HEAD, domain=MICROSOFT, **attributes
    )
    place = list(graph.node).index(head)
    graph.node.remove(head)
    graph.node.insert(place, replaced)
    graph.initializer.remove(stored)
