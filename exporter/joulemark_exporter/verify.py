"""Looks at what was written through the engine that boards use, before it is published.

Owns the comparison with the unquantized model on a probe text: Kullback-Leibler divergence, agreement on the most likely token,
perplexity of both; and that the engine's tokens and chat template are the model's. Limits come from the recipe; what fails one is an
error, and nothing is published. The reference is computed by transformers in float32, layer by layer. Natural logarithms throughout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from joulemark.errors import BadInput
from joulemark_exporter.calibration import Windows
from joulemark_exporter.families import Family
from joulemark_exporter.probe import Probe
from joulemark_exporter.recipe import Limits
from joulemark_exporter.walk import Walk
from joulemark_exporter.weights import Float32, Model

# Texts on which tokenizers differ when their rules do: digits, contractions, spaces, scripts, emoji. None begins with a space: there
# transformers 5 itself differs from SentencePiece, which llama.cpp follows.
TOKENIZER_PROBES = (
    "Hello, world! It's 12345.67 € — isn't it?",
    "two  spaces\tand\ttabs\n\n\nand lines  ",
    "I'LL we've he'd DON'T naïve café cafe\u0301",
    "日本語のテキスト 한국어 العربية עברית हिन्दी ไทย",
    "def f(x):\n    return x**2  # 3.14e-10\n",
    "👩‍👩‍👧‍👦🏳️‍🌈 emoji №½ ﬁ ①",
    "Question: 7 x 8 = 56?\nAnswer:",
)

Say = Callable[[str, int, int], None]

FAITHFUL = 0.05
"""Nats. llama.cpp rounds activations to eight bits for quantized weights, which cost 0.003 on SmolLM2 in Q4_1; a wrong rotary base costs
about one."""
EXACT = 1e-6
"""Nats, of an engine that rounds nothing but the last bits of 32-bit floats."""
FAITHFUL_WINDOWS = 2


@dataclass(frozen=True)
class Findings:
    """What the comparison found. `tokens` positions were compared."""

    tokens: int
    divergence: float
    """Mean KL(reference ‖ artifact) per position, nats."""
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    largest_difference: float
    """Of any logit, after each position's mean is taken off: what float files must keep near zero."""
    engine_peak_memory_bytes: int
    """Of the process that held the engine, with the logits of a window: an upper bound of what loading takes."""


def say_nothing(step: str, done: int, total: int) -> None:
    """For callers that show no progress."""
    del step, done, total


def reference_states(
    model: Model, family: Family, windows: torch.Tensor, say: Say = say_nothing
) -> tuple[Walk, torch.Tensor]:
    """The unquantized model's states behind the last layer, and the walk that turns them into logits."""
    walk = Walk(model, family)
    states = walk.embed(windows)
    for index in range(walk.layers):
        say("computing the reference", index, walk.layers)
        with walk.layer(index) as layer:
            walk.run(index, layer, states)
    say("computing the reference", walk.layers, walk.layers)
    return walk, states


def compare(session: Probe, windows: Windows, walk: Walk, states: torch.Tensor) -> Findings:
    """Runs every window through the engine and the reference. Raises EngineFailed, BadInput (another vocabulary)."""
    sums = np.zeros(5)
    largest = 0.0
    for window, state in zip(windows.tokens, states, strict=True):
        reference = walk.logits(state).numpy()
        found = session.logits(window.tolist())
        if found.shape != reference.shape:
            raise BadInput(
                f"the artifact has a vocabulary of {found.shape[1]} tokens, the model one of {reference.shape[1]}",
                "this is a defect of the writer",
            )
        part, difference = _window(reference, found, window.numpy())
        sums += part
        largest = max(largest, difference)
    peak = session.peak_memory_bytes()
    positions, predicted = int(sums[0]), sums[0] - len(states)
    return Findings(
        tokens=positions,
        divergence=float(sums[1] / positions),
        top1_agreement=float(sums[2] / positions),
        perplexity=math.exp(sums[3] / predicted),
        reference_perplexity=math.exp(sums[4] / predicted),
        largest_difference=largest,
        engine_peak_memory_bytes=peak,
    )


def _window(reference: Float32, found: Float32, tokens: NDArray[np.int64]) -> tuple[NDArray[np.float64], float]:
    """(positions, Σ KL, agreeing positions, Σ −log p of the artifact, Σ −log p of the reference), and the largest difference of logits."""
    true, other = log_softmax(reference), log_softmax(found)
    divergence = np.einsum("tv,tv->t", np.exp(true), true - other)
    agreeing = (reference.argmax(1) == found.argmax(1)).sum()
    rows, following = np.arange(len(tokens) - 1), tokens[1:]
    losses = [-float(values[rows, following].sum(dtype=np.float64)) for values in (other, true)]
    centred = (reference - reference.mean(1, keepdims=True)) - (found - found.mean(1, keepdims=True))
    sums = np.array([len(tokens), float(divergence.sum(dtype=np.float64)), float(agreeing), *losses])
    return sums, float(np.abs(centred).max())


def log_softmax(logits: Float32) -> Float32:
    """Row by row, float32, the maximum subtracted."""
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def check_text(session: Probe, model: Model) -> None:
    """The engine's tokens on nasty texts, and its chat template, are the model's own. Raises BadInput."""
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(model.folder, trust_remote_code=False)
    for text in TOKENIZER_PROBES:
        expected, found = own(text)["input_ids"], session.tokenize(text)
        if list(expected) != found:
            raise BadInput(
                f"the artifact tokenizes {text!r} otherwise than the model: {found[:12]} instead of {list(expected)[:12]} …",
                "every score would be wrong without a word: state tokenizer_pre in [writer], or report this tokenizer",
            )
    template = session.chat_template()
    if (own.chat_template is None) != (template is None) or (template is not None and template != own.chat_template):
        raise BadInput("the artifact's chat template is not the model's", "this is a defect of the writer")


def check_faithful(session: Probe, read_back: Model, family: Family, windows: Windows, exact: bool = False) -> float:
    """The divergence between the engine and transformers on the very weights that the file holds: what the writer did wrong (a rotary
    base, a permutation, a norm), apart from what was lost by quantizing. Raises BadInput when it is more than the engine's own rounding,
    of which an `exact` one has next to none."""
    some = dataclasses.replace(windows, tokens=windows.tokens[:FAITHFUL_WINDOWS])
    walk, states = reference_states(read_back, family, some.tokens)
    divergence = compare(session, some, walk, states).divergence
    if divergence > (EXACT if exact else FAITHFUL):
        raise BadInput(
            f"the engine computes something else from this file than its weights say: divergence {divergence:.3g}",
            "this is a defect of the writer (rotary embedding, order of rows, norms): please report it with the model's config.json",
        )
    return divergence


def failures(findings: Findings, bits_per_weight: float, limits: Limits) -> Sequence[str]:
    """The limits that are not kept, in words."""
    increase = findings.perplexity / findings.reference_perplexity
    checks = (
        ("divergence", findings.divergence, limits.divergence, False),
        ("perplexity_increase", increase, limits.perplexity_increase, False),
        ("bits_per_weight", bits_per_weight, limits.bits_per_weight, False),
        ("top1_agreement", findings.top1_agreement, limits.top1_agreement, True),
    )
    return [
        f"{name} is {value:.5g}, the recipe allows {'at least' if least else 'at most'} {limit:.5g}"
        for name, value, limit, least in checks
        if limit is not None and not (value >= limit if least else value <= limit)
    ]
