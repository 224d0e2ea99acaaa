"""The OpenAI-compatible endpoints: /v1/models, /v1/completions, /v1/chat/completions.

Translates between OpenAI's JSON (as its public API reference gives it) and `completions`. What is not supported is refused by name, never
ignored when it would change the answer. Not aware of engines.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from joulemark.errors import BadInput, JoulemarkError, NotFound, http_status, to_problem
from joulemark_agent.completions import Completions
from joulemark_agent.messages import Completed, CompletionJob, Piece
from joulemark_agent.store import Store
from joulemark_http.bodies import read_model
from joulemark_http.interface import errors, takes

BODY_LIMIT = 4 * 1024 * 1024
DEFAULT_MAX_TOKENS = 16
"""OpenAI's own default for /v1/completions; chat has none."""


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")
    model: str
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    n: Literal[1] | None = None

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(_Request):
    """The body of /v1/completions."""

    prompt: str | list[str]
    max_tokens: Annotated[int, Field(ge=1)] | None = DEFAULT_MAX_TOKENS
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None


class ChatMessage(BaseModel):
    """One turn. Text only."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]]

    def text(self) -> str:
        """The content as text; raises BadInput for pictures and the like."""
        if isinstance(self.content, str):
            return self.content
        if any(part.get("type") != "text" for part in self.content):
            raise BadInput("only text content is supported", "send the content as a string")
        return "".join(str(part.get("text", "")) for part in self.content)


class ChatRequest(_Request):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


_ERROR_SCHEMA: dict[str, Any] = {"type": "object", "description": "OpenAI's error shape, or a Problem from the gate"}
# These change the answer; a server that ignored them would lie.
REFUSED = ("tools", "functions", "response_format", "logit_bias", "frequency_penalty", "presence_penalty", "audio")


def create_router(store: Store, completions: Completions) -> APIRouter:
    """The three endpoints over the agent's artifacts."""
    router = APIRouter(prefix="/v1", responses=errors(_ERROR_SCHEMA, "text/event-stream"))

    @router.get("/models")
    def models() -> Any:
        entries = [
            {"id": manifest.name, "object": "model", "created": 0, "owned_by": "joulemark", "artifact_id": artifact_id}
            for artifact_id, manifest in store.artifacts().items()
        ]
        return {"object": "list", "data": entries}

    @router.get("/models/{name}")
    def model(name: str) -> Any:
        artifact_id = find_artifact(store, name)
        return {"id": name, "object": "model", "created": 0, "owned_by": "joulemark", "artifact_id": artifact_id}

    @router.post("/completions", openapi_extra=takes(CompletionRequest))
    async def complete(request: Request) -> Response:
        return await _guarded(request, CompletionRequest, partial(_Text, store, completions))

    @router.post("/chat/completions", openapi_extra=takes(ChatRequest))
    async def chat(request: Request) -> Response:
        return await _guarded(request, ChatRequest, partial(_Chat, store, completions))

    return router


def find_artifact(store: Store, name: str) -> str:
    """The artifact id of a model's name (or of an id). Raises NotFound, or BadInput when two artifacts share the name."""
    artifacts = store.artifacts()
    if name in artifacts:
        return name
    found = [artifact_id for artifact_id, manifest in artifacts.items() if manifest.name == name]
    if not found:
        known = ", ".join(sorted({manifest.name for manifest in artifacts.values()})) or "none"
        raise NotFound(f"the model {name!r} is not on this board", f"models here: {known}")
    if len(found) > 1:
        raise BadInput(f"{len(found)} artifacts are named {name!r}", f"use an artifact id: {', '.join(found)}")
    return found[0]


async def _guarded(request: Request, model: Any, make: Any) -> Response:
    try:
        body = await read_model(request, model, BODY_LIMIT)
        unsupported = [name for name in REFUSED if (body.model_extra or {}).get(name) not in (None, 0, [], {})]
        if unsupported:
            raise BadInput(f"not supported: {', '.join(unsupported)}", "leave these out")
        answer = make(body)
        if body.stream:
            events = answer.events()
            # The first event is awaited here, so that a refusal is an HTTP status and not a broken stream.
            first = await run_in_threadpool(next, events)
            return StreamingResponse(_chain(first, events), media_type="text/event-stream")
        return JSONResponse(await run_in_threadpool(answer.whole))
    except JoulemarkError as error:
        return error_response(error)


def error_response(error: JoulemarkError) -> JSONResponse:
    """OpenAI's error shape."""
    status = http_status(error.code)
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    content = {"error": {"message": message, "type": kind, "param": None, "code": to_problem(error).code}}
    return JSONResponse(content, status_code=status)


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield first
        yield from rest
    except JoulemarkError as error:
        yield _event(json.loads(bytes(error_response(error).body)))


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


class _Answer:
    """What both endpoints share: the pieces of one choice, usage, the frame of a response."""

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __init__(self, store: Store, completions: Completions, body: Any) -> None:
        self._completions = completions
        self._body = body
        self._artifact = find_artifact(store, body.model)
        self._frame = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}

    def _job(self, **more: Any) -> CompletionJob:
        body = self._body
        return CompletionJob(
            stop=body.stops(),
            temperature=1.0 if body.temperature is None else float(body.temperature),
            top_p=1.0 if body.top_p is None else float(body.top_p),
            seed=uuid.uuid4().int % 2**32 if body.seed is None else abs(body.seed) % 2**63,
            **more,
        )

    def _pieces(self, job: CompletionJob) -> Iterator[Piece | Completed]:
        return self._completions.complete(self._artifact, job)

    def _collect(self, job: CompletionJob) -> tuple[str, list[Piece], Completed]:
        pieces: list[Piece] = []
        for message in self._pieces(job):
            if isinstance(message, Completed):
                return "".join(piece.text for piece in pieces) + message.rest, pieces, message
            pieces.append(message)
        raise BadInput("the completion ended without an end", "this is a defect: report it")

    def _wants_usage(self) -> bool:
        return bool((self._body.stream_options or {}).get("include_usage"))

    def _usage_event(self, usage: dict[str, int]) -> Iterator[bytes]:
        if self._wants_usage():
            yield _event({**self._frame, "object": self.chunk_kind, "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"


def _usage(ends: list[Completed]) -> dict[str, int]:
    prompt, new = sum(end.prompt_tokens for end in ends), sum(end.new_tokens for end in ends)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class _Text(_Answer):
    kind = "text_completion"
    chunk_kind = "text_completion"
    prefix = "cmpl"

    def _jobs(self) -> list[CompletionJob]:
        body = self._body
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        return [
            self._job(
                prompt=prompt,
                max_new_tokens=body.max_tokens or DEFAULT_MAX_TOKENS,
                logprobs=body.logprobs is not None,
                top_logprobs=body.logprobs or 0,
            )
            for prompt in prompts
        ]

    def whole(self) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        ends: list[Completed] = []
        for index, job in enumerate(self._jobs()):
            text, pieces, end = self._collect(job)
            ends.append(end)
            logprobs = self._logprobs(pieces) if job.logprobs else None
            choices.append({"index": index, "text": text, "finish_reason": end.finish, "logprobs": logprobs})
        return {**self._frame, "object": self.kind, "choices": choices, "usage": _usage(ends)}

    def events(self) -> Iterator[bytes]:
        ends: list[Completed] = []
        for index, job in enumerate(self._jobs()):
            for message in self._pieces(job):
                if isinstance(message, Completed):
                    ends.append(message)
                    choice = {"index": index, "text": message.rest, "finish_reason": message.finish, "logprobs": None}
                else:
                    logprobs = self._logprobs([message]) if job.logprobs else None
                    choice = {"index": index, "text": message.text, "finish_reason": None, "logprobs": logprobs}
                yield _event({**self._frame, "object": self.chunk_kind, "choices": [choice]})
        yield from self._usage_event(_usage(ends))

    def _logprobs(self, pieces: list[Piece]) -> dict[str, Any]:
        offsets: list[int] = []
        offset = 0
        for piece in pieces:
            offsets.append(offset)
            offset += len(piece.token)
        return {
            "tokens": [piece.token for piece in pieces],
            "token_logprobs": [piece.logprob for piece in pieces],
            "top_logprobs": [dict(piece.top) for piece in pieces],
            "text_offset": offsets,
        }


class _Chat(_Answer):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def _chat_job(self) -> CompletionJob:
        body = self._body
        return self._job(
            messages=tuple({"role": message.role, "content": message.text()} for message in body.messages),
            max_new_tokens=body.max_completion_tokens or body.max_tokens,
            logprobs=bool(body.logprobs),
            top_logprobs=body.top_logprobs or 0,
        )

    def whole(self) -> dict[str, Any]:
        job = self._chat_job()
        text, pieces, end = self._collect(job)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": end.finish,
            "logprobs": self._logprobs(pieces) if job.logprobs else None,
        }
        return {**self._frame, "object": self.kind, "choices": [choice], "usage": _usage([end])}

    def events(self) -> Iterator[bytes]:
        job = self._chat_job()
        for number, message in enumerate(self._pieces(job)):
            if number == 0:
                yield self._chunk({"role": "assistant", "content": ""}, None, None)
            if isinstance(message, Completed):
                yield self._chunk({"content": message.rest} if message.rest else {}, message.finish, None)
                yield from self._usage_event(_usage([message]))
            else:
                yield self._chunk({"content": message.text}, None, self._logprobs([message]) if job.logprobs else None)

    def _chunk(self, delta: dict[str, str], finish: str | None, logprobs: dict[str, Any] | None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return _event({**self._frame, "object": self.chunk_kind, "choices": [choice]})

    def _logprobs(self, pieces: list[Piece]) -> dict[str, Any]:
        def entry(token: str, value: float | None) -> dict[str, Any]:
            return {"token": token, "logprob": value, "bytes": list(token.encode())}

        return {
            "content": [
                {**entry(piece.token, piece.logprob), "top_logprobs": [entry(*pair) for pair in piece.top]}
                for piece in pieces
            ],
            "refusal": None,
        }
