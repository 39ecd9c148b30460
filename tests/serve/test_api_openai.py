"""The official client of OpenAI: what it sends is understood, and what it gets it can read."""

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("openai")

import openai
import pydantic
from api_tools import GO, HERMES, TALK, FakeEngine, Running, called, chat_tokenizer, model

from llama_jax.data.chat_template import ChatTemplate
from llama_jax.serve.request import QueueFull


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    tokenizer = chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    models = [model(tokenizer), model(tokenizer, "caller", template=ChatTemplate(HERMES))]
    with Running(FakeEngine(tokenizer), models, keys=["secret"]) as running:
        yield running


@pytest.fixture
def client(server):
    server.engine.script, server.engine.error = server.engine.says("fine thanks"), None
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


class Go(pydantic.BaseModel):
    to: str


def strict(value):
    """The client builds its objects without checks; check them."""
    return type(value).model_validate(value.model_dump())


def test_chat(client):
    made = strict(client.chat.completions.create(model="tiny", messages=TALK, seed=3, top_p=0.5))
    assert made.choices[0].message.content == "fine thanks"
    assert made.choices[0].finish_reason == "stop"
    assert made.usage.prompt_tokens_details.cached_tokens == 3
    assert made.seed == 3
    assert made.system_fingerprint


def test_chat_stream(client):
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="tiny", messages=TALK, stream=True, stream_options=options
    )
    chunks = [strict(chunk) for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "fine thanks"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.total_tokens > 0
    with client.chat.completions.stream(model="tiny", messages=TALK) as events:
        assert events.get_final_completion().choices[0].message.content == "fine thanks"


def test_logprobs(client):
    made = client.chat.completions.create(
        model="tiny", messages=TALK, logprobs=True, top_logprobs=2
    )
    content = strict(made).choices[0].logprobs.content
    assert b"".join(bytes(t.bytes) for t in content) == b"fine thanks"
    assert content[0].top_logprobs[0].logprob == -0.25
    made = client.completions.create(model="tiny", prompt="the cat", logprobs=2, echo=True)
    assert made.choices[0].text == "the catfine thanks"
    assert made.choices[0].logprobs.top_logprobs[1]


def test_completions(client):
    made = strict(client.completions.create(model="tiny", prompt=["the", "cat"], n=2))
    assert [c.text for c in made.choices] == ["fine thanks"] * 4
    parts = list(client.completions.create(model="tiny", prompt="a", stream=True))
    assert "".join(c.choices[0].text for c in parts) == "fine thanks"


def test_responses(client):
    made = client.responses.create(model="tiny", input="the cat", instructions="be brief")
    assert strict(made).output_text == "fine thanks"
    assert made.usage.output_tokens > 0
    events = list(client.responses.create(model="tiny", input=TALK, stream=True))
    assert events[-1].type == "response.completed"
    assert strict(events[-1].response).output_text == "fine thanks"
    assert [strict(e).sequence_number for e in events] == list(range(len(events)))
    with client.responses.stream(model="tiny", input="the cat") as stream:
        assert stream.get_final_response().output_text == "fine thanks"


def test_calls_of_functions(client, server):
    create = client.chat.completions.create
    server.engine.script = server.engine.says(called("x"))
    made = strict(create(model="caller", messages=TALK, tools=[GO], tool_choice="required"))
    (choice,) = made.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("go", '{"to": "x"}')
    answer = [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "there"}]
    with client.chat.completions.stream(
        model="caller", messages=[*TALK, *answer], tools=[GO]
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls[0].function.arguments == '{"to": "x"}'
    tool = openai.pydantic_function_tool(Go, name="go")
    with_parsed = client.chat.completions.parse(model="caller", messages=TALK, tools=[tool])
    message = with_parsed.choices[0].message  # the client sends its parsed_arguments back
    assert message.tool_calls[0].function.parsed_arguments == Go(to="x")
    answer = [message, {"role": "tool", "tool_call_id": call.id, "content": "there"}]
    assert create(model="caller", messages=[*TALK, *answer], tools=[GO]).choices
    made = client.responses.create(
        model="caller", input="go", tools=[{"type": "function", "strict": None, **GO["function"]}]
    )
    assert strict(made).output[0].name == "go"


def test_json_schema(client, server):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    server.engine.script = server.engine.says('{"a": 3}')
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    made = client.chat.completions.create(model="tiny", messages=TALK, response_format=wanted)
    assert made.choices[0].message.content == '{"a": 3}'
    assert server.engine.requests[-1].grammar is not None
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    assert client.responses.create(model="tiny", input="a", text=text).output_text == '{"a": 3}'
    assert server.engine.requests[-1].grammar is not None


def test_models(client):
    assert [strict(m).id for m in client.models.list()] == ["tiny", "caller"]
    assert strict(client.models.retrieve("caller")).id == "caller"
    with pytest.raises(openai.NotFoundError, match="there is no model 'none'"):
        client.models.retrieve("none")


def test_errors(client, server):
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as e:
        create(model="other", messages=TALK)
    assert (e.value.code, e.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="temperature") as e:
        create(model="tiny", messages=TALK, temperature=-1)
    assert e.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    server.engine.error = QueueFull(1)
    with pytest.raises(openai.RateLimitError) as e:
        create(model="tiny", messages=TALK)
    assert e.value.response.headers["retry-after"] == "1"
