"""What the graded items of a run say: which score is the primary one, how many items there are, what is missing. Pure.

Not aware of times, power or the verdict. An item without an answer (its problem prevented one) counts as wrong: lm-eval
has no such items, so leaving them out would compare different question sets.
"""

from __future__ import annotations

from dataclasses import dataclass

from joulemark import plugins
from joulemark.errors import NotFound
from joulemark.wire import Absent, ItemRecord, Measure, Metric, RunRecord
from joulemark_agent.statistics import Z_95, mean, standard_error, wilson_interval


@dataclass(frozen=True)
class TaskFacts:
    """What a task module says about its scores."""

    primary: str
    chance: float | None


@dataclass(frozen=True)
class Tally:
    """The items of a run, each document once. `values[name]` holds one score per attempted item, in order."""

    expected: int
    attempted: int
    unanswered: int
    doubled: int
    first_problem: str
    values: dict[str, tuple[float, ...]]


def task_facts(task: str) -> TaskFacts | Absent:
    """The task's primary score and chance level, or why they are not known here."""
    try:
        module = plugins.load("joulemark.tasks", task)
    except NotFound as error:
        return Absent(reason=f"the grader of task {task} is not installed here: {error.message}")
    return TaskFacts(primary=module.PRIMARY, chance=module.CHANCE)


def first_of_each(items: tuple[ItemRecord, ...]) -> list[ItemRecord]:
    """The items with every document once; of doubled ones the first."""
    seen: dict[int, ItemRecord] = {}
    for item in items:
        seen.setdefault(item.doc_id, item)
    return list(seen.values())


def tally(record: RunRecord) -> Tally:
    """Counts the items and collects their scores; an unanswered item scores 0 everywhere."""
    items = first_of_each(record.items)
    names = dict.fromkeys(name for item in items if item.grade for name in item.grade.scores)
    unanswered = [item for item in items if item.grade is None]
    problems = [item.problem.message for item in unanswered if item.problem]
    size = record.pack.size
    return Tally(
        expected=min(record.spec.limit or size, size),
        attempted=len(items),
        unanswered=len(unanswered),
        doubled=len(record.items) - len(items),
        first_problem=problems[0] if problems else "no grade",
        values={
            name: tuple(item.grade.scores.get(name, 0.0) if item.grade else 0.0 for item in items) for name in names
        },
    )


def is_binary(values: tuple[float, ...]) -> bool:
    """Whether every score is right (1) or wrong (0)."""
    return all(value in (0.0, 1.0) for value in values)


def correct_count(values: tuple[float, ...]) -> int | None:
    """How many are right; None for graded scores such as ROUGE."""
    return int(sum(values)) if is_binary(values) else None


def score_interval(values: tuple[float, ...]) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's for right-or-wrong scores, else mean ± 1.96 standard errors."""
    right = correct_count(values)
    if right is not None:
        return wilson_interval(right, len(values))
    half = Z_95 * standard_error(values) if len(values) > 1 else float("inf")
    return mean(values) - half, mean(values) + half


def score_metric(counted: Tally, name: str) -> Metric:
    """Mean of one score with its interval; Absent when no item was answered or none has such a score."""
    if counted.attempted == 0 or counted.unanswered == counted.attempted:
        return Absent(reason=f"none of {counted.attempted} items was answered")
    values = counted.values.get(name)
    if values is None:
        return Absent(reason=f"the grades hold no score {name!r}, only {', '.join(counted.values)}")
    low, high = score_interval(values)
    finite = high != float("inf")
    source = f"mean of {name} over {counted.attempted} items"
    if counted.attempted < counted.expected:
        source += f" of {counted.expected}"
    if counted.unanswered:
        source += f"; {counted.unanswered} without an answer count as wrong"
    source += "; 95 % interval by Wilson" if is_binary(values) else "; 95 % interval by 1.96 standard errors"
    return Measure(
        value=mean(values),
        unit="1",
        n=len(values),
        low=low if finite else None,
        high=high if finite else None,
        source=source,
    )


def score_metrics(counted: Tally) -> dict[str, Metric]:
    """`score.<name>` and `stderr.<name>` (lm-eval's standard error) for every score that the grader gave."""
    found: dict[str, Metric] = {}
    for name, values in counted.values.items():
        found[f"score.{name}"] = score_metric(counted, name)
        found[f"stderr.{name}"] = (
            Measure(value=standard_error(values), unit="1", n=len(values), source="sample standard deviation ÷ √n")
            if len(values) > 1
            else Absent(reason="a standard error needs two items")
        )
    return found
