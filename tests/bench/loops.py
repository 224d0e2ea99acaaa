"""The barest loops over llama_decode that do a given kind of work, and the counting of what passes through the engine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from joulemark_agent.backends._llama_engine import Context, Model


@dataclass
class Count:
    """Tokens that went into decode calls, and logits rows that came out."""

    tokens: int = 0
    rows: int = 0


@contextlib.contextmanager
def counted() -> Iterator[Count]:
    """Counts all decode calls while it is open."""
    count = Count()
    real = Context.decode

    def decode(self: Context) -> Any:
        count.tokens += self.batched
        rows = real(self)
        count.rows += len(rows)
        return rows

    Context.decode = decode  # type: ignore[method-assign]
    try:
        yield count
    finally:
        Context.decode = real  # type: ignore[method-assign]


def feed(context: Context, tokens: Sequence[int], start: int, sequence: int) -> None:
    """Decode tokens in full batches; the last one with logits."""
    for begin in range(0, len(tokens), context.batch_tokens):
        context.clear_batch()
        for offset in range(begin, min(begin + context.batch_tokens, len(tokens))):
            context.add(tokens[offset], start + offset, (sequence,), offset == len(tokens) - 1)
        context.decode()


class Prefill:
    """Calls of 512 tokens into an empty memory, as llama-bench's pp512; only the calls are timed."""

    def __init__(self, model: Model, threads: int) -> None:
        self.context = Context(model, 512, 1, 512, threads)

    def __call__(self) -> float:
        """Tokens/s of one call."""
        self.context.reset()
        self.context.clear_batch()
        for position in range(512):
            self.context.add(1000 + position, position, (0,), position == 511)
        started = time.perf_counter()
        self.context.decode()
        return 512 / (time.perf_counter() - started)


class Stream:
    """One sequence, token by token, after a prompt; starts over when `length` tokens are done."""

    def __init__(self, model: Model, threads: int, prompt: str, length: int) -> None:
        self._prompt = model.tokenize(prompt)
        self._context = Context(model, 1024, 1, 512, threads)
        self._length = self._done = length

    def make_room(self, tokens: int) -> None:
        """Read the prompt again when so many tokens do not fit into the length any more."""
        if self._done + tokens > self._length:
            self._context.reset()
            feed(self._context, self._prompt, 0, 0)
            self._done = 0

    def step(self) -> None:
        """One token."""
        self._context.clear_batch()
        self._context.add(500 + self._done, len(self._prompt) + self._done, (0,), True)
        self._context.decode()
        self._done += 1


class Batched:
    """Generation at its barest: `slots` sequences side by side over a common prefix, each with its own part of a prompt and so many new
    tokens, replaced at once when it has them. No text, no stop strings, no choice of tokens.

    The prefix is in memory before the clock starts: a whole task pays for it once.
    """

    def __init__(
        self, model: Model, threads: int, jobs: Iterable[tuple[Sequence[int], int]], slots: int, prefix: int
    ) -> None:
        self._jobs = list(reversed(list(jobs)))
        self._prefix = prefix
        own = max(len(prompt) - prefix + new for prompt, new in self._jobs)
        cells = -(-(prefix + slots * own) // 256) * 256
        self._context = Context(model, cells, slots + 1, 512, threads)
        self._free = list(range(slots, 0, -1))
        self._running: dict[int, list[int]] = {}
        feed(self._context, self._jobs[-1][0][:prefix], 0, 0)

    def __call__(self, finish: int) -> float:
        """Output tokens/s until `finish` more sequences have ended."""
        made = ended = 0
        started = time.perf_counter()
        while ended < finish:
            while self._free and self._jobs:
                self._begin(self._free.pop())
                made += 1
            made += len(self._running)
            ended += self._step()
        return made / (time.perf_counter() - started)

    def _begin(self, sequence: int) -> None:
        prompt, new = self._jobs.pop()
        self._context.copy(0, sequence)
        feed(self._context, prompt[self._prefix :], self._prefix, sequence)
        self._running[sequence] = [len(prompt), new - 1]

    def _step(self) -> int:
        context = self._context
        context.clear_batch()
        for sequence, state in self._running.items():
            context.add(500 + state[1], state[0], (sequence,), True)
            state[0] += 1
            state[1] -= 1
        context.decode()
        over = [sequence for sequence, state in self._running.items() if state[1] <= 0]
        for sequence in over:
            context.remove(sequence)
            del self._running[sequence]
        self._free.extend(over)
        return len(over)
