"""ONNX for onnxruntime: a graph with key-value memory, the tokenizer and the chat template beside it.

Floats go through torch's exporter, for every family; four bits through onnxruntime-genai's builder, from the integers that a quantizer
chose."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import onnx

from joulemark.artifact import hash_file
from joulemark.errors import BadInput
from joulemark.wire import FileEntry, Manifest
from joulemark_exporter import configuration, hub_folder, onnx_graph, onnx_int4, torch_model
from joulemark_exporter.quantizers import Choices, IntegerForm, Integers, Task
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
    """`precision`: fp32; fp16 (matrices stored in 16 bits, computed in 32); int4 (from a quantizer's integers). `accuracy_level` of int4: 4
    rounds activations to eight bits, 1 keeps them in 32."""

    precision: Literal["fp32", "fp16", "int4"] = "fp32"
    accuracy_level: Literal[1, 4] = 4


def check(task: Task, options: Options, form: IntegerForm | None) -> None:
    """See the contract."""
    if not (task.model.folder / "tokenizer.json").is_file() and not (task.model.folder / "tokenizer.model").is_file():
        raise BadInput(f"there is no tokenizer in {task.model.folder}", "expected tokenizer.json or tokenizer.model")
    if options.precision != "int4":
        if form is not None:
            raise BadInput(
                f"{options.precision} holds no integers of a quantizer",
                'use precision = "int4", or the quantizer "none"',
            )
        return
    if form is None:
        raise BadInput("int4 needs integers", 'use the quantizer "gptq" or "rtn"')
    if task.model.model_type not in onnx_int4.BUILDABLE:
        raise BadInput(
            f"onnxruntime-genai's builder does not know {task.model.model_type} models",
            f"int4 is for {', '.join(onnx_int4.BUILDABLE)}; use fp32 or fp16",
        )
    if form.bits != 4 or form.group_size < 16 or form.group_size & (form.group_size - 1) or not form.contiguous:
        raise BadInput(
            "onnxruntime computes with 4 bits in contiguous groups of 16, 32, 64 …", "change bits and group_size"
        )


def write(task: Task, choices: Choices, folder: Path, options: Options) -> Written:
    """See the contract."""
    _write_tokenizer(task, folder)
    path, about = folder / "model.onnx", facts(task, choices, options)
    task.say("writing the graph", 0, 1)
    if options.precision == "int4":
        checkpoint = task.work / "checkpoint"
        shutil.rmtree(checkpoint, ignore_errors=True)
        form = next(choice.form for choice in choices.by_name.values() if isinstance(choice, Integers))
        hub_folder.write(task.model, checkpoint, choices, form)
        size = task.family.memory(task.model.config).head_size
        files = onnx_int4.write(checkpoint, task.work, path, about, size, options.accuracy_level)
    else:
        module = torch_model.build(task.model, task.family)
        files = onnx_graph.write(module, path, about, halved=options.precision == "fp16")
    task.say("writing the graph", 1, 1)
    beside = tuple(folder / name for name in ("tokenizer.json", "tokenizer_config.json"))
    # 16-bit matrices are widened when the graph is loaded, and its key-value memory is float32.
    numbers = sum(weight.size for weight in task.model.weights.values())
    widened = 4 * numbers if options.precision == "fp16" else None
    return Written((*files, *beside), "onnxruntime", memory_number_bytes=4, resident_bytes=widened)


def tools(options: Options) -> tuple[str, ...]:
    """See the contract."""
    return ("onnx", "onnxruntime", "onnxruntime-genai" if options.precision == "int4" else "onnxscript")


def describe(task: Task, choices: Choices, written: Written) -> Manifest:
    """See the contract."""
    graph = [path for path in written.files if path.name.startswith("model.onnx")]
    about = {item.key: item.value for item in onnx.load(graph[0], load_external_data=False).metadata_props}
    told: dict[str, Any] = {key.removeprefix(onnx_graph.PREFIX): json.loads(value) for key, value in about.items()}
    template = json.loads((graph[0].parent / "tokenizer_config.json").read_bytes())["chat_template"]
    entries = {
        path.name: FileEntry(path=path.name, size_bytes=path.stat().st_size, sha256=hash_file(path))
        for path in written.files
    }
    return Manifest(
        name=task.name,
        format="onnx",
        files=tuple(entries.values()),
        architecture=told["architecture"],
        quantization=told["quantization"],
        parameters=told["parameters"],
        weight_bytes=sum(entries[path.name].size_bytes for path in graph),
        context_tokens=told["context_tokens"],
        chat_template_sha256=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        tokenizer_sha256=entries["tokenizer.json"].sha256,
        licence=task.licence,
    )


def read_back(task: Task, choices: Choices, written: Written) -> dict[str, Weight]:
    """See the contract: what was chosen, because graphs are rewritten too freely to read weights out of them."""
    del written
    found = dict(task.model.weights)
    for name, choice in choices.by_name.items():
        if isinstance(choice, Integers):
            found[name] = replace(found[name], read=functools.partial(_dequantized, choice))
    return found


def _dequantized(choice: Integers, start: int, stop: int) -> Float32:
    return choice.load().dequantize()[start:stop]


def facts(task: Task, choices: Choices, options: Options) -> dict[str, Any]:
    """What an engine must know beside the graph."""
    config = task.model.config
    numbers = sum(weight.size for weight in task.model.weights.values())
    return {
        "architecture": config["model_type"],
        "precision": options.precision,
        "quantization": choices.title if options.precision == "int4" else options.precision,
        "parameters": numbers,
        "context_tokens": task.family.context(config),
        "vocabulary": int(config["vocab_size"]),
        "end_tokens": _end_tokens(task),
    }


def _end_tokens(task: Task) -> list[int]:
    """Ids that end a generation: what configuration and generation settings say, and tokens that always do."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = task.model.folder / name
        stated = configuration.read_json(path).get("eos_token_id") if path.is_file() else None
        found.update(value for value in (stated if isinstance(stated, list) else [stated]) if isinstance(value, int))
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(task.model.folder, trust_remote_code=False).get_added_vocab()
    found.update(vocabulary[token] for token in ENDS if token in vocabulary)
    return sorted(found)


def _write_tokenizer(task: Task, folder: Path) -> None:
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
