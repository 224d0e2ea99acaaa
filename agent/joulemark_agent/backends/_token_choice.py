"""How the next token is chosen from a row of logits: greedy, or temperature and nucleus sampling with a seed. Not a plug-in.

numpy is passed in, so that importing this module stays cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from joulemark_agent.backends import Choice

Top = tuple[tuple[bytes, float], ...]


class TokenChooser:
    """Chooses one token a call; holds the random generator."""

    def __init__(self, numpy: Any, choice: Choice, piece: Callable[[int], bytes]) -> None:
        self._numpy = numpy
        self._choice = choice
        self._piece = piece
        self._random = numpy.random.default_rng(choice.seed)

    def __call__(self, row: Any) -> tuple[int, float | None, Top]:
        """(token, its log-probability if asked for, the most likely ones) of a float32 row of the vocabulary's size."""
        token = int(row.argmax()) if self._choice.temperature <= 0 else self._sample(row)
        if not self._choice.logprobs:
            return token, None, ()
        scores = self._log_softmax(row)
        count = self._choice.top_logprobs
        best = self._numpy.argsort(-scores, kind="stable")[:count]
        return token, float(scores[token]), tuple((self._piece(int(index)), float(scores[index])) for index in best)

    def _log_softmax(self, row: Any) -> Any:
        shifted = row - row.max()
        return shifted - self._numpy.log(self._numpy.exp(shifted).sum())

    def _sample(self, row: Any) -> int:
        numpy = self._numpy
        probabilities = numpy.exp(self._log_softmax(row.astype(numpy.float64) / self._choice.temperature))
        order = numpy.argsort(-probabilities, kind="stable")
        cumulative = numpy.cumsum(probabilities[order])
        # The nucleus is the shortest head whose probability reaches top_p; it always holds at least one token.
        kept = int(numpy.searchsorted(cumulative, min(self._choice.top_p, 1.0) * cumulative[-1])) + 1
        head = cumulative[: min(kept, len(cumulative))]
        return int(
            order[int(numpy.searchsorted(head, self._random.random() * head[-1], side="right").clip(0, len(head) - 1))]
        )
