"""What clients send and get, in OpenAI's words; checked strictly, unknown fields are ignored as OpenAI's clients send
many.

A field that would change the answer and is not served is refused by name rather than ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from serve.engine.constraints import ANY_OBJECT, Constraint
from serve.engine.sampling_params import MAX_LOGPROBS, MAX_N, MAX_STOP_LENGTH, MAX_STOP_STRINGS, SamplingParams

# The served document replaces the bound of such integers by the model's vocabulary.
TOKEN_ID = "token-id"
MAX_PROMPTS = 2048
MAX_TOKENS = 2**20
MAX_MESSAGES = 4096
MAX_BIASES = 1024
TEMPLATE_FIELDS = frozenset({"messages", "tools", "add_generation_prompt", "chat_template"})
INSTEAD = {
    "guided_regex": 'send structured_outputs: {"regex": ...}',
    "guided_choice": 'send structured_outputs: {"choice": [...]}',
    "guided_grammar": 'send structured_outputs: {"grammar": ...}',
    "bad_words": "send logit_bias with the ids of their tokens",
    "allowed_token_ids": "send structured_outputs with what may be written",
    "logits_processors": "send logit_bias, or structured_outputs with what may be written",
    "truncate_prompt_tokens": "send a prompt that fits",
    "use_beam_search": "send n, and choose among the answers",
    "prompt_logprobs": "send echo: true and logprobs to /v1/completions",
    "prompt_embeds": "send the prompt as text or token ids",
}
"""Fields that are refused, and what to send instead."""
INSTEAD_IN_CHAT = {
    "functions": "send tools",
    "function_call": "send tool_choice",
    "chat_template": "send a prompt that you have rendered to /v1/completions",
    "add_special_tokens": "the chat template writes them; send a prompt of your own to /v1/completions",
    "echo": "put the last message before the answer yourself",
}
"""The same of /v1/chat/completions alone."""


def form(value: Any) -> str:
    """Which member of a union a value can only be, as its first item tells: one error, not one for each member."""
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else None
    if isinstance(first, list):
        return "pairs" if first and isinstance(first[0], str) else "token lists"
    return "texts" if isinstance(first, str) else "tokens"


def count(value: Any) -> str:
    """The same for a value or a list of such values."""
    return "many" if isinstance(value, list) else "one"


def _few(value: Any) -> Any:
    """Before each key is checked, which would give an error for each."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"it has {len(value)} entries; up to {MAX_BIASES} are accepted")
    return value


def _refused(value: Any, name: str | None, instead: Mapping[str, str]) -> None:
    """Before the type is checked; what asks for nothing is accepted, as clients send their defaults."""
    if value or type(value) in (int, float):
        raise PydanticCustomError("not_served", "this is not served; {instead}", {"instead": instead[str(name)]})


Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1, json_schema_extra={"format": TOKEN_ID})]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]
Tokens = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True)]
Many = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
Form = Discriminator(
    form, custom_error_type="form", custom_error_message="Input should be a text, token ids, or a list of either"
)
Prompt = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[list[Text], Many, Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[list[Tokens], Many, Tag("token lists")],
    Form,
]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Strict):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


OUTPUTS: dict[str, JsonDict] = {name: {"not": {"type": "null"}} for name in ("json", "regex", "choice", "grammar")}
OUTPUTS |= {"json_object": {"const": True}}
"""The ways to say what an answer must keep to, and which values say it."""


class StructuredOutputs(Strict):
    """vLLM's name for what an answer must keep to: one of these; `grammar` is in Lark's notation."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[Text], Many] | None = None
    grammar: Text | None = None
    json_object: bool | None = None

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        json_schema_extra={
            "oneOf": [{"required": [name], "properties": {name: value}} for name, value in OUTPUTS.items()],
            "additionalProperties": False,
        },
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        unknown = next((name for name in value if name not in OUTPUTS), None) if isinstance(value, dict) else None
        if unknown is not None:
            raise ValueError(f"{unknown[:80]!r} is not served; accepted: {', '.join(OUTPUTS)}")
        return value

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if sum(bool(value) or value == {} for _, value in self) != 1:
            raise ValueError("give one of json, regex, choice, grammar, and json_object: true")
        return self

    def constraint(self) -> Constraint:
        if self.regex is not None:
            return Constraint("regex", self.regex)
        if self.grammar is not None:
            return Constraint("grammar", self.grammar)
        if self.choice is not None:
            return Constraint.choice(self.choice)
        return ANY_OBJECT if self.json_ is None else Constraint.schema(self.json_)


class ResponseFormat(Strict):
    """Free text; any JSON object; or JSON that a schema accepts."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        json_schema_extra={
            "if": {"properties": {"type": {"const": "json_schema"}}},
            "then": {"required": ["json_schema"], "properties": {"json_schema": {"type": "object"}}},
        },
    )

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs json_schema")
        return self


class SamplingFields(Strict):
    """What /v1/completions and /v1/chat/completions have in common."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Int64 | None = None
    stop: Annotated[Annotated[Stop, Tag("one")] | Annotated[Stops, Tag("many")], Discriminator(count)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128, fail_fast=True)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=MAX_BIASES), BeforeValidator(_few)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: Text | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | None = None
    guided_regex: None = None
    guided_choice: None = None
    guided_grammar: None = None
    bad_words: None = None
    allowed_token_ids: None = None
    logits_processors: None = None
    truncate_prompt_tokens: None = None
    use_beam_search: None = None
    prompt_logprobs: None = None
    prompt_embeds: None = None

    @field_validator(*INSTEAD, mode="before")
    @classmethod
    def _not_served(cls, value: Any, info: ValidationInfo) -> None:
        _refused(value, info.field_name, INSTEAD)

    @model_validator(mode="after")
    def _one_constraint(self) -> SamplingFields:
        wanted = self.response_format if self.response_format and self.response_format.type != "text" else None
        if sum(one is not None for one in (wanted, self.structured_outputs, self.guided_json)) > 1:
            raise ValueError("give one of response_format, structured_outputs and guided_json")
        return self

    def constraint(self) -> Constraint | None:
        """What the answer must keep to; `guided_json` is vLLM's older name for a schema."""
        if self.structured_outputs is not None:
            return self.structured_outputs.constraint()
        if self.guided_json is not None:
            return Constraint.schema(self.guided_json)
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        asked = wanted.json_schema if wanted.type == "json_schema" else None
        return ANY_OBJECT if asked is None else Constraint.schema(asked.schema_)

    def sampling(
        self,
        defaults: dict[str, Any],
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """The engine's parameters; what the client leaves out comes from the model's generation config."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        chosen = {
            name: value
            for name in SAMPLING_NAMES
            if (value := getattr(self, name) if getattr(self, name) is not None else defaults.get(name)) is not None
        }
        return SamplingParams(
            max_tokens=max_tokens,
            stop=stop,
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            logit_bias={int(key): bias for key, bias in (self.logit_bias or {}).items()},
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **chosen,
        )


SAMPLING_NAMES = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
    "ignore_eos",
    "min_tokens",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "cache_salt",
)


class CompletionRequest(SamplingFields):
    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: Literal[""] | None = None
    add_special_tokens: bool | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


Parts = Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)]
Content = Annotated[Annotated[str, Tag("one")] | Annotated[Parts, Tag("many")], Discriminator(count)]


class FunctionCall(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: arguments are an object, which they write as JSON."""
        call = self.model_dump()
        try:
            arguments = json.loads(self.function.arguments)
            json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError):  # no JSON, or numbers or characters that are none
            return call
        if isinstance(arguments, dict):
            call["function"]["arguments"] = arguments
        return call


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: `content` is text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        message: dict[str, Any] = {"role": self.role, "content": text}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls is not None:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class FunctionTool(Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionTool


def _variables(value: dict[str, Any]) -> dict[str, Any]:
    """What a chat template is given besides its messages, tools and so on."""
    if taken := sorted(TEMPLATE_FIELDS & value.keys()):
        raise ValueError(f"{taken[0]} is given to the template by the server itself; leave it out here")
    return value


TemplateVariables = Annotated[dict[str, Any], AfterValidator(_variables)]
Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatCompletionRequest(SamplingFields):
    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    chat_template_kwargs: TemplateVariables | None = None
    documents: Annotated[list[dict[str, Any]], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    reasoning_effort: Text | None = None
    functions: None = None
    function_call: None = None
    chat_template: None = None
    add_special_tokens: None = None
    echo: None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(None, json_schema_extra={"enum": [False, None]})

    @field_validator(*INSTEAD_IN_CHAT, mode="before")
    @classmethod
    def _not_served_in_chat(cls, value: Any, info: ValidationInfo) -> None:
        _refused(value, info.field_name, INSTEAD_IN_CHAT)

    @model_validator(mode="after")
    def _more_variables(self) -> ChatCompletionRequest:
        """Templates that know documents or an effort find them among their variables."""
        given = {"documents": self.documents, "reasoning_effort": self.reasoning_effort}
        named = {name: value for name, value in given.items() if value is not None}
        self.chat_template_kwargs = named | (self.chat_template_kwargs or {})
        return self

    @field_validator("continue_final_message")
    @classmethod
    def _not_continued(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("this server does not continue the last message")
        return value


class TokenizeRequest(Strict):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    chat_template_kwargs: TemplateVariables | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        json_schema_extra={
            "oneOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, "messages": {"type": "null"}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": {"type": "null"}}},
            ]
        },
    )


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)]


# Answers. The routes write plain dictionaries, which is faster; these describe them in the served OpenAPI document.


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: str | None
    stop_reason: str | int | None = None


class ChatCompletionResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """`labels`: a classifier's classes, in the order of its probabilities."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int
    labels: list[str] | None = None


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeResponse(BaseModel):
    prompt: str


class VersionResponse(BaseModel):
    version: str


class StatusResponse(BaseModel):
    status: str
