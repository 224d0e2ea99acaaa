"""The described interface (OpenAPI): bodies that routes read with bounds of their own, and errors, which all have one shape.

FastAPI describes a body only where it parses it itself. `takes` says for a route what it reads; `described` puts it into the document.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from joulemark.wire import Problem

Responses = dict[int | str, dict[str, Any]]
_REFERENCES = "#/components/schemas/{model}"


def errors(schema: dict[str, Any], *more_types: str) -> Responses:
    """For `responses=` of an application or a router: what every error is, in JSON, and in which other forms it may come."""
    content = {"application/json": {"schema": schema}} | {kind: {} for kind in more_types}
    return {
        "4XX": {"content": content, "description": "What was asked cannot be done: why, and the next step"},
        "5XX": {"content": content, "description": "It cannot be done now: why, and the next step"},
    }


PROBLEM = {"$ref": _REFERENCES.format(model="Problem")}


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """For `openapi_extra=` of a route whose body is `model` as JSON."""
    return _body("application/json", model.model_json_schema(ref_template=_REFERENCES))


def takes_bytes() -> dict[str, Any]:
    """For `openapi_extra=` of a route whose body is a file."""
    return _body("application/octet-stream", {"type": "string", "format": "binary"})


def takes_form(*fields: str) -> dict[str, Any]:
    """For `openapi_extra=` of a route whose body is a form with these text fields."""
    properties = {field: {"type": "string"} for field in fields}
    schema = {"type": "object", "properties": properties, "required": list(fields)}
    return _body("application/x-www-form-urlencoded", schema)


def described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of an application."""
    document = app.openapi()
    schemas: dict[str, Any] = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.setdefault("Problem", Problem.model_json_schema(ref_template=_REFERENCES))
    for path in document["paths"].values():
        for operation in path.values():
            # FastAPI says how it would answer a wrong parameter; ours is a Problem like every other error.
            operation["responses"].pop("422", None)
            for content in operation.get("requestBody", {}).get("content", {}).values():
                for name, schema in content["schema"].pop("$defs", {}).items():
                    schemas.setdefault(name, schema)
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    return document


def _body(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}
