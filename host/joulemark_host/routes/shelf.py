"""Artifacts and packs to pull: manifests, files with Range and If-Range, packs."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from fastapi.responses import FileResponse, Response

from joulemark.wire import Manifest
from joulemark_host.access import Access
from joulemark_host.shelf import Shelf


def create_router(shelf: Shelf, access: Access) -> APIRouter:
    """Manifests are for everybody who is known, bytes for boards and operators."""
    router = APIRouter()
    known = [Depends(access.guard("viewer", "operator", "device"))]
    takers = [Depends(access.guard("operator", "device"))]

    @router.get("/api/artifacts", dependencies=known)
    def artifacts() -> dict[str, Manifest]:
        return shelf.artifacts()

    @router.get("/api/artifacts/{artifact_id}", dependencies=known)
    def artifact(artifact_id: str) -> Manifest:
        return shelf.manifest(artifact_id)

    @router.head("/api/files/{sha256}", response_class=FileResponse, dependencies=takers, operation_id="file_size")
    @router.get("/api/files/{sha256}", response_class=FileResponse, dependencies=takers, operation_id="file")
    def file(sha256: str) -> FileResponse:
        # The name is the content, so it never changes: If-Range with this tag always resumes the same bytes.
        headers = {"ETag": f'"{sha256}"', "Cache-Control": "private, max-age=31536000, immutable"}
        return FileResponse(shelf.file(sha256), media_type="application/octet-stream", headers=headers)

    @router.get("/api/packs/{pack_id}", dependencies=takers)
    def pack(pack_id: str) -> Response:
        body = shelf.pack_bytes(pack_id)
        return Response(body, media_type="application/json", headers={"ETag": f'"{pack_id}"'})

    return router
