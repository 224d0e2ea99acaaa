"""The graders' rules and quirks: every task by contract, GSM8K's numbers by table, choices by ties and lengths."""

from __future__ import annotations

import math

import pytest

from joulemark import packs, plugins
from joulemark.errors import BadInput
from joulemark.grading import Outcome
from joulemark.wire import Generation, Grade, PackItem

TASKS = plugins.names(packs.TASKS)
SUM = PackItem(doc_id=0, doc={}, prompt="Question: 9 * 2?\nAnswer:", target="She makes 9 * 2 = $<<9*2=18>>18.\n#### 18")
BARE = SUM.model_copy(update={"target": "18"})


def choice_item(*choices: str, target: str = "0") -> PackItem:
    return PackItem(doc_id=3, doc={}, prompt="Question: Which?\nAnswer:", choices=choices, target=target)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_keeps_the_contract(name: str) -> None:
    module = plugins.load(packs.TASKS, name)
    assert module.KIND in ("choice", "generation")
    assert isinstance(module.VERSION, str) and isinstance(module.DATASET, str) and isinstance(module.SHOTS, int)
    assert module.__doc__ and "One item" in module.__doc__ and "Source:" in module.__doc__
    assert (module.GENERATION is None) == (module.KIND == "choice")
    assert module.GENERATION is None or isinstance(module.GENERATION, Generation)
    choice = module.KIND == "choice"
    assert (module.CHANCE is not None) == choice
    item = choice_item("yes", "no") if choice else SUM
    grade = module.grade(item, Outcome(choice_logprobs=(-1.0, -2.0)) if choice else Outcome(output=" #### 18"))
    assert isinstance(grade, Grade)
    assert module.PRIMARY in grade.scores
    assert set(grade.scores.values()) <= {0.0, 1.0}
    with pytest.raises(BadInput):
        module.grade(item, Outcome())


@pytest.mark.parametrize(
    "output, strict, flexible, right",
    [
        # output, strict-match's answer, flexible-extract's answer, (strict right, flexible right)
        (" 9 * 2 = 18\n#### 18", "18", "18", (1, 1)),
        (" #### 18\n\nQuestion: another #### 20", "18", "20", (1, 0)),
        (" #### 18.", "18.", "18.", (1, 1)),  # a final full stop is ignored
        (" #### 18.00", "18.00", "18.00", (0, 0)),
        (" #### $18", "[invalid]", "$18", (0, 1)),  # strict wants the digit at once
        (" #### 1,8", "1,8", "1,8", (1, 1)),  # commas are removed wherever they stand
        (" #### -18", "-18", "-18", (0, 0)),
        (" ####18", "[invalid]", "18", (0, 1)),
        (" She makes $18 a day.", "[invalid]", "$18", (0, 1)),
        (" It is 18, not 20", "[invalid]", "20", (0, 0)),
        (" 18 ...", "[invalid]", "...", (0, 0)),  # dots alone look like a number
        (" 18%.", "[invalid]", "18", (0, 1)),
        (" eighteen", "[invalid]", "[invalid]", (0, 0)),
        ("", "[invalid]", "[invalid]", (0, 0)),
        (" -", "[invalid]", "[invalid]", (0, 0)),
        (" 4-18", "[invalid]", "-18", (0, 0)),
        (" 8", "[invalid]", "8", (0, 0)),
        (" #### ,", ",", "[invalid]", (0, 0)),
        (" ١٨", "[invalid]", "[invalid]", (0, 0)),  # only ASCII digits
    ],
)
def test_gsm8k_numbers(output: str, strict: str, flexible: str, right: tuple[int, int]) -> None:
    grade = plugins.load(packs.TASKS, "gsm8k").grade(SUM, Outcome(output=output))
    assert grade.answers == {"strict-match": strict, "flexible-extract": flexible}
    assert grade.scores == {"exact_match,strict-match": right[0], "exact_match,flexible-extract": right[1]}


@pytest.mark.parametrize(
    "output, strict, right",
    [
        (" 9 * 2 = 18. The answer is 18.", "18", 1),
        (" The answer is 18.\n", "18", 1),
        (" The answer is 18.50.", "18.50", 0),
        (" The answer is 18", "1", 0),  # the pattern's dot must match something: it takes the 8
        (" The answer is 8", "[invalid]", 0),
        (" The answer is 18\n", "1", 0),  # a line end is not matched by the dot
        (" The answer is 18 eggs", "18", 1),
        (" The answer is $18.", "[invalid]", 0),
        (" So the answer is 18.", "[invalid]", 0),  # lower case "the"
        (" The answer is 18. The answer is 20.", "18.", 1),  # here the dot takes the space
        (" #### 18", "[invalid]", 0),
    ],
)
def test_gsm8k_cot_strict_match(output: str, strict: str, right: int) -> None:
    grade = plugins.load(packs.TASKS, "gsm8k_cot").grade(BARE, Outcome(output=output))
    assert grade.answers["strict-match"] == strict
    assert grade.scores["exact_match,strict-match"] == right


@pytest.mark.parametrize(
    "target, answer, right", [("1,800", "1800", 1), ("$18", "18", 1), ("18.", "18", 1), ("18.0", "18", 0)]
)
def test_the_reference_is_cleaned_like_the_prediction(target: str, answer: str, right: int) -> None:
    item = BARE.model_copy(update={"target": target})
    grade = plugins.load(packs.TASKS, "gsm8k_cot").grade(item, Outcome(output=f" It is {answer}"))
    assert grade.scores["exact_match,flexible-extract"] == right


@pytest.mark.parametrize(
    "choices, logprobs, acc, acc_norm",
    [
        (("a", "b", "c"), (-3.0, -1.0, -2.0), "1", "1"),
        (("a", "b", "c"), (-1.0, -1.0, -2.0), "0", "0"),  # a tie goes to the lowest index
        (("a", "b", "c"), (-2.0, -1.0, -1.0), "1", "1"),
        (("ab", "abcdefgh"), (-2.0, -4.0), "0", "1"),  # -1.0 against -0.5 per character
        (("ab", "abcd"), (-2.0, -4.0), "0", "0"),  # equal per character
        (("éé", "abc"), (-2.0, -2.9), "0", "1"),  # characters, not bytes: é is one
        (("ee", "abc"), (-2.0, -2.9), "0", "1"),
    ],
)
def test_choices(choices: tuple[str, ...], logprobs: tuple[float, ...], acc: str, acc_norm: str) -> None:
    grade = plugins.load(packs.TASKS, "arc_challenge").grade(choice_item(*choices), Outcome(choice_logprobs=logprobs))
    assert grade.answers == {"acc": acc, "acc_norm": acc_norm}
    assert grade.scores == {"acc": float(acc == "0"), "acc_norm": float(acc_norm == "0")}


@pytest.mark.parametrize("logprobs", [(-1.0,), (-1.0, -2.0, -3.0), (math.nan, -1.0), (-math.inf, -1.0)])
def test_choices_refuse_wrong_or_unfinite_logprobs(logprobs: tuple[float, ...]) -> None:
    with pytest.raises(BadInput, match="document 3"):
        plugins.load(packs.TASKS, "arc_easy").grade(choice_item("a", "b"), Outcome(choice_logprobs=logprobs))
