"""Score requests on their way, whatever the engine: splitting texts into tokens, adding log-probabilities up in any order. Not a plug-in;
backends build on it.

Not aware of engines or of how a plan is run. Natural logarithms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from joulemark.wire import Problem
from joulemark_agent.backends import Scored, ScoreRequest
from joulemark_agent.planning import Request

Tokenize = Callable[[str], list[int]]


class OpenScore:
    """A request whose continuations are not all scored yet."""

    def __init__(self, key: int, prompt_tokens: int, sequences: Sequence[Request]) -> None:
        self.key = key
        self.prompt_tokens = prompt_tokens
        self.sequences = tuple(sequences)
        self.left = len(self.sequences)
        self._sums = [0.0] * len(self.sequences)
        self._greedy = [True] * len(self.sequences)

    def add(self, continuation: int, logprob: float, greedy: bool) -> None:
        """Count one token of a continuation."""
        self._sums[continuation] += logprob
        self._greedy[continuation] &= greedy

    def result(self) -> Scored:
        """The finished scores."""
        lengths = tuple(len(item.tokens) - item.scored_from for item in self.sequences)
        return Scored(self.key, self.prompt_tokens, tuple(self._sums), tuple(self._greedy), lengths)


Owner = tuple[OpenScore, int]
"""A request and the number of one of its continuations."""
Run = Callable[[list[Request], Sequence[Owner]], Iterator[int]]
"""Runs sequences, telling their owners what it reads; yields the number of each sequence when it is done."""


def score(requests: Sequence[ScoreRequest], tokenize: Tokenize, window: int, run: Run) -> Iterator[Scored]:
    """Score all continuations of all requests; a result comes when its last continuation is done."""
    flat: list[Request] = []
    owner: list[Owner] = []
    for request in requests:
        opened = open_score(request, tokenize, window)
        if isinstance(opened, Scored):
            yield opened
            continue
        owner.extend((opened, index) for index in range(len(opened.sequences)))
        flat.extend(opened.sequences)
    for finished in run(flat, owner) if flat else ():
        opened, _ = owner[finished]
        opened.left -= 1
        if opened.left == 0:
            yield opened.result()


def open_score(request: ScoreRequest, tokenize: Tokenize, window: int) -> OpenScore | Scored:
    """The request's sequences of tokens, or its result where it cannot be scored."""
    prompt = tokenize(request.prompt)
    sequences: list[Request] = []
    for continuation in request.continuations:
        whole = tokenize(request.prompt + continuation)
        # As lm-eval splits: the continuation is what follows as many tokens as the prompt alone has.
        if len(whole) <= len(prompt) or not prompt:
            problem = Problem(code="empty_continuation", message="a prompt or a choice has no token of its own")
            return Scored(request.key, problem=problem)
        if len(whole) > window:
            return Scored(request.key, len(prompt), problem=too_long(len(whole), window, "prompt and choice"))
        sequences.append(Request(tuple(whole), len(prompt)))
    return OpenScore(request.key, len(prompt), sequences)


def too_long(needed: int, window: int, what: str) -> Problem:
    """What does not fit the context, in words."""
    return Problem(
        code="prompt_too_long",
        message=f"{what} needs {needed} tokens, the context holds {window}",
        hint="raise context_tokens (the model's own limit is the most it can be) or use a model with a longer context",
    )
