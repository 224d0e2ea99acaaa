"""Sequences that are generated, whatever the engine: which prompts fit, and when a sequence ends. Not a plug-in; backends build on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from joulemark.errors import BadInput
from joulemark.wire import Problem
from joulemark_agent.backends import Generated, GenerateRequest
from joulemark_agent.backends._scoring import too_long
from joulemark_agent.decoding import TextBuffer

SHORT_PREFIX = 16
"""A common prefix shorter than this is not worth being kept."""


class Vocabulary(Protocol):
    """Text into tokens and back."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids, special tokens parsed, BOS in front where the tokenizer's own default says so (tasks.md)."""
        ...

    def piece(self, token: int) -> bytes:
        """The bytes of a token; control tokens are empty."""
        ...

    def is_end(self, token: int) -> bool:
        """Whether the token ends a generation."""
        ...


Waiting = tuple[GenerateRequest, list[int]]


def generate(
    requests: Sequence[GenerateRequest],
    vocabulary: Vocabulary,
    window: int,
    run: Callable[[list[Waiting]], Iterator[Generated]],
) -> Iterator[Generated]:
    """Results of those that cannot be served, then what `run` makes of the others."""
    refused, waiting = admit(requests, vocabulary, window)
    yield from refused
    if waiting:
        yield from run(waiting)


def admit(
    requests: Sequence[GenerateRequest], vocabulary: Vocabulary, window: int
) -> tuple[list[Generated], list[Waiting]]:
    """(results of those that cannot be served, the others with their prompts' tokens)."""
    refused: list[Generated] = []
    waiting: list[Waiting] = []
    for request in requests:
        tokens = vocabulary.tokenize(request.prompt)
        needed = len(tokens) + request.max_new_tokens
        if not tokens:
            refused.append(
                Generated(request.key, problem=Problem(code="empty_prompt", message="the prompt has no token"))
            )
        elif needed > window:
            refused.append(Generated(request.key, len(tokens), problem=too_long(needed, window, "prompt and answer")))
        else:
            waiting.append((request, tokens))
    return refused, waiting


def prompt_of_stream(prompt: str, max_new_tokens: int, vocabulary: Vocabulary, window: int) -> list[int]:
    """The tokens of a single stream's prompt. Raises BadInput when it is empty or does not fit."""
    tokens = vocabulary.tokenize(prompt)
    needed = len(tokens) + max_new_tokens
    if tokens and needed <= window:
        return tokens
    problem = too_long(needed, window, "prompt and answer")
    raise BadInput("the prompt has no token" if not tokens else problem.message, problem.hint)


class Growing:
    """A sequence that is generating. `position` is where its next token goes."""

    def __init__(self, request: GenerateRequest, tokens: list[int]) -> None:
        self.request = request
        self.tokens = tokens
        self.position = len(tokens)
        self.token = -1
        self._new_tokens = 0
        self._buffer = TextBuffer(request.stop)

    def advance(self, token: int, vocabulary: Vocabulary) -> Generated | None:
        """Take a new token in; the result when that ends the sequence."""
        self.token = token
        self._new_tokens += 1
        finish = None
        if vocabulary.is_end(token):
            finish = "eos"
        elif self._buffer.push(vocabulary.piece(token)):
            finish = "stop"
        elif self._new_tokens >= self.request.max_new_tokens:
            finish = "length"
        if finish is None:
            return None
        text = self._buffer.finish()
        if self._buffer.stopped:
            finish = "stop"
        return Generated(self.request.key, len(self.tokens), self._new_tokens, text, finish)
