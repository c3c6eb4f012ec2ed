"""/classify under vLLM's name and schema, and /v1/embeddings: texts or tokens in, one result for each.

Texts are tokenized, and large answers written, in worker threads, so that others are served meanwhile.
"""

from __future__ import annotations

import asyncio
import base64
import struct
import time
from typing import Any

from fastapi import FastAPI
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from serve.api.encoder_schema import (
    ClassificationRequest,
    ClassificationResponse,
    EmbeddingRequest,
    EmbeddingResponse,
    EncoderRequest,
)
from serve.api.errors import bad_request
from serve.api.openapi import EVERYWHERE, errors, takes
from serve.api.parsing import read_body
from serve.api.state import EncoderState, new_id
from serve.engine.encoder_models import EncoderInput

Json = dict[str, Any]


def add_classify_route(app: FastAPI, state: EncoderState) -> None:
    @app.post(
        "/classify",
        response_model=ClassificationResponse,
        responses=errors(*EVERYWHERE, 404),
        openapi_extra=takes(ClassificationRequest),
    )
    async def classify(request: Request) -> Response:
        """The class of each input, and how likely each class is."""
        body = await read_body(request, ClassificationRequest)
        state.check_model(body.model)
        return await state.while_connected(request, _classify(state, body))


def add_embeddings_route(app: FastAPI, state: EncoderState) -> None:
    @app.post(
        "/v1/embeddings",
        response_model=EmbeddingResponse,
        responses=errors(*EVERYWHERE, 404),
        openapi_extra=takes(EmbeddingRequest),
    )
    async def embeddings(request: Request) -> Response:
        """A vector for each input."""
        body = await read_body(request, EmbeddingRequest)
        state.check_model(body.model)
        return await state.while_connected(request, _embed(state, body))


async def _classify(state: EncoderState, body: ClassificationRequest) -> Response:
    inputs = await _inputs(state, body, body.input)
    rows = await state.compute(inputs, body.use_activation is not False)
    labels = state.engine.engine.labels or ()
    data = [
        {"index": i, "label": labels[row.index(max(row))], "probs": row, "num_classes": len(row)}
        for i, row in enumerate(rows)
    ]
    return Response(to_json(_answer(state, "classify", data, inputs)), media_type="application/json")


async def _embed(state: EncoderState, body: EmbeddingRequest) -> Response:
    width = state.engine.engine.width
    if body.dimensions not in (None, width):
        raise bad_request(f"this model's embeddings have {width} numbers, no other dimensions", "dimensions")
    inputs = await _inputs(state, body, body.input)
    rows = await state.compute(inputs, body.use_activation is not False)
    return await asyncio.to_thread(_embedded, state, rows, inputs, body.encoding_format == "base64")


def _embedded(state: EncoderState, rows: list[list[float]], inputs: list[EncoderInput], packed: bool) -> Response:
    data = [
        {"index": i, "object": "embedding", "embedding": _base64(row) if packed else row} for i, row in enumerate(rows)
    ]
    return Response(to_json(_answer(state, "embd", data, inputs)), media_type="application/json")


def _base64(row: list[float]) -> str:
    """float32, little-endian, as OpenAI's client unpacks it."""
    return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode()


def _answer(state: EncoderState, prefix: str, data: list[Json], inputs: list[EncoderInput]) -> Json:
    tokens = sum(map(len, inputs))
    return {
        "id": new_id(prefix),
        "object": "list",
        "created": int(time.time()),
        "model": state.model_name,
        "data": data,
        "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
    }


Given = str | list[str] | list[list[str]] | list[int] | list[list[int]]


async def _inputs(state: EncoderState, body: EncoderRequest, given: Given) -> list[EncoderInput]:
    """What the encoder reads, one for each text, pair, or list of tokens."""
    items: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
    limit = _limit(state, body)
    texts = [text for item in items for text in ([item] if isinstance(item, str) else item) if isinstance(text, str)]
    if texts and limit is None:
        state.check_length(texts)
    try:
        return await state.aside(sum(map(len, texts)), lambda: [_input(state, body, item, limit) for item in items])
    except ValueError as error:
        raise bad_request(str(error), "truncate_prompt_tokens") from None


def _limit(state: EncoderState, body: EncoderRequest) -> int | None:
    """The length to which inputs are cut, None where they are not."""
    wanted, most = body.truncate_prompt_tokens, state.max_model_len
    if wanted == 0 or (wanted or 0) > most:
        raise bad_request(
            f"truncate_prompt_tokens is {wanted}, but may be 1 to {most}, or -1 for {most}", "truncate_prompt_tokens"
        )
    return most if wanted == -1 else wanted


def _input(
    state: EncoderState, body: EncoderRequest, item: str | list[str] | list[int], limit: int | None
) -> EncoderInput:
    side = body.truncation_side or "right"
    if isinstance(item, list) and isinstance(item[0], int):
        tokens: list[Any] = item if limit is None else item[:limit] if side == "right" else item[-limit:]
        return EncoderInput(tokens, [0] * len(tokens))
    texts: list[Any] = [item] if isinstance(item, str) else item
    if limit is not None:  # what is far behind the cut need not be read
        most = state.max_characters
        texts = [text[:most] if side == "right" else text[-most:] for text in texts]
    special = body.add_special_tokens is not False
    ids, types = state.tokenizer.encode_typed(*texts, add_special_tokens=special, max_length=limit, side=side)
    return EncoderInput(ids, types)
