"""ARC-Easy with the five fixed examples of OLMES: the same 2376 questions as `arc_easy`, another condition, another
score.

One item, document 0: the prompt starts with "Question: Lichens are symbiotic organisms made of green algae and fungi.
What do the green algae supply to the fungi in this symbiotic relationship?\\nAnswer: food\\n\\n" and four more, then
comes the question as in `arc_easy`. The examples are the same for every document, so their tokens are decoded once.

Source: Gu et al., "OLMES: a standard for language model evaluations", arXiv 2406.08446 (completion form, version 0.1).
Scores are `acc` and `acc_norm` as in lm-eval: per character of the choice, without the leading space.
"""

from __future__ import annotations

from joulemark import multiple_choice
from joulemark.documents import Documents
from joulemark.multiple_choice import grade
from joulemark.wire import PackItem

__all__ = ["grade"]

VERSION = "0.1"
KIND = "choice"
DATASET = "arc_easy"
SHOTS = 5
FILTERS = multiple_choice.FILTERS
PRIMARY = "acc_norm"
CHANCE = 0.2502
"""The mean of 1/choices over the 2376 documents: 7 have three choices, 4 have five, the others four."""
GENERATION = None


def render(documents: Documents) -> list[PackItem]:
    """Every test question behind the fixed examples."""
    return multiple_choice.items(documents, prefix=documents.context)
