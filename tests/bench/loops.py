"""The barest loops over llama_decode that do a given kind of work, and the counting of what passes through the engine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
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
    """One sequence, token by token, after a prompt; starts over after `length` tokens."""

    def __init__(self, model: Model, threads: int, prompt: str, length: int) -> None:
        self.prompt = model.tokenize(prompt)
        self.context = Context(model, 1024, 1, 512, threads)
        self.length = length
        self.done = length

    def restart_if_due(self) -> None:
        """Read the prompt again when the length is reached."""
        if self.done >= self.length:
            self.context.reset()
            feed(self.context, self.prompt, 0, 0)
            self.done = 0

    def step(self) -> None:
        """One token."""
        self.context.clear_batch()
        self.context.add(500 + self.done, len(self.prompt) + self.done, (0,), True)
        self.context.decode()
        self.done += 1


class Batched:
    """The work of generating answers to several prompts side by side: own parts of the prompts, then step after step for all sequences.

    The common prefix is in memory before the clock starts: a whole task pays for it once.
    """

    def __init__(self, model: Model, threads: int, prompts: Sequence[Sequence[int]], prefix: int, cells: int) -> None:
        self.prompts = prompts
        self.prefix = prefix
        self.context = Context(model, cells, len(prompts) + 1, 512, threads)
        feed(self.context, prompts[0][:prefix], 0, 0)

    def __call__(self, steps: int) -> float:
        """Output tokens/s of one round of `steps` new tokens for every prompt."""
        context = self.context
        started = time.perf_counter()
        for sequence, prompt in enumerate(self.prompts, start=1):
            context.remove(sequence)
            context.copy(0, sequence)
            feed(context, prompt[self.prefix :], self.prefix, sequence)
        for step in range(steps - 1):
            context.clear_batch()
            for sequence, prompt in enumerate(self.prompts, start=1):
                context.add(500 + step, len(prompt) + step, (sequence,), True)
            context.decode()
        return steps * len(self.prompts) / (time.perf_counter() - started)
