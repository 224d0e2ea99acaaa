"""ARC-Easy, zero-shot: the grade-school science questions that simple retrieval can answer (2376 test questions).

One item, document 0: the prompt is "Question: Which statement best explains why photosynthesis is the foundation of
most food webs?\\nAnswer:"; the continuations are " Sunlight is the source of energy for nearly all ecosystems."
(right), " Most ecosystems are found on land instead of in water.", " Carbon dioxide is more available than other
gases." and " The producers in all ecosystems are plants.".

Source: Clark et al., arXiv 1803.05457, data CC-BY-SA-4.0; the definition is lm-eval's `arc_easy`, version 1.0.
"""

from __future__ import annotations

from joulemark import multiple_choice
from joulemark.documents import Documents
from joulemark.multiple_choice import grade
from joulemark.wire import PackItem

__all__ = ["grade"]

VERSION = "1.0"
KIND = "choice"
DATASET = "arc_easy"
SHOTS = 0
FILTERS = multiple_choice.FILTERS
PRIMARY = "acc_norm"
CHANCE = 0.2502
"""The mean of 1/choices over the 2376 documents: 7 have three choices, 4 have five, the others four."""
GENERATION = None


def render(documents: Documents) -> list[PackItem]:
    """Every test question, with no examples before it."""
    return multiple_choice.items(documents)
