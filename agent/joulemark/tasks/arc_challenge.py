"""ARC-Challenge, zero-shot: grade-school science questions that simple retrieval answers wrongly (1172 test questions).

One item, document 0: the prompt is "Question: An astronomer observes that a planet rotates faster after a meteorite
impact. Which is the most likely effect of this increase in rotation?\\nAnswer:"; the continuations are " Planetary
density will decrease.", " Planetary years will become longer.", " Planetary days will become shorter." (right) and
" Planetary gravity will become stronger.". The choices are not shown in the prompt; each is scored as a continuation.

Source: Clark et al., "Think you have solved question answering?", arXiv 1803.05457, data CC-BY-SA-4.0; the definition
is lm-eval's `arc_challenge`, version 1.0.
"""

from __future__ import annotations

from joulemark import multiple_choice
from joulemark.documents import Documents
from joulemark.multiple_choice import grade
from joulemark.wire import PackItem

__all__ = ["grade"]

VERSION = "1.0"
KIND = "choice"
DATASET = "arc_challenge"
SHOTS = 0
FILTERS = multiple_choice.FILTERS
PRIMARY = "acc_norm"
CHANCE = 0.2502
"""The mean of 1/choices over the 1172 documents: 4 have three choices, 3 have five, the others four."""
GENERATION = None


def render(documents: Documents) -> list[PackItem]:
    """Every test question, with no examples before it."""
    return multiple_choice.items(documents)
