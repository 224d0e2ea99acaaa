"""ONNX for onnxruntime: a graph whose key-value memory grows in place, the tokenizer and the chat template beside it.

Everything goes through torch's exporter, for every family; the integers that a quantizer chose are put into the graph as they are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import onnx

from joulemark import artifact
from joulemark.errors import BadInput
from joulemark.wire import Manifest
from joulemark_exporter import onnx_artifact, onnx_graph, onnx_packed, torch_model
from joulemark_exporter.group_quantized import GroupQuantized
from joulemark_exporter.onnx_attention import HEAD_MULTIPLE
from joulemark_exporter.quantizers import Choices, Floats, GgufTypes, Numbers, Task
from joulemark_exporter.recipe import Settings
from joulemark_exporter.weights import Float32, Weight
from joulemark_exporter.writers import Written, versions

FLOATS = {"fp32": "F32", "fp16": "F16"}
"""Precisions of floats, by what GGUF calls them."""


class Options(Settings):
    """`precision`: fp32; fp16 (matrices stored in 16 bits, computed in 32); int4 and int8 (a quantizer's integers). `accuracy_level` of
    integers: 4 rounds activations to eight bits, 1 keeps them in 32."""

    precision: Literal["fp32", "fp16", "int4", "int8"] = "fp32"
    accuracy_level: Literal[1, 4] = 4


def check(task: Task, options: Options, numbers: Numbers) -> None:
    """See the contract."""
    onnx_artifact.check_tokenizer(task)
    size = task.family.memory(task.model.config).head_size
    if size % HEAD_MULTIPLE:
        raise BadInput(
            f"the heads of this model have {size} numbers, onnxruntime's attention wants a multiple of {HEAD_MULTIPLE}",
            "use the GGUF format",
        )
    if isinstance(numbers, GgufTypes):
        raise BadInput("this quantizer gives types that only GGUF has", 'use the GGUF format, or "gptq" or "rtn"')
    if isinstance(numbers, Floats):
        if options.precision not in FLOATS:
            raise BadInput(f"{options.precision} needs integers", 'use the quantizer "gptq" or "rtn"')
        onnx_artifact.check_floats(numbers, FLOATS[options.precision])
        return
    if options.precision in FLOATS:
        raise BadInput(
            f"{options.precision} holds no integers of a quantizer",
            f'use precision = "int{numbers.bits}", or the quantizer "none"',
        )
    why = onnx_packed.misfit(numbers)
    if why is not None:
        raise BadInput(why, "or use the GGUF format")
    if options.precision != f"int{numbers.bits}":
        raise BadInput(f"{options.precision} cannot hold {numbers.bits} bits", f'use precision = "int{numbers.bits}"')


def write(task: Task, choices: Choices, folder: Path, options: Options) -> Written:
    """See the contract."""
    # Once in the working folder, and once more when it is published; of integers as if all were eight bits.
    width = {"fp32": 4, "fp16": 2}.get(options.precision, 1)
    artifact.check_space(folder, 2 * width * sum(weight.size for weight in task.model.weights.values()))
    tokenizer = onnx_artifact.write_tokenizer(task, folder)
    path = folder / "model.onnx"
    task.say("writing the graph", 0, 1)
    integers = options.precision not in FLOATS
    instead = onnx_packed.modules(task, choices, options.accuracy_level) if integers else None
    module = torch_model.build(task.model, task.family, instead)
    memory = task.family.memory(task.model.config)
    facts = onnx_artifact.facts(task, options.precision, choices.title if integers else options.precision)
    files = onnx_graph.write(module, memory, path, facts, halved=options.precision != "fp32")
    task.say("writing the graph", 1, 1)
    loaded = _loaded_bytes(task, files, options)
    exact = options.precision == "fp32"
    return Written((*files, *tokenizer), "onnxruntime", memory_number_bytes=4, loaded_weight_bytes=loaded, exact=exact)


def _loaded_bytes(task: Task, files: Sequence[Path], options: Options) -> int:
    """What onnxruntime holds of the weights: 16-bit matrices widened; of integers the file's bytes and its own order of them beside (184 MB
    of a file of 94 MB, SmolLM2-135M, onnxruntime 1.32)."""
    if options.precision in FLOATS:
        return onnx_artifact.loaded_floats(task)
    return 2 * sum(path.stat().st_size for path in files)


def tools(options: Options) -> dict[str, str]:
    """See the contract."""
    del options
    return versions("onnx", "onnxruntime", "onnxscript")


def describe(task: Task, choices: Choices, written: Written) -> Manifest:
    """See the contract."""
    del choices
    return onnx_artifact.describe(task, written)


def read_back(task: Task, choices: Choices, written: Written) -> dict[str, Weight]:
    """See the contract: the integers as the file holds them. Floats are the model's own: the exporter folds them into other shapes."""
    found = dict(task.model.weights)
    packed = onnx_packed.packed_names(task, choices)
    if not packed:
        return found
    linears = task.family.matrices(task.model.config)
    matrices = onnx_packed.read_back(onnx.load(written.files[0]), packed.values())
    for name, module in packed.items():
        turned = name in linears and linears[name].transposed
        found[name] = replace(found[name], read=functools.partial(_rows, matrices[module], turned))
    return found


def _rows(matrix: GroupQuantized, turned: bool, start: int, stop: int) -> Float32:
    values = matrix.dequantize()
    return (values.T.copy() if turned else values)[start:stop]
