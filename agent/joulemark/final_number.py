"""GSM8K answers: finding the final number in generated text and comparing it, with every quirk of lm-eval.

Owns the two filters `strict-match` and `flexible-extract` and the `exact_match` comparison. The quirks are the
definition (`18.00` is not `18`; "The answer is 18" without a full stop reads as `1` in gsm8k_cot): a better extractor
would be a further filter with its own name. The text arrives already cut at the stop string; nothing is stripped here.
Definitions: lm-evaluation-harness 0.4.13, tasks gsm8k and gsm8k_cot, version 3.0.
"""

from __future__ import annotations

import re

from joulemark.errors import BadInput
from joulemark.grading import Outcome
from joulemark.wire import Grade, PackItem

FILTERS = ("strict-match", "flexible-extract")
INVALID = "[invalid]"
"""What a filter yields when nothing matched."""

_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (re.compile(","), re.compile(r"\$"), re.compile(r"(?s).*#### "), re.compile(r"\.$"))


def strict(pattern: re.Pattern[str], output: str) -> str:
    """The group of the first match of `pattern` (which has exactly one group), else `[invalid]`."""
    match = pattern.search(output)
    return match.group(1).strip() if match else INVALID


def flexible(output: str) -> str:
    """The last thing in `output` that looks like a number, else `[invalid]`."""
    found = _FLEXIBLE.findall(output)
    if not found:
        return INVALID
    money, digits = found[-1]
    return (money or digits).strip()


def normalise(text: str) -> str:
    """Removes, in this order: commas, dollar signs, all up to `#### `, a final full stop; then lower-cases."""
    for ignored in _IGNORED:
        text = ignored.sub("", text)
    return text.lower()


def grade(item: PackItem, outcome: Outcome, strict_pattern: re.Pattern[str]) -> Grade:
    """Both filters' answers and their `exact_match` with the item's target. Raises BadInput when there is no output."""
    if outcome.output is None:
        raise BadInput(f"document {item.doc_id} has no generated text", "generate an output before grading the item")
    answers = {"strict-match": strict(strict_pattern, outcome.output), "flexible-extract": flexible(outcome.output)}
    reference = normalise(item.target)
    return Grade(
        answers=answers,
        scores={f"exact_match,{name}": float(normalise(answer) == reference) for name, answer in answers.items()},
    )
