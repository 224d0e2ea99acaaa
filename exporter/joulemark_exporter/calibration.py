"""What the inputs of every matrix look like on a calibration text: second moments (the Hessian of its output error) or their diagonal.

Owns tokenizing the text into windows and the measuring hooks. Moments are sums over tokens of x·xᵀ in float64, divided by the number of
tokens. Linears of one stage read the same input, so one of them is measured for all. Not aware of what is done with the moments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from joulemark.errors import BadInput
from joulemark_exporter import texts
from joulemark_exporter.families import Family
from joulemark_exporter.recipe import CalibrationSettings
from joulemark_exporter.weights import Model

Moments = NDArray[np.float64]


@dataclass(frozen=True)
class Windows:
    """Token ids (windows, tokens) int64, and where they come from."""

    tokens: Tensor
    text: str
    sha256: str
    beginning: bool
    """Whether every window begins with the tokenizer's beginning-of-sequence token."""


def windows(model: Model, text: texts.Text, count: int | None, length: int, seed: int | None) -> Windows:
    """The text in windows of `length` tokens, none overlapping; `count` None: as many as there are. `seed` None keeps the text's order.

    Where the tokenizer puts a beginning-of-sequence token by itself, every window begins with one, as on the board. Raises BadInput
    when the text is too short.
    """
    encode, first = tokenizer(model.folder)
    ordered = text.documents if seed is None else texts.shuffled(text, seed)
    step = length - len(first)
    wanted = None if count is None else count * step
    stream: list[int] = []
    for document in ordered:
        stream.extend(encode(document + ("" if len(ordered) == 1 else "\n\n")))
        if wanted is not None and len(stream) >= wanted:
            break
    found = len(stream) // step
    if not found or (count is not None and found < count):
        raise BadInput(
            f"the text {text.name} makes {found} windows of {length} tokens, {count or 1} are asked for",
            "ask for fewer samples or tokens, or use a longer text",
        )
    rows = [first + stream[start * step : (start + 1) * step] for start in range(count or found)]
    return Windows(torch.tensor(rows, dtype=torch.int64), text.name, text.sha256, bool(first))


def tokenizer(folder: Path) -> tuple[Callable[[str], list[int]], list[int]]:
    """(text → token ids without special tokens, the tokens that the tokenizer begins a text with)."""
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    whole, bare = loaded("a")["input_ids"], loaded("a", add_special_tokens=False)["input_ids"]
    first = whole[: len(whole) - len(bare)] if whole[-len(bare) :] == bare else []

    def encode(text: str) -> list[int]:
        return list(loaded(text, add_special_tokens=False)["input_ids"])

    return encode, list(first)


def calibration_windows(model: Model, settings: CalibrationSettings, cache: Path) -> Windows:
    """The windows that a recipe asks for. Raises BadInput when the text holds an evaluation item or is too short."""
    text = texts.load(settings.dataset, cache)
    texts.refuse_evaluation_items(text, cache)
    return windows(model, text, settings.samples, settings.tokens, settings.seed)


@contextlib.contextmanager
def measured(
    layer: nn.Module, family: Family, stages: Collection[int], diagonal: bool = False
) -> Generator[dict[int, Moments]]:
    """While the layer runs, the moments of the inputs of `stages`: stage → (inputs, inputs), or (inputs,) when only the diagonal is wanted.

    The values are complete, and divided by the number of tokens, when the context is left.
    """
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    result: dict[int, Moments] = {}

    def note(stage: int, values: Tensor) -> None:
        rows = values.detach().reshape(-1, values.shape[-1]).float()
        moment = rows.square().sum(0) if diagonal else rows.T @ rows
        sums[stage] = sums[stage].add_(moment) if stage in sums else moment.double()
        counts[stage] = counts.get(stage, 0) + len(rows)

    handles: list[Any] = []
    for stage in stages:
        name = next(linear.name for linear in family.linears if linear.stage == stage)

        def hook(_module: nn.Module, inputs: tuple[Any, ...], stage: int = stage) -> None:
            note(stage, inputs[0])

        handles.append(layer.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()
    result.update({stage: (total / counts[stage]).numpy() for stage, total in sums.items()})
