"""GSM8K, five random solved examples: grade-school word problems with a whole-number answer (1319 test problems).

One item, document 0: five solved training problems, then "Question: Janet’s ducks lay 16 eggs per day. She eats three
for breakfast every morning and bakes muffins for her friends every day with four. She sells the remainder at the
farmers' market daily for $2 per fresh duck egg. How much in dollars does she make every day at the farmers'
market?\\nAnswer:"; the reference ends in "#### 18". The examples show answers with calculator marks (`<<2*9=18>>`).

The examples are lm-eval's: one `random.Random(1234)` for the task, five training rows drawn per document in order. All
draws are made in `render`, so that a limited, sharded or resumed run sees the same prompts.

Source: Cobbe et al., arXiv 2110.14168, data MIT; the definition is lm-eval's `gsm8k`, version 3.0.
"""

from __future__ import annotations

import random
import re
from typing import Any

from joulemark import final_number
from joulemark.documents import Documents
from joulemark.errors import NotFound
from joulemark.grading import Outcome
from joulemark.wire import Absent, Generation, Grade, PackItem

VERSION = "3.0"
KIND = "generation"
DATASET = "gsm8k"
SHOTS = 5
FILTERS = final_number.FILTERS
PRIMARY = "exact_match,flexible-extract"
CHANCE = None
GENERATION = Generation(max_new_tokens=256, stop=("Question:", "</s>", "<|im_end|>"))

_SEED = 1234
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")


def render(documents: Documents) -> list[PackItem]:
    """Every test problem behind its five examples. Raises NotFound when the training rows are not here."""
    if isinstance(documents.train, Absent):
        raise NotFound(
            f"gsm8k needs the GSM8K training problems for its examples: {documents.train.reason}",
            "put the file there, or use the task gsm8k_cot, whose examples come with the test problems",
        )
    draw = random.Random(_SEED)
    return [_item(doc_id, doc, draw.sample(documents.train, SHOTS)) for doc_id, doc in enumerate(documents.docs)]


def _item(doc_id: int, doc: dict[str, Any], shots: list[dict[str, Any]]) -> PackItem:
    examples = "".join(f"{_question(shot)} {shot['answer']}\n\n" for shot in shots)
    return PackItem(doc_id=doc_id, doc=doc, prompt=examples + _question(doc), target=doc["answer"])


def _question(doc: dict[str, Any]) -> str:
    return f"Question: {doc['question']}\nAnswer:"


def grade(item: PackItem, outcome: Outcome) -> Grade:
    """`strict-match` wants "#### 18", `flexible-extract` takes the last number of the output."""
    return final_number.grade(item, outcome, _STRICT)
