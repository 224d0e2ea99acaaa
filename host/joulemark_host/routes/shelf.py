"""Artifacts and packs to pull: manifests, files with Range and If-Range, packs."""

from __future__ import annotations

import re

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, Response, StreamingResponse

from joulemark.errors import Forbidden
from joulemark.wire import Manifest
from joulemark_host.access import Access
from joulemark_host.dispatch import Dispatch
from joulemark_host.registry import Caller
from joulemark_host.shelf import Shelf, StoredFile

_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})", re.ASCII)


def create_router(shelf: Shelf, access: Access, dispatch: Dispatch | None) -> APIRouter:
    """Manifests are for people, bytes for operators; a board gets the bytes that it was given an order about (which has the manifest)."""
    router = APIRouter()
    known = [Depends(access.guard("viewer", "operator"))]
    taker = access.guard("operator", "device")

    def check(caller: Caller, sha256: str) -> None:
        """A board that was stolen learns nothing of what others hold: the answer is the same whether it is on the shelf or not."""
        if caller.role == "device" and (dispatch is None or not dispatch.may_fetch(caller.subject, sha256)):
            raise Forbidden(f"{sha256[:80]!r} was never issued to this board", "`joulemark push` or `run` issues it")

    @router.get("/api/artifacts", dependencies=known)
    def artifacts() -> dict[str, Manifest]:
        return shelf.artifacts()

    @router.get("/api/artifacts/{artifact_id}", dependencies=known)
    def artifact(artifact_id: str) -> Manifest:
        return shelf.manifest(artifact_id)

    @router.head("/api/files/{sha256}", response_class=Response, operation_id="file_size")
    @router.get("/api/files/{sha256}", response_class=Response, operation_id="file")
    def file(sha256: str, request: Request, caller: Caller = Depends(taker)) -> Response:
        check(caller, sha256)
        # The name is the content, so it never changes: If-Range with this tag always resumes the same bytes.
        headers = {"ETag": f'"{sha256}"', "Cache-Control": "private, max-age=31536000, immutable"}
        stored = shelf.file(sha256)
        if stored.path is not None:
            return FileResponse(stored.path, media_type="application/octet-stream", headers=headers)
        return _streamed(stored, request, headers)

    @router.get("/api/packs/{pack_id}")
    def pack(pack_id: str, caller: Caller = Depends(taker)) -> Response:
        check(caller, pack_id)
        body = shelf.pack_bytes(pack_id)
        return Response(body, media_type="application/json", headers={"ETag": f'"{pack_id}"'})

    return router


def _streamed(stored: StoredFile, request: Request, headers: dict[str, str]) -> Response:
    """A file that lies elsewhere, or one range of it (RFC 9110, 14.2): what boards ask for; several ranges are answered with the whole."""
    start, end, status = 0, stored.size_bytes, 200
    asked = _RANGE.fullmatch(request.headers.get("range", ""))
    if asked is not None and request.headers.get("if-range") in (None, headers["ETag"]):
        start, status = int(asked[1]), 206
        end = min(int(asked[2]) + 1 if asked[2] else end, end)
        if start >= end:
            return Response(status_code=416, headers={"Content-Range": f"bytes */{stored.size_bytes}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{stored.size_bytes}"
    headers |= {"Content-Length": str(end - start), "Accept-Ranges": "bytes"}
    if request.method == "HEAD":
        return Response(status_code=200, headers=headers, media_type="application/octet-stream")
    return StreamingResponse(stored.blocks(start, end), status, headers, "application/octet-stream")
