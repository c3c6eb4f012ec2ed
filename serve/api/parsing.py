"""A request body to a checked object: strict JSON, bounded depth, and one sentence about what is wrong.

Python's json accepts NaN, turns 1e400 into infinity, passes lone surrogates and recurses as deep as the text does;
none of that may reach the engine.
"""

from __future__ import annotations

import asyncio
import json
import math
from functools import cache
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from serve.api.errors import APIError, bad_request

SHORT_BODY = 64 * 1024  # longer ones are read in a worker thread, so that others are served meanwhile
MAX_DEPTH = 64
MAX_PLACE = 100
TOO_DEEP = f"the body is nested deeper than {MAX_DEPTH} levels"
Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: Request, kind: type[Model]) -> Model:
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media != "application/json":
        raise APIError(415, f"send application/json, not {media[:80]!r}", code="unsupported_media_type")
    body = await request.body()
    if len(body) <= SHORT_BODY:
        return validate(parse_json(body), kind)
    return await asyncio.to_thread(lambda: validate(parse_json(body), kind))


def parse_json(body: bytes) -> Any:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: {error}", code="invalid_json") from None
    try:
        return _checked(json.loads(text, parse_constant=_no_constant, parse_float=_finite))
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise bad_request(TOO_DEEP, code="invalid_json") from None
    except ValueError as error:
        raise bad_request(str(error), code="invalid_json") from None


def validate(value: Any, kind: type[Model]) -> Model:
    if not isinstance(value, dict):
        raise bad_request(f"the body must be a JSON object, not {_json_name(value)}", code="invalid_json")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        names = field_names(kind)  # neither keys that the client made up, nor how pydantic calls a union's members
        place = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in names)[:MAX_PLACE]
        message = first["msg"].removeprefix("Value error, ")
        raise bad_request(f"{place}: {message}" if place else message, param=place or None) from None


@cache
def field_names(kind: type[BaseModel]) -> frozenset[str]:
    """What `kind` and the models in it call their fields."""
    document = kind.model_json_schema()
    parts = (document, *document.get("$defs", {}).values())
    return frozenset(name for part in parts for name in part.get("properties", ()))


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"the body holds {name}, which JSON does not know")


def _finite(text: str) -> float | int:
    """A number with a point or an exponent; 3.0 is an integer, as in JSON Schema."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _checked(value: Any, depth: int = 0) -> Any:
    """`value` itself; ValueError for deep nesting, strings with lone surrogates and integers beyond 64 bits."""
    if depth > MAX_DEPTH:
        raise ValueError(TOO_DEEP)
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("the body holds a string with a lone surrogate, which is no Unicode text") from None
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("the body holds an integer beyond 64 bits")
    elif isinstance(value, list):
        for item in value:
            _checked(item, depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            _checked(key)
            _checked(item, depth + 1)
    return value


def _json_name(value: Any) -> str:
    if value is None:
        return "null"
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "another value")
