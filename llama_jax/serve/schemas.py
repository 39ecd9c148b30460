"""The bodies of requests: their fields, types and limits."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from llama_jax.generate.sampler import MAX_TOP_LOGPROBS
from llama_jax.serve.errors import APIError, of_validation
from llama_jax.serve.sampling import MAX_BIAS

MAX_CHOICES = 128
"""Most answers to one request: prompts times ``n``."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of the parts of a message's content; the last two are those of ``/v1/responses``."""
IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "prompt_cache_options", "include_obfuscation",
})  # fmt: skip
"""Fields of OpenAI's API that do not change the text."""
MAX_FIELDS = 100
"""Most fields of an object whose fields this server knows. An error per field of a large body takes
seconds in which nothing else runs; for the same reason, checks of lists end at the first error."""
MAX_ITEMS = 1 << 14
"""Most messages, tools or choices."""
MAX_DETOKENIZE = 1 << 18


class Body(BaseModel):
    """Exact types, no unknown fields; a field that is null has its default."""

    model_config = ConfigDict(extra="forbid", strict=True)
    ignored: ClassVar[frozenset[str]] = IGNORED
    _size: int = PrivateAttr(0)

    @property
    def size(self) -> int:
        """Bytes of the request."""
        return self._size

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:
            raise ValueError(f"{len(data)} fields are too many; at most {MAX_FIELDS} are allowed")
        ignored = cls.ignored - cls.model_fields.keys()
        return {k: v for k, v in data.items() if v is not None and k not in ignored}


def _list_of_stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _not_too_many(bias: Any) -> Any:
    if isinstance(bias, dict) and len(bias) > MAX_BIAS:
        raise ValueError(f"it has {len(bias)} tokens; at most {MAX_BIAS} are allowed")
    return bias


Item = TypeVar("Item")
ListOf = Annotated[list[Item], Field(fail_fast=True, max_length=MAX_ITEMS)]
Bias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_not_too_many)
]
Text = Annotated[str, Field(min_length=1)]
Stops = Annotated[list[Text], BeforeValidator(_list_of_stops), Field(max_length=16)]


class StreamOptions(Body):
    """``stream_options``."""

    include_usage: bool = False


class JsonSchema(Body):
    """``response_format.json_schema``."""

    name: str = ""
    description: str = ""
    schema_: dict[str, Any] | bool = Field(default_factory=dict, alias="schema")
    strict: bool = True


class ResponseFormat(Body):
    """``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type 'json_schema', which needs it")
        return self


class StructuredOutputs(Body):
    """``structured_outputs`` of vLLM."""

    json_: dict[str, Any] | str | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[ListOf[str], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class SamplingBody(Body):
    """Fields of all requests that generate text."""

    model: str = ""
    stream: bool = False
    stop: Stops = Field(default_factory=list)
    seed: int | None = Field(None, ge=0, lt=2**32)
    logit_bias: Bias = Field(default_factory=dict)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    ignore_eos: bool = False


class GenerationBody(SamplingBody):
    """Fields of both chats and completions."""

    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[ListOf[str], Field(min_length=1)] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None


class Function(Body):
    """``tools[].function``."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False


class Tool(Body):
    """One of ``tools``."""

    type: Literal["function"]
    function: Function


class CalledFunction(Body):
    """``messages[].tool_calls[].function``."""

    ignored = IGNORED | {"parsed_arguments"}
    """OpenAI's client adds it to answers, and clients send answers back."""
    name: str
    arguments: str


class ToolCall(Body):
    """One of ``messages[].tool_calls``."""

    ignored = IGNORED | {"index"}
    """part of a call in a stream"""
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


def _joined(content: Any) -> Any:
    """The text of a message whose content is a list of parts."""
    if not isinstance(content, list):
        return content
    for number, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str) or part.get("type") not in TEXT_PARTS:
            raise ValueError(f"part {number} is not text: {part!r:.60}; this server reads text")
    return "\n".join(part["text"] for part in content)


class Message(Body):
    """One of ``messages``. A developer's message is a system message."""

    ignored = IGNORED | {"refusal", "annotations", "parsed", "type"}
    """OpenAI's answers, its client and lm-evaluation-harness add them."""
    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        AfterValidator(lambda role: "system" if role == "developer" else role),
    ]
    content: Annotated[str, BeforeValidator(_joined)] | None = None
    name: str | None = None
    tool_calls: ListOf[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only role 'assistant' has tool_calls")
        return self


def _tool_choice(value: Any) -> Any:
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if value not in ("none", "auto", "required") and not isinstance(name, str):
        raise ValueError(
            "it must be 'none', 'auto', 'required' or "
            "{'type': 'function', 'function': {'name': ...}}"
        )
    return value if name is None else {"type": "function", "function": {"name": name}}


class ChatBody(GenerationBody):
    """``/v1/chat/completions``."""

    messages: Annotated[ListOf[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)
    tools: ListOf[Tool] = Field(default_factory=list)
    tool_choice: Annotated[Any, AfterValidator(_tool_choice)] = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _check(self) -> "ChatBody":
        if not self.tools and self.tool_choice not in ("none", "auto"):
            raise ValueError("tool_choice needs tools")
        if len({t.function.name for t in self.tools}) < len(self.tools):
            raise ValueError("tools: two functions have the same name")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self


class CompletionBody(GenerationBody):
    """``/v1/completions``."""

    prompt: Any
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool = False
    best_of: int | None = None
    suffix: Literal[""] = ""

    @model_validator(mode="after")
    def _check(self) -> "CompletionBody":
        if self.best_of not in (None, self.n):
            raise ValueError("best_of must be equal to n, or left out")
        if not self.max_tokens and not self.echo:
            raise ValueError("max_tokens=0 needs echo=true")
        return self


class TokenizeBody(Body):
    """``/tokenize``: a prompt or messages, with vLLM's names."""

    model: str = ""
    prompt: str | None = None
    messages: ListOf[Message] | None = None
    tools: ListOf[Tool] = Field(default_factory=list)
    add_special_tokens: bool = True
    add_generation_prompt: Literal[True] = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages")
        return self


Id = Annotated[int, Field(ge=0, lt=2**31)]


class DetokenizeBody(Body):
    """``/detokenize``."""

    model: str = ""
    tokens: Annotated[list[Id], Field(fail_fast=True, max_length=MAX_DETOKENIZE)]


AnyBody = TypeVar("AnyBody", bound=Body)


def validate(schema: type[AnyBody], data: Any, size: int) -> AnyBody:
    """The checked body of a request.

    Args:
      schema: its fields.
      data: JSON value.
      size: bytes of the request.

    Raises:
      APIError: it is not valid; names the field.
    """
    if not isinstance(data, dict):
        raise APIError(f"the body must be a JSON object, not {type(data).__name__}")
    try:
        body = schema.model_validate(data)
    except ValidationError as e:
        raise of_validation(e, schema.model_fields) from None
    body._size = size
    return body


def field(name: str, function: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """The result of a function whose ValueErrors are about a field."""
    try:
        return function(*args, **more)
    except ValueError as e:
        raise APIError(f"{name}: {e}", param=name, code="invalid_value") from None
