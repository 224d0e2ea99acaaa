"""What a grader is given: one engine's output for one pack item.

Owns the type that every task's `grade` takes. It knows nothing of engines, records or files.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """The answer to one item, before grading.

    `output` is the generated text, already cut at the first stop string and not stripped (generation tasks).
    `choice_logprobs[i]` is Σ log p (natural logarithm) of choice i's tokens given the prompt (choice tasks).
    The field that does not belong to the task's kind is None.
    """

    output: str | None = None
    choice_logprobs: tuple[float, ...] | None = None
