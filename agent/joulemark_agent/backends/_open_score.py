"""A score request on its way: log-probabilities are added token by token, in any order. Not a plug-in; backends build on it.

Not aware of engines or plans. Natural logarithms.
"""

from __future__ import annotations

from collections.abc import Sequence

from joulemark_agent.backends import Scored
from joulemark_agent.planning import Request


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
