"""A backend without an engine: fast, deterministic, and able to fail on request. For tests and for trying the machinery.

It ships with the product and never stands in for a real engine in a result: its facts say `fake`. A token is a word with the white
space before it. A continuation's log-probability falls with a hash of the text, so equal requests score equal everywhere.
Generation echoes the answer `The answer is N.` with N from the same hash.

The environment variable JOULEMARK_FAKE_FAULT makes it fail in the accuracy phase, for fault tests: `kill:5` (SIGKILL to itself before the
sixth result), `abort:5`, `hang:5`, `memory:5` (MemoryError), `slow:0.05` (seconds per result).
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from joulemark.errors import BadInput
from joulemark.wire import EngineFacts, Problem
from joulemark_agent.backends import Choice, Generated, GenerateRequest, Options, Scored, ScoreRequest, Session, Token
from joulemark_agent.decoding import TextBuffer

FORMATS = ("gguf", "onnx")
MODULES = ()
CONTEXT_TOKENS = 8192
_WORD = re.compile(r"\s*\S+|\s+$")


def open_session(path: Path, options: Options) -> Session:
    """Reads nothing but the file's name."""
    return FakeSession(path.name, options, os.environ.get("JOULEMARK_FAKE_FAULT", ""))


class Fault:
    """Fails once after a number of results."""

    def __init__(self, text: str) -> None:
        self._kind, _, amount = text.partition(":")
        self._amount = float(amount or 0)
        self._results = 0

    def check(self) -> None:
        """Called before each result."""
        if self._kind == "slow":
            time.sleep(self._amount)
        elif self._kind and self._results == int(self._amount):
            self._fail()
        self._results += 1

    def _fail(self) -> None:
        if self._kind == "memory":
            raise MemoryError
        if self._kind == "hang":
            while True:
                time.sleep(1)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "abort": signal.SIGABRT}[self._kind])


class FakeSession:
    """See the module."""

    def __init__(self, name: str, options: Options, fault: str) -> None:
        self._name = name
        self._options = options
        self._window = min(options.context_tokens or CONTEXT_TOKENS, CONTEXT_TOKENS)
        self._fault = Fault(fault)

    def facts(self) -> EngineFacts:
        return EngineFacts(
            backend="fake",
            engine="fake",
            version="1",
            build="no engine: results are not measurements",
            model=self._name,
            model_sha256=self._options.model_sha256,
            device="none",
            threads=self._options.threads,
            batch_tokens=self._options.batch_tokens,
            sequences=self._options.sequences,
            context_tokens=self._window,
            kv_type="none",
            flash_attention=False,
            branching=True,
        )

    def count_tokens(self, text: str) -> int:
        return len(_WORD.findall(text))

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[Scored]:
        for request in requests:
            self._fault.check()
            self._options.beat()
            tokens = self.count_tokens(request.prompt)
            lengths = tuple(self.count_tokens(text) for text in request.continuations)
            if tokens + max(lengths, default=0) > self._window:
                yield Scored(request.key, tokens, problem=self._too_long(tokens))
                continue
            values = tuple(-20 * _unit(request.prompt + text) for text in request.continuations)
            yield Scored(request.key, tokens, values, tuple(value > -1 for value in values), lengths)

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Generated]:
        for request in requests:
            self._fault.check()
            self._options.beat()
            tokens = self.count_tokens(request.prompt)
            if tokens + request.max_new_tokens > self._window:
                yield Generated(request.key, tokens, problem=self._too_long(tokens))
                continue
            buffer, count, finish = TextBuffer(request.stop), 0, "eos"
            for word in _WORD.findall(_answer(request.prompt)):
                count += 1
                if buffer.push(word.encode()):
                    finish = "stop"
                    break
                if count == request.max_new_tokens:
                    finish = "length"
                    break
            yield Generated(request.key, tokens, count, buffer.finish(), finish)

    def stream(self, prompt: str, max_new_tokens: int, choice: Choice) -> Iterator[Token]:
        needed = self.count_tokens(prompt) + max_new_tokens
        if needed > self._window:
            problem = self._too_long(needed)
            raise BadInput(problem.message, problem.hint)
        words = _WORD.findall(_answer(prompt))
        for index in range(max_new_tokens):
            self._options.beat()
            text = words[index] if index < len(words) else ""
            score = -_unit(text) if choice.logprobs else None
            top = ((text.encode(), -_unit(text)),) if choice.top_logprobs else ()
            yield Token(index, text.encode(), index >= len(words), score, top)

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages) + "\nassistant:"

    def close(self) -> None:
        """Nothing to free."""

    def _too_long(self, needed: int) -> Problem:
        return Problem(
            code="prompt_too_long",
            message=f"the request needs {needed} tokens, the context holds {self._window}",
            hint="raise context_tokens",
        )


def _unit(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _answer(prompt: str) -> str:
    return f" Let us see. The answer is {int(_unit(prompt) * 100)}.\n\nQ: next"
