"""Completions inside the worker process: one request at a time, streamed piece by piece.

The engine half of the OpenAI-compatible endpoints; `openai_api` is the HTTP half. Not aware of HTTP, runs or time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from joulemark.errors import JoulemarkError, to_problem
from joulemark_agent.backends import Choice, Session
from joulemark_agent.decoding import TextBuffer
from joulemark_agent.messages import Completed, CompletionJob, Failed, Message, Piece

UNASKED_TOKENS = 1024
"""An engine takes the memory for all that an answer may become at once: for a context of 131,072 tokens gigabytes."""


def answer(session: Session, job: CompletionJob, emit: Callable[[Message], None]) -> None:
    """Serve one completion; a request that cannot be served is answered with Failed, and the session goes on."""
    try:
        prompt = session.render_chat(job.messages) if job.prompt is None else job.prompt
        for message in complete(session, prompt, job):
            emit(message)
    except JoulemarkError as error:
        emit(Failed(problem=to_problem(error)))


def complete(session: Session, prompt: str, job: CompletionJob) -> Iterator[Message]:
    """Pieces as they become safe to show, then Completed. Without a limit UNASKED_TOKENS are, or what the context still holds."""
    prompt_tokens = session.count_tokens(prompt)
    limit = job.max_new_tokens or max(1, min(UNASKED_TOKENS, session.facts().context_tokens - prompt_tokens))
    buffer = TextBuffer(job.stop)
    choice = Choice(job.temperature, job.top_p, job.seed, job.logprobs, job.top_logprobs)
    count, finish = 0, "length"
    for token in session.stream(prompt, limit, choice):
        count += 1
        if token.end:
            finish = "stop"
            break
        stopped = buffer.push(token.piece)
        text = buffer.take()
        if text or token.logprob is not None:
            top = tuple((piece.decode(errors="replace"), value) for piece, value in token.top)
            yield Piece(text=text, token=token.piece.decode(errors="replace"), logprob=token.logprob, top=top)
        if stopped:
            finish = "stop"
            break
    buffer.finish()
    yield Completed(
        rest=buffer.rest(),
        finish="stop" if finish == "stop" else "length",
        prompt_tokens=prompt_tokens,
        new_tokens=count,
    )
