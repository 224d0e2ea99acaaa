"""No quantization: every matrix as it is. What all others are compared with; and the way of a GPTQ checkpoint, whose integers are kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from joulemark.errors import BadInput
from joulemark_exporter import ggml
from joulemark_exporter.families import HEAD
from joulemark_exporter.group_quantized import IntegerForm
from joulemark_exporter.quantizers import Choice, Choices, Floats, Integers, Rounded, Task
from joulemark_exporter.recipe import Settings

FLOATS = ("F32", "F16", "BF16")


class Options(Settings):
    """`type`: the floating-point type of the matrices; `auto` keeps the checkpoint's own, integers included. `embedding`: another type
    for the token embedding and the output matrix, such as Q8_0."""

    type: Literal["auto", "F32", "F16", "BF16"] = "auto"
    embedding: str | None = None


def calibrated(options: Options) -> bool:
    """Nothing is rounded that a text could tell about."""
    del options
    return False


def check(task: Task, options: Options) -> Floats | IntegerForm:
    """See the contract: integers are a GPTQ checkpoint's, which adapters may have left none of."""
    if options.embedding is not None:
        ggml.block(options.embedding)
        if not ggml.fits(options.embedding, task.model.weights[task.family.embedding].shape[1]):
            raise BadInput(f"blocks of {options.embedding} do not divide the embedding's rows", "use F16")
    forms = {weight.form for weight in task.model.weights.values() if weight.form is not None}
    if options.type != "auto" or not forms:
        return Floats(None if options.type == "auto" else options.type, options.embedding)
    embedding = _type(task, task.family.embedding, options)
    return replace(next(iter(forms)), contiguous=all(form.contiguous for form in forms), embedding=embedding)


def quantize(task: Task, options: Options) -> Choices:
    """See the contract."""
    chosen: dict[str, Choice] = {}
    for name, weight in task.model.weights.items():
        if options.type == "auto" and weight.integers is not None and weight.form is not None:
            chosen[name] = Integers(weight.integers, weight.form)
        elif len(weight.shape) == 2:
            chosen[name] = Rounded(_type(task, name, options))
    return Choices(chosen, _title(task, chosen))


def _type(task: Task, name: str, options: Options) -> str:
    if options.embedding is not None and name in (task.family.embedding, HEAD):
        return options.embedding
    stored = task.model.weights[name].stored
    own = stored if stored in FLOATS else "F32"
    return own if options.type == "auto" else options.type


def _title(task: Task, chosen: dict[str, Choice]) -> str:
    forms = {choice.form for choice in chosen.values() if isinstance(choice, Integers)}
    if forms:
        return next(iter(forms)).title("GPTQ")
    matrices = task.family.matrices(task.model.config)
    kinds = {choice.type_name for name, choice in chosen.items() if isinstance(choice, Rounded) and name in matrices}
    return kinds.pop() if len(kinds) == 1 else "mixed"
