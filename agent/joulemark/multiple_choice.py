"""Choice tasks: rendering documents into items, and grading by log-likelihood as lm-eval does.

Owns `acc` and `acc_norm`. It is not aware of where documents come from or of how log-probabilities were computed.
Definitions: lm-evaluation-harness 0.4.13, `output_type: multiple_choice`; log-probabilities are natural logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from joulemark.documents import Documents
from joulemark.errors import BadInput
from joulemark.grading import Outcome
from joulemark.wire import Grade, PackItem

FILTERS = ("none",)
"""lm-eval's name for "no filter": one sample line per document."""


def items(documents: Documents, prefix: str = "") -> list[PackItem]:
    """One item per document: `prefix` + "Question: …\\nAnswer:" with the choices' texts; the target is the gold
    index."""
    return [
        PackItem(
            doc_id=doc_id,
            doc=doc,
            prompt=f"{prefix}Question: {doc['question']}\nAnswer:",
            choices=tuple(doc["choices"]["text"]),
            target=str(doc["gold"]),
        )
        for doc_id, doc in enumerate(documents.docs)
    ]


def best(scores: Sequence[float]) -> int:
    """The index of the highest score; the lowest index wins a tie, as numpy's argmax does."""
    return max(range(len(scores)), key=lambda index: scores[index])


def grade(item: PackItem, outcome: Outcome) -> Grade:
    """`acc`: the choice with the highest Σ log p is right; `acc_norm`: the highest Σ log p per character is.

    Characters are Unicode code points of the choice without the leading space that the engine puts before it.
    Raises BadInput when there is not exactly one finite log-probability per choice.
    """
    logprobs = outcome.choice_logprobs
    if logprobs is None or len(logprobs) != len(item.choices):
        count = "no" if logprobs is None else str(len(logprobs))
        raise BadInput(
            f"document {item.doc_id} has {len(item.choices)} choices but {count} log-probabilities",
            "score every choice of the item before grading it",
        )
    if not all(math.isfinite(value) for value in logprobs):
        raise BadInput(
            f"document {item.doc_id} has a log-probability that is not a finite number",
            "the model's logits overflowed: try another quantization or engine build",
        )
    chosen = {
        "acc": best(logprobs),
        "acc_norm": best([value / len(choice) for value, choice in zip(logprobs, item.choices, strict=True)]),
    }
    return Grade(
        answers={name: str(index) for name, index in chosen.items()},
        scores={name: float(str(index) == item.target) for name, index in chosen.items()},
    )
