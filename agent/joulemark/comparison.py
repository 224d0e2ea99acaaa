"""Compares two sets of per-item samples of one task, document by document: ours with lm-eval's, or any two.

Owns the rules of agreement. Pure. It is not aware of where the samples come from: see `joulemark.samples`.
Log-probabilities are natural logarithms. Only documents with the same prompt, target and choices are compared; scores
are taken over exactly those, so that both sides answered the same questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from joulemark.errors import BadInput
from joulemark.lmeval import standard_error
from joulemark.multiple_choice import best
from joulemark.samples import Sample

TOLERANCE_PER_TOKEN = 1e-3
"""|Δ log p| per token up to which log-probabilities count as the same (float32 summation order)."""
EQUAL_CHOICES = 0.97
"""Share of equal choices from which two engines' choices count as equivalent."""

Verdict = Literal["identical", "equivalent", "different", "not comparable"]


@dataclass(frozen=True)
class Difference:
    """One document on which the two sides differ, and in what."""

    doc_id: int
    what: str
    ours: str
    theirs: str


@dataclass(frozen=True)
class ScorePair:
    """One score on both sides over the same `n` documents; the standard errors are None when n is 1."""

    name: str
    n: int
    ours: float
    ours_error: float | None
    theirs: float
    theirs_error: float | None

    @property
    def agrees(self) -> bool:
        """Whether the scores lie within one standard error of each other (the smaller of the two errors)."""
        return abs(self.ours - self.theirs) <= min(self.ours_error or 0.0, self.theirs_error or 0.0)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. Log-probability figures are None when there are none, or no token counts."""

    shared: int
    compared: int
    only_ours: tuple[int, ...]
    only_theirs: tuple[int, ...]
    logprob_max: float | None
    logprob_mean: float | None
    logprob_max_per_token: float | None
    differences: tuple[Difference, ...]
    scores: tuple[ScorePair, ...]
    verdict: Verdict
    reasons: tuple[str, ...]

    def differing(self, what: str) -> int:
        """On how many documents the sides differ in `what`."""
        return sum(difference.what == what for difference in self.differences)


def compare(
    ours: Sequence[Sample], theirs: Sequence[Sample], tokens: Mapping[int, Sequence[int]] | None = None
) -> Comparison:
    """Compares by document and filter. `tokens[doc_id][i]`, where known, is the number of tokens of choice i.

    `what` in the differences is "prompt", "target", "choices" (these make a document incomparable), "acc", "acc_norm"
    (the chosen index), "output" or "answer <filter>". Raises BadInput when the two sets share no filter.
    """
    left, right = {sample.key: sample for sample in ours}, {sample.key: sample for sample in theirs}
    if not {name for _, name in left} & {name for _, name in right}:
        raise BadInput("the two sets of samples have no filter in common", "give files of the same task")
    keys = [key for key in left if key in right]
    questions = _once(difference for key in keys for difference in _questions(left[key], right[key]))
    incomparable = {difference.doc_id for difference in questions}
    pairs = [(left[key], right[key]) for key in keys if key[0] not in incomparable]
    answers = _once(difference for a, b in pairs for difference in _answers(a, b))
    deltas = [delta for a, b in pairs for delta in _deltas(a, b)]
    per_token = _per_token(pairs, tokens) if tokens is not None else None
    scores = _scores(pairs)
    shared = {doc_id for doc_id, _ in keys}
    verdict, reasons = _judge(questions, answers, deltas, per_token, scores, len(shared - incomparable))
    return Comparison(
        shared=len(shared),
        compared=len(shared - incomparable),
        only_ours=tuple(sorted({sample.doc_id for sample in ours} - {sample.doc_id for sample in theirs})),
        only_theirs=tuple(sorted({sample.doc_id for sample in theirs} - {sample.doc_id for sample in ours})),
        logprob_max=max(deltas, default=None),
        logprob_mean=sum(deltas) / len(deltas) if deltas else None,
        logprob_max_per_token=per_token,
        differences=(*questions, *answers),
        scores=scores,
        verdict=verdict,
        reasons=reasons,
    )


def _once(differences: Iterable[Difference]) -> list[Difference]:
    """Without repetitions: a prompt is the same under every filter."""
    return list(dict.fromkeys(differences))


def _questions(a: Sample, b: Sample) -> list[Difference]:
    found: list[Difference] = []
    if a.prompt_sha256 != b.prompt_sha256:
        found.append(Difference(a.doc_id, "prompt", a.prompt_sha256, b.prompt_sha256))
    if a.target != b.target:
        found.append(Difference(a.doc_id, "target", a.target, b.target))
    if a.choices != b.choices or (a.logprobs is None) != (b.logprobs is None):
        found.append(Difference(a.doc_id, "choices", " | ".join(a.choices), " | ".join(b.choices)))
    return found


def _answers(a: Sample, b: Sample) -> list[Difference]:
    if a.logprobs is not None and b.logprobs is not None:
        chosen = {"acc": (best(a.logprobs), best(b.logprobs)), "acc_norm": (_normalised(a), _normalised(b))}
        return [Difference(a.doc_id, what, str(x), str(y)) for what, (x, y) in chosen.items() if x != y]
    found: list[Difference] = []
    if a.output != b.output:
        found.append(Difference(a.doc_id, "output", a.output or "", b.output or ""))
    if a.answer != b.answer:
        found.append(Difference(a.doc_id, f"answer {a.filter}", a.answer or "", b.answer or ""))
    return found


def _normalised(sample: Sample) -> int:
    """The choice with the highest log-probability per character; an empty choice cannot win (−∞)."""
    values = zip(sample.logprobs or (), sample.choices, strict=True)
    return best([value / len(choice) if choice else float("-inf") for value, choice in values])


def _deltas(a: Sample, b: Sample) -> list[float]:
    return [abs(x - y) for x, y in zip(a.logprobs or (), b.logprobs or (), strict=True)]


def _per_token(pairs: Sequence[tuple[Sample, Sample]], tokens: Mapping[int, Sequence[int]]) -> float | None:
    ratios = [
        delta / count
        for a, b in pairs
        if a.doc_id in tokens
        for delta, count in zip(_deltas(a, b), tokens[a.doc_id], strict=True)
    ]
    return max(ratios, default=None)


def _scores(pairs: Sequence[tuple[Sample, Sample]]) -> tuple[ScorePair, ...]:
    columns: dict[str, tuple[list[float], list[float]]] = {}
    for a, b in pairs:
        for metric in a.scores.keys() & b.scores.keys():
            left, right = columns.setdefault(f"{metric},{a.filter}", ([], []))
            left.append(a.scores[metric])
            right.append(b.scores[metric])
    return tuple(
        ScorePair(
            name=name,
            n=len(left),
            ours=sum(left) / len(left),
            ours_error=standard_error(left),
            theirs=sum(right) / len(right),
            theirs_error=standard_error(right),
        )
        for name, (left, right) in sorted(columns.items())
    )


def _judge(
    questions: Sequence[Difference],
    answers: Sequence[Difference],
    deltas: Sequence[float],
    per_token: float | None,
    scores: Sequence[ScorePair],
    compared: int,
) -> tuple[Verdict, tuple[str, ...]]:
    if not compared:
        return "not comparable", ("no document was asked in the same way on both sides",)
    if questions:
        documents = len({difference.doc_id for difference in questions})
        return "not comparable", (f"{documents} documents differ in prompt, target or choices",)
    largest = per_token if per_token is not None else max(deltas, default=0.0)
    if not answers and largest <= TOLERANCE_PER_TOKEN and all(pair.ours == pair.theirs for pair in scores):
        return "identical", ("every answer is the same",)
    reasons = [
        f"{pair.name}: {pair.ours:.4f} and {pair.theirs:.4f} differ by more than one standard error"
        for pair in scores
        if not pair.agrees
    ]
    for what in ("acc", "acc_norm"):
        equal = 1 - sum(difference.what == what for difference in answers) / compared
        if equal < EQUAL_CHOICES:
            reasons.append(f"{what}: only {equal:.1%} of the choices are equal")
    if reasons:
        return "different", tuple(reasons)
    return "equivalent", ("scores agree within one standard error, and nearly all choices are equal",)
