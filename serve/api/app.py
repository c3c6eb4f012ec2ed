"""The routes, and what answers when there is none."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request

from serve.api import schema
from serve.api.chat import ChatCompletion, render
from serve.api.completions import Answer, Completion, collect, size
from serve.api.encoder_schema import ClassificationRequest, EmbeddingRequest
from serve.api.encoders import add_classify_route, add_embeddings_route
from serve.api.errors import APIError, bad_request, error_body, unavailable
from serve.api.metrics import CONTENT_TYPE
from serve.api.openapi import EVERYWHERE, describe_requests, errors, takes
from serve.api.parsing import read_body
from serve.api.state import GRAMMAR, ClientGoneError, EncoderState, ServedModel, ServerState
from serve.api.streaming import EventStream
from serve.engine.async_engine import EngineDeadError
from serve.engine.async_engine import Request as EngineRequest
from serve.engine.constraints import GrammarError

logger = logging.getLogger(__name__)

CHAT_PAGE = Path(__file__).with_name("page.html")
ENCODER_PAGE = Path(__file__).with_name("encoder_page.html")


class Generation(Protocol):
    """A request that the engine answers: /v1/completions and /v1/chat/completions."""

    async def submit(self) -> EngineRequest: ...
    def whole(self, answers: list[Answer]) -> dict[str, Any]: ...
    def chunks(self, request: EngineRequest) -> AsyncGenerator[dict[str, Any]]: ...


def package_version() -> str:
    try:
        return version("halfweight")
    except PackageNotFoundError:
        return "0.0.0"


def build_app(state: ServedModel) -> FastAPI:
    app = FastAPI(title="halfweight", version=package_version(), docs_url=None, redoc_url=None)
    app.state.server = state
    _add_error_handlers(app)
    _add_status_routes(app, state)
    _add_model_routes(app, state)
    _add_token_routes(app, state)
    own = _add_task_routes(app, state)
    describe_requests(app, (schema.TokenizeRequest, schema.DetokenizeRequest, *own), state.vocab_size)
    return app


def _add_task_routes(app: FastAPI, state: ServedModel) -> tuple[type[BaseModel], ...]:
    """The routes of what the model does, and refusals of the others; returns the requests that they take."""
    if isinstance(state, ServerState):
        _add_generation_routes(app, state)
        _refuse(app, "this server has a generating model, which gives no embeddings", "/v1/embeddings")
        _refuse(app, "this server has a generating model, which has no classes", "/classify")
        return schema.CompletionRequest, schema.ChatCompletionRequest
    assert isinstance(state, EncoderState)
    generating = ("/v1/completions", "/v1/chat/completions")
    if state.engine.engine.classifies:
        add_classify_route(app, state)
        _refuse(app, "this server has a classifier, which writes no text; use /classify", *generating)
        _refuse(app, "this server has a classifier, which gives no embeddings; use /classify", "/v1/embeddings")
        return (ClassificationRequest,)
    add_embeddings_route(app, state)
    _refuse(app, "this server has an encoder, which writes no text; use /v1/embeddings", *generating)
    _refuse(app, "this server has an encoder without classes; use /v1/embeddings", "/classify")
    return (EmbeddingRequest,)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(APIError)
    async def api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, APIError)
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        messages = {404: "there is no such route", 405: f"{request.method} is not allowed here"}
        text = messages.get(error.status_code, str(error.detail))
        return JSONResponse(error_body(error.status_code, text), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: Exception) -> Response:
        return bad_request("the request's path or query is not valid").response()

    @app.exception_handler(ClientGoneError)
    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)

    @app.exception_handler(EngineDeadError)
    async def dead(_: Request, error: Exception) -> Response:
        return unavailable(str(error), "engine_dead").response()

    @app.exception_handler(GrammarError)
    async def lost(_: Request, error: Exception) -> Response:
        return bad_request(str(error), code=GRAMMAR).response()

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return JSONResponse(
            error_body(500, "the server failed to answer; its log says why", code="internal_error"), 500
        )


def _add_status_routes(app: FastAPI, state: ServedModel) -> None:
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse((ENCODER_PAGE if isinstance(state, EncoderState) else CHAT_PAGE).read_text("utf-8"))

    @app.get("/health", response_model=schema.StatusResponse, responses=errors(503))
    async def health() -> Response:
        """Whether the server is alive."""
        if not state.engine.alive:
            raise unavailable("the engine has failed; restart the server", "engine_dead")
        return JSONResponse({"status": "ok"})

    @app.get("/ready", response_model=schema.StatusResponse, responses=errors(401, 503))
    async def ready() -> Response:
        """Whether the server takes new work."""
        if not (state.ready and state.engine.alive):
            raise unavailable("the server takes no new work", "not_ready")
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", response_class=PlainTextResponse, responses=errors(401))
    async def metrics() -> Response:
        return Response(state.metrics.render(), media_type=CONTENT_TYPE)

    @app.get("/version", response_model=schema.VersionResponse, responses=errors(401))
    async def version_() -> Response:
        return JSONResponse({"version": package_version()})


def _add_model_routes(app: FastAPI, state: ServedModel) -> None:
    def card() -> dict[str, Any]:
        labels = state.engine.engine.labels if isinstance(state, EncoderState) else None
        return ({} if labels is None else {"labels": list(labels)}) | {
            "id": state.model_name,
            "object": "model",
            "created": state.created,
            "owned_by": "halfweight",
            "root": state.folder_name,
            "max_model_len": state.max_model_len,
        }

    @app.get("/v1/models", response_model=schema.ModelList, responses=errors(401, 503))
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card()]})

    @app.get("/v1/models/{model_id:path}", response_model=schema.ModelCard, responses=errors(401, 404, 503))
    async def model(model_id: str) -> Response:
        state.check_model(model_id)
        return JSONResponse(card())


def _add_generation_routes(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/v1/completions",
        response_model=schema.CompletionResponse,
        responses=errors(*EVERYWHERE, 404),
        openapi_extra=takes(schema.CompletionRequest, streams=True),
    )
    async def completions(request: Request) -> Response:
        body = await read_body(request, schema.CompletionRequest)
        return await _generate(state, request, Completion(state, body), bool(body.stream))

    @app.post(
        "/v1/chat/completions",
        response_model=schema.ChatCompletionResponse,
        responses=errors(*EVERYWHERE, 404),
        openapi_extra=takes(schema.ChatCompletionRequest, streams=True),
    )
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, schema.ChatCompletionRequest)
        return await _generate(state, request, ChatCompletion(state, body), bool(body.stream))


def _refuse(app: FastAPI, message: str, *paths: str) -> None:
    """Answer routes of another kind of model by saying so; they are not in the OpenAPI document."""

    async def refused() -> Response:
        raise APIError(404, message, code="not_supported")

    for path in paths:
        app.add_api_route(path, refused, methods=["POST"], include_in_schema=False)


async def _generate(state: ServerState, http: Request, generation: Generation, stream: bool) -> Response:
    request = await generation.submit()
    if stream:
        return EventStream(state, generation.chunks(request), lambda: state.forget(request))
    try:
        answers = await state.while_connected(http, collect(state, request))
    finally:
        state.forget(request)
    content = await state.aside(size(answers), lambda: to_json(generation.whole(answers)))
    return Response(content, media_type="application/json")


def _add_token_routes(app: FastAPI, state: ServedModel) -> None:
    @app.post(
        "/tokenize",
        response_model=schema.TokenizeResponse,
        responses=errors(*EVERYWHERE, 404),
        openapi_extra=takes(schema.TokenizeRequest),
    )
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, schema.TokenizeRequest)
        state.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("give either prompt or messages")
        text, special = body.prompt, body.add_special_tokens is not False
        if body.messages is not None:
            prompted = body.add_generation_prompt is not False
            text = await render(state, body.messages, prompted, variables=body.chat_template_kwargs)
            special = bool(body.add_special_tokens)
        [tokens] = await state.encode([text or ""], special)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": state.max_model_len})

    @app.post(
        "/detokenize",
        response_model=schema.DetokenizeResponse,
        responses=errors(*EVERYWHERE, 404),
        openapi_extra=takes(schema.DetokenizeRequest),
    )
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, schema.DetokenizeRequest)
        state.check_model(body.model)
        vocab = state.vocab_size
        if max(body.tokens, default=0) >= vocab:
            raise bad_request(f"token ids must be below {vocab}, the size of the vocabulary", param="tokens")
        return JSONResponse({"prompt": await state.decode(body.tokens)})
