"""A model written as a Hugging Face folder: for tools that read nothing else, and to keep GPTQ's integers in the layout that others load.

Owns the files: shards of bounded size, config.json with the rotary settings of both generations of transformers (each takes a wrong default
where it finds only the other's keys), the tokenizer as it was. Integers are packed, never rounded again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from joulemark import artifact, durable
from joulemark.errors import BadInput, Conflict
from joulemark_exporter import configuration, packing
from joulemark_exporter.quantizers import Choice, Choices, IntegerForm, Integers, Task, grouped, inputs, outputs
from joulemark_exporter.weights import Model

SHARD_BYTES = 2 << 30
TYPES: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "generation_config.json", "vocab.json", "merges.txt",
)  # fmt: skip
FORMAT = "gptq"


def write(
    model: Model, folder: Path, choices: Choices | None = None, form: IntegerForm | None = None, type_name: str = "F32"
) -> None:
    """Writes `folder`, which must not exist. Matrices that `choices` made integers are stored as GPTQ stores them, all else as `type_name`.

    Raises Conflict, BadInput for integers that the layout cannot hold.
    """
    if folder.exists():
        raise Conflict(f"{folder} exists", "choose another folder, or remove that one")
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    index: dict[str, str] = {}
    for number, shard in enumerate(_shards(model, {} if choices is None else choices.by_name, type_name)):
        name = f"model-{number + 1:05d}.safetensors"
        save_file(shard, temporary / name, {"format": "pt"})
        index |= dict.fromkeys(shard, name)
    if len(set(index.values())) == 1:
        (temporary / "model-00001.safetensors").rename(temporary / "model.safetensors")
    else:
        durable.replace_file(
            temporary / "model.safetensors.index.json", [json.dumps({"metadata": {}, "weight_map": index}).encode()]
        )
    durable.replace_file(temporary / "config.json", [json.dumps(_config(model, form, type_name), indent=1).encode()])
    for name in TOKENIZER_FILES:
        if (model.folder / name).is_file():
            shutil.copyfile(model.folder / name, temporary / name)
    temporary.rename(folder)


def check(task: Task, folder: Path, form: IntegerForm | None, type_name: str) -> None:
    """That the layout holds such integers, and the disk the files. Raises BadInput, Conflict, NoSpace before anything is computed."""
    if folder.exists():
        raise Conflict(f"{folder} exists", "choose another folder, or remove that one")
    width = 1 if form is not None else np.dtype(TYPES[type_name]).itemsize
    folder.parent.mkdir(parents=True, exist_ok=True)
    artifact.check_space(folder.parent, width * sum(weight.size for weight in task.model.weights.values()))
    if form is None:
        return
    for name, linear in grouped(task, form.group_size):
        packing.check_gptq(
            name, outputs(task.model.weights[name], linear), inputs(task.model.weights[name], linear), form.bits
        )


def _shards(model: Model, choices: Mapping[str, Choice], type_name: str) -> Iterator[dict[str, NDArray[Any]]]:
    shard: dict[str, NDArray[Any]] = {}
    for name, weight in model.weights.items():
        choice = choices.get(name)
        if isinstance(choice, Integers):
            stem = name.removesuffix("weight")
            shard |= {
                f"{stem}{part}": np.ascontiguousarray(values)
                for part, values in packing.to_gptq(choice.load(), FORMAT).items()
            }
        else:
            shard[name] = weight.whole().astype(TYPES[type_name])
        if sum(values.nbytes for values in shard.values()) > SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def _config(model: Model, form: IntegerForm | None, type_name: str) -> dict[str, Any]:
    words = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[type_name]
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    config |= {"dtype": words, "torch_dtype": words, **_legacy_rope(config)}
    if form is not None:
        config["quantization_config"] = {
            "quant_method": "gptq",
            "bits": form.bits,
            "group_size": form.group_size,
            "sym": form.symmetric,
            "desc_act": not form.contiguous,
            "checkpoint_format": FORMAT,
        }
    return config


def _legacy_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 4 reads rope_theta and rope_scaling and takes theta 10000 where there are only version 5's keys."""
    stated = config.get("rope_parameters")
    if not isinstance(stated, Mapping):
        return {}
    try:
        rotary = configuration.rope(config)
    except BadInput:
        return {}
    scaling = {key: value for key, value in rotary.settings.items() if key != "rope_theta"}
    legacy: dict[str, Any] = {"rope_theta": rotary.theta, "rope_scaling": scaling if rotary.kind != "default" else None}
    if "sliding_attention" in stated:
        legacy["rope_local_base_freq"] = configuration.rope(config, "sliding_attention").theta
    return legacy
