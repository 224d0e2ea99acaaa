"""What an ONNX artifact has beside its graph, whoever wrote that: the tokenizer, the facts in the graph's metadata, the manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import onnx

from joulemark import artifact, graph_form
from joulemark.errors import BadInput
from joulemark.graph_form import GraphFacts
from joulemark.wire import FileEntry, Manifest
from joulemark_exporter import configuration
from joulemark_exporter.quantizers import Floats, Task
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


def check_tokenizer(task: Task) -> None:
    """That there is one. Raises BadInput."""
    if not (task.model.folder / "tokenizer.json").is_file() and not (task.model.folder / "tokenizer.model").is_file():
        raise BadInput(f"there is no tokenizer in {task.model.folder}", "expected tokenizer.json or tokenizer.model")


def check_floats(numbers: Floats, type_name: str) -> None:
    """That floats of `type_name` are what was asked for. Raises BadInput: what a recipe says is never passed over."""
    if numbers.type_name not in (None, type_name):
        raise BadInput(f"the quantizer is to give {numbers.type_name}, the writer {type_name}", "let them say the same")
    if numbers.embedding not in (None, type_name):
        raise BadInput(f"an embedding of type {numbers.embedding} has no place in a graph of floats", "leave it out")


def write_tokenizer(task: Task, folder: Path) -> tuple[Path, ...]:
    """The tokenizer as transformers uses it, in the one file that the board's library reads, and the template in its settings. Returns
    both files."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(task.model.folder, trust_remote_code=False)
    files = folder / "tokenizer.json", folder / "tokenizer_config.json"
    backend: Any = tokenizer.backend_tokenizer
    # What whoever trained the model cut and filled its texts to is no property of the model.
    backend.no_truncation()
    backend.no_padding()
    files[0].write_text(backend.to_str())
    settings = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "chat_template": tokenizer.chat_template,
    }
    files[1].write_text(json.dumps(settings, indent=1, ensure_ascii=False))
    return files


def facts(task: Task, precision: str, quantization: str) -> GraphFacts:
    """What an engine must know beside the graph."""
    config = task.model.config
    return GraphFacts(
        architecture=config["model_type"],
        precision=precision,
        quantization=quantization,
        parameters=sum(weight.size for weight in task.model.weights.values()),
        context_tokens=task.family.context(config),
        vocabulary=int(config["vocab_size"]),
        end_tokens=_end_tokens(task),
    )


def loaded_floats(task: Task) -> int:
    """Bytes that onnxruntime holds of float weights: 32 bits each, and a tied embedding once more in the order in which it is multiplied
    with. SmolLM2-135M: 651 MB, where a process with onnxruntime 1.32 and the tokenizer has 756 MB resident (836 of a 16-bit file), about 94
    of them without a model."""
    numbers = sum(weight.size for weight in task.model.weights.values())
    tied = task.model.weights[task.family.embedding].size if task.family.is_tied(task.model.config) else 0
    return 4 * (numbers + tied)


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


def describe(task: Task, written: Written) -> Manifest:
    """The manifest of what was written, without its origin: from the files themselves."""
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
