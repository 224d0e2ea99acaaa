"""ONNX for onnxruntime: a graph with key-value memory, the tokenizer and the chat template beside it.

Everything goes through torch's exporter, for every family; the integers that a quantizer chose are put into the graph as they are."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import onnx

from joulemark import artifact, graph_form
from joulemark.errors import BadInput
from joulemark.graph_form import GraphFacts
from joulemark.wire import FileEntry, Manifest
from joulemark_exporter import configuration, onnx_graph, onnx_packed, torch_model
from joulemark_exporter.group_quantized import GroupQuantized
from joulemark_exporter.onnx_attention import HEAD_MULTIPLE
from joulemark_exporter.quantizers import Choices, IntegerForm, Task
from joulemark_exporter.recipe import Settings
from joulemark_exporter.weights import Float32, Weight
from joulemark_exporter.writers import Written

ENDS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "</s>",
    "<|eot|>",
)
"""Tokens that end a generation whatever config.json says, as llama.cpp takes them (llama-vocab.cpp, special_eog_ids)."""


class Options(Settings):
    """`precision`: fp32; fp16 (matrices stored in 16 bits, computed in 32); int4 and int8 (a quantizer's integers). `accuracy_level` of
    integers: 4 rounds activations to eight bits, 1 keeps them in 32."""

    precision: Literal["fp32", "fp16", "int4", "int8"] = "fp32"
    accuracy_level: Literal[1, 4] = 4


def check(task: Task, options: Options, form: IntegerForm | None) -> None:
    """See the contract."""
    if not (task.model.folder / "tokenizer.json").is_file() and not (task.model.folder / "tokenizer.model").is_file():
        raise BadInput(f"there is no tokenizer in {task.model.folder}", "expected tokenizer.json or tokenizer.model")
    size = task.family.memory(task.model.config).head_size
    if size % HEAD_MULTIPLE:
        raise BadInput(
            f"the heads of this model have {size} numbers, onnxruntime's attention wants a multiple of {HEAD_MULTIPLE}",
            "use the GGUF format",
        )
    if not options.precision.startswith("int"):
        if form is not None:
            raise BadInput(
                f"{options.precision} holds no integers of a quantizer",
                f'use precision = "int{form.bits}", or the quantizer "none"',
            )
        return
    if form is None:
        raise BadInput(f"{options.precision} needs integers", 'use the quantizer "gptq" or "rtn"')
    why = onnx_packed.misfit(form)
    if why is not None:
        raise BadInput(why, "or use the GGUF format")
    if options.precision != f"int{form.bits}":
        raise BadInput(f"{options.precision} cannot hold {form.bits} bits", f'use precision = "int{form.bits}"')


def write(task: Task, choices: Choices, folder: Path, options: Options) -> Written:
    """See the contract."""
    # Once in the working folder, and once more when it is published; of integers as if all were eight bits.
    width = {"fp32": 4, "fp16": 2}.get(options.precision, 1)
    artifact.check_space(folder, 2 * width * sum(weight.size for weight in task.model.weights.values()))
    write_tokenizer(task, folder)
    path = folder / "model.onnx"
    task.say("writing the graph", 0, 1)
    integers = options.precision.startswith("int")
    instead = onnx_packed.modules(task, choices, options.accuracy_level) if integers else None
    module = torch_model.build(task.model, task.family, instead)
    memory = task.family.memory(task.model.config)
    files = onnx_graph.write(module, memory, path, facts(task, choices, options), halved=options.precision != "fp32")
    task.say("writing the graph", 1, 1)
    beside = tuple(folder / name for name in ("tokenizer.json", "tokenizer_config.json"))
    return Written(
        (*files, *beside), "onnxruntime", memory_number_bytes=4, resident_bytes=_resident_bytes(task, files, options)
    )


def _resident_bytes(task: Task, files: Sequence[Path], options: Options) -> int | None:
    """What onnxruntime holds of the weights: 16-bit matrices widened; of integers the file's bytes and its own order of them beside (184 MB
    of a file of 94 MB, SmolLM2-135M, onnxruntime 1.32)."""
    if options.precision == "fp16":
        return 4 * sum(weight.size for weight in task.model.weights.values())
    return 2 * sum(path.stat().st_size for path in files) if options.precision != "fp32" else None


def tools(options: Options) -> tuple[str, ...]:
    """See the contract."""
    del options
    return ("onnx", "onnxruntime", "onnxscript")


def describe(task: Task, choices: Choices, written: Written) -> Manifest:
    """See the contract."""
    graph = [path for path in written.files if path.name.startswith("model.onnx")]
    metadata = onnx.load(graph[0], load_external_data=False).metadata_props
    told = graph_form.from_metadata({item.key: item.value for item in metadata})
    template = json.loads((graph[0].parent / "tokenizer_config.json").read_bytes())["chat_template"]
    entries = {
        path.name: FileEntry(path=path.name, size_bytes=path.stat().st_size, sha256=artifact.hash_file(path))
        for path in written.files
    }
    return Manifest(
        name=task.name,
        format="onnx",
        files=tuple(entries.values()),
        architecture=told.architecture,
        quantization=told.quantization,
        parameters=told.parameters,
        weight_bytes=sum(entries[path.name].size_bytes for path in graph),
        context_tokens=told.context_tokens,
        chat_template_sha256=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        tokenizer_sha256=entries["tokenizer.json"].sha256,
        licence=task.licence,
    )


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


def facts(task: Task, choices: Choices, options: Options) -> GraphFacts:
    """What an engine must know beside the graph."""
    config = task.model.config
    return GraphFacts(
        architecture=config["model_type"],
        precision=options.precision,
        quantization=choices.title if options.precision.startswith("int") else options.precision,
        parameters=sum(weight.size for weight in task.model.weights.values()),
        context_tokens=task.family.context(config),
        vocabulary=int(config["vocab_size"]),
        end_tokens=_end_tokens(task),
    )


def _end_tokens(task: Task) -> tuple[int, ...]:
    """Ids that end a generation: what configuration and generation settings say, and tokens that always do."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = task.model.folder / name
        stated = configuration.read_json(path).get("eos_token_id") if path.is_file() else None
        found.update(value for value in (stated if isinstance(stated, list) else [stated]) if isinstance(value, int))
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(task.model.folder, trust_remote_code=False).get_added_vocab()
    found.update(vocabulary[token] for token in ENDS if token in vocabulary)
    return tuple(sorted(found))


def write_tokenizer(task: Task, folder: Path) -> None:
    """The tokenizer as transformers uses it, in the one file that the board's library reads, and the template in its settings."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(task.model.folder, trust_remote_code=False)
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
    settings = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "chat_template": tokenizer.chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False))
