"""ONNX by Hugging Face's optimum, for whoever wants the graph that others publish: plain operators, a memory that every call copies.

Slower on a board than the onnx writer's, and float32 only. optimum runs in an environment of its own (`make install-optimum`) and gets the
folded model as a checkpoint in transformers 4's form; it is verified like every other artifact."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx

from joulemark import artifact, graph_form
from joulemark.errors import BadInput
from joulemark.wire import Manifest
from joulemark_exporter import hub_folder, onnx_artifact, onnx_graph, optimum_environment
from joulemark_exporter.quantizers import Choices, Floats, Numbers, Task
from joulemark_exporter.recipe import Settings
from joulemark_exporter.weights import Weight
from joulemark_exporter.writers import Written

PRECISION = "fp32"


class Options(Settings):
    """There are none."""


def check(task: Task, options: Options, numbers: Numbers) -> None:
    """See the contract."""
    del options
    onnx_artifact.check_tokenizer(task)
    if not isinstance(numbers, Floats):
        raise BadInput("optimum writes float32 only", 'use the quantizer "none", or another writer')
    onnx_artifact.check_floats(numbers, "F32")


def write(task: Task, choices: Choices, folder: Path, options: Options) -> Written:
    """See the contract."""
    del choices, options
    # The checkpoint, optimum's graph, the same with its metadata, and the published one.
    artifact.check_space(folder, 4 * 4 * sum(weight.size for weight in task.model.weights.values()))
    tokenizer = onnx_artifact.write_tokenizer(task, folder)
    checkpoint, made = folder / "checkpoint", folder / "made"
    hub_folder.write(task.model, checkpoint)
    task.say("optimum writes the graph", 0, 1)
    proto = onnx.load(optimum_environment.write_graph(checkpoint, made, task.threads))
    shutil.rmtree(checkpoint)
    shutil.rmtree(made)
    files = onnx_graph.save(proto, folder / "model.onnx", onnx_artifact.facts(task, PRECISION, PRECISION))
    task.say("optimum writes the graph", 1, 1)
    loaded, width = onnx_artifact.loaded_floats(task), 4 * graph_form.COPIES["rebuilt"]
    return Written(
        (*files, *tokenizer), "onnxruntime", memory_number_bytes=width, loaded_weight_bytes=loaded, exact=True
    )


def tools(options: Options) -> dict[str, str]:
    """See the contract."""
    del options
    return optimum_environment.versions()


def describe(task: Task, choices: Choices, written: Written) -> Manifest:
    """See the contract."""
    del choices
    return onnx_artifact.describe(task, written)


def read_back(task: Task, choices: Choices, written: Written) -> dict[str, Weight]:
    """See the contract: the model's own floats."""
    del choices, written
    return dict(task.model.weights)
