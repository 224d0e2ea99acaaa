"""GSM8K with eight fixed chain-of-thought examples: the same 1319 test problems as `gsm8k`, another condition.

One item, document 0: "Q: There are 15 trees in the grove. Grove workers will plant trees in the grove today. …\\nA:
There are 15 trees originally. … The answer is 6.\\n\\n" and seven more, then "Q: Janet’s ducks lay 16 eggs per day.
…\\nA:"; the reference is "18". The examples are the same for every document, so their tokens are decoded once.

Source: problems of Cobbe et al., arXiv 2110.14168, data MIT; examples of Wei et al., arXiv 2201.11903, taken from the
dataset's own context, which words the last sentence differently; the definition is lm-eval's `gsm8k_cot`, version 3.0.
"""

from __future__ import annotations

import re

from joulemark import final_number
from joulemark.documents import Documents
from joulemark.grading import Outcome
from joulemark.wire import Generation, Grade, PackItem

VERSION = "3.0"
KIND = "generation"
DATASET = "gsm8k"
SHOTS = 8
FILTERS = final_number.FILTERS
PRIMARY = "exact_match,flexible-extract"
CHANCE = None
GENERATION = Generation(max_new_tokens=256, stop=("Q:", "</s>", "<|im_end|>"))

_STRICT = re.compile(r"The answer is (\-?[0-9\.\,]+).")
"""The last full stop is lm-eval's: it stands for any one character, which must be there."""
_WORDING = (("Question: ", "Q: "), ("\nAnswer:", "\nA:"), ("So the answer is", "The answer is"))


def render(documents: Documents) -> list[PackItem]:
    """Every test problem behind the eight examples."""
    examples = documents.context
    for theirs, ours in _WORDING:
        examples = examples.replace(theirs, ours)
    return [
        PackItem(
            doc_id=doc_id,
            doc=doc,
            prompt=f"{examples}Q: {doc['question']}\nA:",
            target=doc["answer"].split("####")[-1].strip(),
        )
        for doc_id, doc in enumerate(documents.docs)
    ]


def grade(item: PackItem, outcome: Outcome) -> Grade:
    """`strict-match` wants "The answer is 18.", `flexible-extract` takes the last number of the output."""
    return final_number.grade(item, outcome, _STRICT)
