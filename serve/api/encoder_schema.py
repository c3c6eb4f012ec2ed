"""What clients of an encoder send and get: vLLM's words for `/classify`, OpenAI's for `/v1/embeddings`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, Tag

from serve.api.schema import Form, Many, Strict, Tokens, Usage

Pair = Annotated[list[str], Field(min_length=2, max_length=2, fail_fast=True)]
Input = (
    Annotated[str, Tag("text")]
    | Annotated[list[str], Many, Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[list[Tokens], Many, Tag("token lists")]
)


class EncoderRequest(Strict):
    """What both routes take beside their input.

    `truncate_prompt_tokens`: cut inputs to so many tokens, special ones included; -1: to what the model takes.
    `use_activation`: false gives what the model computes before probabilities, or before the length becomes 1.
    """

    model: str | None = None
    user: str | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    use_activation: bool | None = None


class ClassificationRequest(EncoderRequest):
    """`input`: a text, token ids, or a list of either; or a list of pairs of texts, for models that compare two."""

    input: Annotated[Input | Annotated[list[Pair], Many, Tag("pairs")], Form]


class EmbeddingRequest(EncoderRequest):
    """`dimensions` is there for clients that send it: the model's own is the only one."""

    input: Annotated[Input, Form]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None


# Answers; described for the served OpenAPI document.


class ClassificationData(BaseModel):
    """`probs`: of the classes in order; of a regression, the predicted number. `label`: of the largest."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassificationResponse(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassificationData]
    usage: Usage


class EmbeddingData(BaseModel):
    index: int
    object: Literal["embedding"]
    embedding: list[float] | str


class EmbeddingResponse(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[EmbeddingData]
    usage: Usage
