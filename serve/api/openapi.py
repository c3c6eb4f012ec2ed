"""The served OpenAPI document: routes parse their bodies themselves, so their requests are described here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from serve.api import schema

EVERYWHERE = (400, 401, 408, 413, 415, 429, 500, 503, 504)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": schema.ErrorResponse} for status in statuses}


def takes(kind: type[BaseModel], streams: bool = False) -> dict[str, Any]:
    """How a route that parses its body itself describes it in the OpenAPI document."""
    name = kind.__name__
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}
    extra: dict[str, Any] = {"requestBody": body}
    if streams:
        # Without a schema: OpenAPI 3.1 has no words for what a stream's events are.
        extra["responses"] = {"200": {"content": {"text/event-stream": {}}}}
    return extra


def describe_requests(app: FastAPI, kinds: tuple[type[BaseModel], ...], vocab_size: int) -> None:
    """Add the requests that `takes` refers to to what `app` serves as its document."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        document = original()
        schemas = document["components"]["schemas"]
        for kind in kinds:
            definition = kind.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(definition.pop("$defs", {}))
            schemas[kind.__name__] = definition
        _bound_token_ids(schemas, vocab_size)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _bound_token_ids(part: Any, vocab_size: int) -> None:
    """Write the model's vocabulary into the served document."""
    if isinstance(part, dict) and part.get("format") == schema.TOKEN_ID:
        part["maximum"] = vocab_size - 1
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _bound_token_ids(inner, vocab_size)
