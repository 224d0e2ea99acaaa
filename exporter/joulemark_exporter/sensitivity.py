"""What it costs to store a matrix in fewer bits: for every matrix and type the weighted squared error, and for every matrix what such an
error does to the model's words.

Owns the table. The error of a type is Σ_j h_j Σ_o (W_oj − Ŵ_oj)², h the inputs' mean squares; it orders types well within a matrix but not
matrices among one another, because an early layer's error spreads. So each matrix is rounded alone once, to its cheapest type, and the
divergence of the next token's distribution is measured; errors are scaled to that. The walk carries one set of states for each matrix so
rounded, so that every layer is loaded once. Divergence in nats per token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from joulemark import durable
from joulemark_exporter import ggml
from joulemark_exporter.families import HEAD
from joulemark_exporter.importance import Importance
from joulemark_exporter.quantizers import Task, outputs_first
from joulemark_exporter.verify import log_softmax
from joulemark_exporter.walk import Walk
from joulemark_exporter.weights import Float32

FILE = "sensitivity.json"


@dataclass(frozen=True)
class Row:
    """One matrix: type → (bytes, expected divergence)."""

    name: str
    role: str
    layer: int | None
    """None for embeddings and the output matrix."""
    columns: int
    divergence: float
    """Measured, with this matrix alone in its cheapest type."""
    cheapest: str
    candidates: Mapping[str, tuple[int, float]]

    def plain(self) -> dict[str, Any]:
        """As JSON values, for the artifact and the heatmap."""
        types = {name: {"bytes": size, "divergence": error} for name, (size, error) in self.candidates.items()}
        about = {"name": self.name, "role": self.role, "layer": self.layer, "columns": self.columns}
        return {**about, "measured": {"type": self.cheapest, "divergence": self.divergence}, "types": types}


def measure(task: Task, types: Sequence[str], weights: Importance, windows: torch.Tensor) -> list[Row]:
    """The table, taken up from the working folder where it is there."""
    stored = task.work / FILE
    if stored.is_file():
        return [_row(values) for values in json.loads(stored.read_text())]
    errors = _errors(task, types, weights)
    cheapest = {
        name: min(options, key=lambda kind: (options[kind][0], options[kind][1])) for name, options in errors.items()
    }
    divergences = _divergences(task, cheapest, weights, windows)
    rows = [_scaled(task, name, options, cheapest[name], divergences[name]) for name, options in errors.items()]
    durable.replace_file(stored, [json.dumps([row.plain() for row in rows]).encode()])
    return rows


def _row(values: Mapping[str, Any]) -> Row:
    types = {name: (int(item["bytes"]), float(item["divergence"])) for name, item in values["types"].items()}
    about, measured = (values["name"], values["role"], values["layer"], values["columns"]), values["measured"]
    return Row(*about, measured["divergence"], measured["type"], types)


def _scaled(task: Task, name: str, options: Mapping[str, tuple[int, float]], cheapest: str, divergence: float) -> Row:
    linear = task.family.matrices(task.model.config).get(name)
    layer = task.family.layer_of(name) if linear else None
    role = linear.role if linear else ("output" if name == HEAD else "token_embd")
    error = options[cheapest][1]
    scale = divergence / error if error else 0.0
    candidates = {kind: (size, value * scale) for kind, (size, value) in options.items()}
    return Row(name, role, layer, task.model.weights[name].shape[-1], divergence, cheapest, candidates)


# --- errors of types --------------------------------------------------------------------------------------------------
def _errors(task: Task, types: Sequence[str], weights: Importance) -> dict[str, dict[str, tuple[int, float]]]:
    """Matrix → type → (bytes, weighted squared error)."""
    found: dict[str, dict[str, tuple[int, float]]] = {}
    names = matrices(task)
    for done, name in enumerate(names):
        task.say("trying every type on every matrix", done, len(names))
        values = _values(task, name)
        rows, columns = values.shape
        found[name] = {
            kind: (rows * ggml.row_bytes(kind, columns), _error(values, kind, weights.get(name), task.threads))
            for kind in types
            if ggml.fits(kind, columns) and not (kind in ggml.NEEDS_IMPORTANCE and name not in weights)
        }
    task.say("trying every type on every matrix", len(names), len(names))
    return found


def matrices(task: Task) -> list[str]:
    """Every matrix that has a type to choose: those of the layers, the embedding, the output matrix where it is one of its own."""
    heads = [task.family.embedding] + ([] if task.family.is_tied(task.model.config) else [HEAD])
    return [*heads, *task.family.matrices(task.model.config)]


def _values(task: Task, name: str) -> Float32:
    linear = task.family.matrices(task.model.config).get(name)
    weight = task.model.weights[name]
    return outputs_first(weight, linear) if linear else weight.whole()


def rounded(values: Float32, kind: str, weights: NDArray[np.float32] | None, threads: int) -> Float32:
    """The matrix as a file of this type would give it back."""
    return ggml.decode(ggml.encode(values, kind, weights, threads), kind, values.shape[1], threads)


def _error(values: Float32, kind: str, weights: NDArray[np.float32] | None, threads: int) -> float:
    total = 0.0
    step = max(1, (1 << 22) // values.shape[1])
    for start in range(0, len(values), step):
        part = values[start : start + step]
        squares = np.square(part - rounded(part, kind, weights, threads))
        by_input = squares.sum(0, dtype=np.float64)
        total += float(by_input.sum() if weights is None else by_input @ weights.astype(np.float64))
    return total


# --- what an error does -----------------------------------------------------------------------------------------------
@torch.inference_mode()
def _divergences(
    task: Task, cheapest: Mapping[str, str], weights: Importance, windows: torch.Tensor
) -> dict[str, float]:
    """Matrix → divergence with it alone rounded to its cheapest type."""
    walk = Walk(task.model, task.family)
    reference = walk.embed(windows)
    carried: dict[str, torch.Tensor] = {}
    head = HEAD if HEAD in cheapest else task.family.embedding
    embedding = walk.outer(task.family.embedding)
    original = embedding.data
    replaced = torch.from_numpy(rounded(original.numpy(), cheapest[task.family.embedding], None, task.threads))
    embedding.data = replaced
    carried[task.family.embedding] = walk.embed(windows)
    embedding.data = original
    for index in range(walk.layers):
        task.say("measuring what errors do", index, walk.layers)
        with walk.layer(index) as layer:
            for states in carried.values():
                walk.run(index, layer, states)
            for linear in task.family.linears:
                name = task.family.parameter(index, linear)
                carried[name] = _with_rounded(
                    walk, index, layer, linear, reference, cheapest[name], weights.get(name), task.threads
                )
            walk.run(index, layer, reference)
    task.say("measuring what errors do", walk.layers, walk.layers)
    true = [log_softmax(walk.logits(states).numpy()) for states in reference]
    found = {name: _divergence(walk, states, true) for name, states in carried.items() if name != head}
    weight = walk.outer(head)
    kept = weight.data
    weight.data = torch.from_numpy(rounded(kept.numpy(), cheapest[head], None, task.threads))
    found[head] = _divergence(walk, carried.get(head, reference), true)
    weight.data = kept
    return found


def _with_rounded(
    walk: Walk, index: int, layer: Any, linear: Any, states: torch.Tensor, kind: str, weights: Any, threads: int
) -> torch.Tensor:
    """The states behind the layer with one of its matrices rounded."""
    parameter = layer.get_submodule(linear.name).weight
    kept = parameter.data
    values = kept.numpy().T.copy() if linear.transposed else kept.numpy()
    values = rounded(values, kind, weights, threads)
    parameter.data = torch.from_numpy(values.T.copy() if linear.transposed else values)
    result = states.clone()
    walk.run(index, layer, result)
    parameter.data = kept
    return result


def _divergence(walk: Walk, states: torch.Tensor, true: Sequence[Float32]) -> float:
    total, count = 0.0, 0
    for window, expected in zip(states, true, strict=True):
        found = log_softmax(walk.logits(window).numpy())
        total += float(np.einsum("tv,tv->", np.exp(expected), expected - found, dtype=np.float64))
        count += len(expected)
    return max(total / count, 0.0)
