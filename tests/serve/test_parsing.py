"""Wrong bodies cost little and are told in one sentence, however large they are."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from pydantic import BaseModel

from serve.api.encoder_schema import ClassificationRequest, EmbeddingRequest
from serve.api.errors import APIError
from serve.api.parsing import validate
from serve.api.schema import ChatCompletionRequest, CompletionRequest, DetokenizeRequest

MANY = 20_000


def message(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts), **more}]}


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (CompletionRequest, {"prompt": []}, "prompt"),
        (CompletionRequest, {"prompt": [-1] * MANY}, "prompt.0"),
        (CompletionRequest, {"prompt": [[]] * MANY}, "prompt.0"),
        (CompletionRequest, {"prompt": ["a", *[""] * MANY]}, "prompt.1"),
        (CompletionRequest, {"prompt": "a", "stop": [5] * MANY}, "stop.0"),
        (CompletionRequest, {"prompt": "a", "stop": ["x" * 257]}, "stop.0"),
        (CompletionRequest, {"prompt": "a", "logit_bias": {"x" * 200_000: 1}}, "logit_bias"),
        (CompletionRequest, {"prompt": "a", "logit_bias": {f"x{i}": 1 for i in range(MANY)}}, "logit_bias"),
        (
            CompletionRequest,
            {"prompt": "a", "structured_outputs": {f"x{i}": 1 for i in range(MANY)}},
            "structured_outputs",
        ),
        (ChatCompletionRequest, message(*[{}] * MANY), "messages.0.content.0.type"),
        (ChatCompletionRequest, message(tool_calls=[{}] * MANY), "messages.0.tool_calls.0.function"),
        (ChatCompletionRequest, {"messages": [{}] * MANY}, "messages.0.role"),
        (DetokenizeRequest, {"tokens": [-1] * MANY}, "tokens.0"),
        (ClassificationRequest, {"input": [["a", 1]] * 2000}, "input.0.1"),
        (EmbeddingRequest, {"input": [["a", "b"]] * MANY}, "input"),
    ],
)
def test_the_first_error_is_enough(kind: type[BaseModel], body: dict[str, Any], param: str) -> None:
    validate({"prompt": "a", "messages": [{"role": "user"}], "tokens": [], "input": "a"}, kind)
    tracemalloc.start()
    try:
        with pytest.raises(APIError) as caught:
            validate(body, kind)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert caught.value.param == param
    assert len(caught.value.message) < 200 and "constrained" not in caught.value.message
