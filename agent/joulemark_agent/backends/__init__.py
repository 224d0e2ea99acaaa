"""The backend plug-in contract: one file an engine, reached only through `joulemark.plugins.load`.

A backend module offers

    FORMATS: tuple[str, ...]                     the manifest formats that it can open
    MODULES: tuple[str, ...]                     what must be importable for it; where something is not, the next backend is taken
    open_session(path: Path, options: Options) -> Session
        raises MissingExtra (with the pip line) when the engine is not installed,
        EngineFailed when it refuses the file.

Backends never report time: the runner owns the clock and stamps what they yield. Requests and results are plain
values; `key` is the caller's and comes back unchanged. Results may come in any order. A request that cannot be served (too long
for the context, say) yields a result with `problem` set and does not disturb the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from joulemark.wire import EngineFacts, Problem


def do_nothing() -> None:
    """The beat of a caller that does not watch."""


@dataclass(frozen=True)
class Options:
    """How to open an engine. `context_tokens` None: as long as the model was trained for, allocated only as needed."""

    threads: int
    model_sha256: str
    context_tokens: int | None = None
    batch_tokens: int = 512
    sequences: int = 16
    memory_bytes: int | None = None
    """What the key-value memory may take; None: no limit."""
    beat: Callable[[], None] = do_nothing
    """Called after every engine call, so that a hung engine can be told from a slow one."""


@dataclass(frozen=True)
class ScoreRequest:
    """Score each continuation (leading space included) after `prompt`."""

    key: int
    prompt: str
    continuations: tuple[str, ...]


@dataclass(frozen=True)
class Scored:
    """`logprobs[i]` is the sum of natural log-probabilities of continuation i's tokens (float32 log-softmax, full vocabulary);
    `greedy[i]` is True when every token of it was the most likely one."""

    key: int
    prompt_tokens: int = 0
    logprobs: tuple[float, ...] = ()
    greedy: tuple[bool, ...] = ()
    continuation_tokens: tuple[int, ...] = ()
    problem: Problem | None = None


@dataclass(frozen=True)
class GenerateRequest:
    """Continue `prompt` greedily until a stop string, an end-of-generation token or the limit."""

    key: int
    prompt: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generated:
    """`text` is cut before the first stop string; `new_tokens` counts every token that was decided, the last included."""

    key: int
    prompt_tokens: int = 0
    new_tokens: int = 0
    text: str = ""
    finish: Literal["stop", "length", "eos"] | None = None
    problem: Problem | None = None


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen. Temperature 0 is greedy; `top_logprobs` > 0 asks for the log-probabilities."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    logprobs: bool = False
    top_logprobs: int = 0


@dataclass(frozen=True)
class Token:
    """One new token of a stream. `piece` is its bytes (a character may span tokens); `end` marks an end-of-generation token."""

    token: int
    piece: bytes
    end: bool
    logprob: float | None = None
    top: tuple[tuple[bytes, float], ...] = ()


class Session(Protocol):
    """An opened model. Not thread-safe: one caller at a time."""

    def facts(self) -> EngineFacts:
        """What really runs. Complete only after the first request, because the context is allocated for it."""
        ...

    def count_tokens(self, text: str) -> int:
        """Prompt tokens of `text`, as `stream` would decode them."""
        ...

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[Scored]:
        """Offline scoring with all the sharing that the engine can do."""
        ...

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Generated]:
        """Offline greedy generation with all the sharing and batching that the engine can do."""
        ...

    def stream(self, prompt: str, max_new_tokens: int, choice: Choice) -> Iterator[Token]:
        """Single stream, nothing reused: the first item comes when the whole prompt was decoded. End tokens do not end the
        stream: the caller stops asking. Raises BadInput when prompt and limit do not fit the context."""
        ...

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt text of a conversation by the model's own chat template. Raises BadInput when it has none."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...
