"""HTTP with the real engine and a tiny model: answers depend on the request alone, bit for bit; and
nothing is held or compiled whatever clients do."""

import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra serve")

from api_tools import GO, Running, wait_until
from engine_tools import prompt as numpy_prompt
from engine_tools import start_engine, submit, tiny_llm
from schema_tools import random_schema, satisfies

from llama_jax.serve.models import served_model
from llama_jax.serve.request import Sampling

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    llm = tiny_llm(tmp_path_factory.mktemp("tokenizer"))
    llm.chat_template = (
        "{% if tools %}<tool_call>\n{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    return llm


@pytest.fixture(scope="module")
def server(llm):
    with pytest.MonkeyPatch.context() as monkeypatch:
        engine = start_engine(llm, monkeypatch)
    with Running(engine, [served_model(llm, "tiny")]) as running:
        yield running


def prompt(length, seed):
    return list(map(int, numpy_prompt(length, seed)))


def talk(text):
    return [{"role": "user", "content": text}]


REQUESTS = {
    "greedy": (COMPLETE, dict(prompt="the cat", temperature=0, max_tokens=30, logprobs=3)),
    "seeded": (COMPLETE, dict(prompt=prompt(40, 1), seed=5, max_tokens=25, logprobs=0)),
    "top_p": (COMPLETE, dict(prompt=prompt(70, 2), seed=6, top_p=0.8, max_tokens=30, logprobs=5)),
    "samples": (COMPLETE, dict(prompt=prompt(33, 3), seed=7, n=3, max_tokens=12, logprobs=1)),
    "echo": (COMPLETE, dict(prompt=prompt(100, 4), echo=True, logprobs=2, max_tokens=1, seed=1)),
    "penalties": (COMPLETE, dict(prompt=prompt(5, 5), seed=8, presence_penalty=1, min_p=0.01,
                                 frequency_penalty=0.5, repetition_penalty=1.2, max_tokens=30)),
    "stop": (COMPLETE, dict(prompt=prompt(64, 6), seed=9, stop=["a", "e"], max_tokens=40)),
    "chat": (CHAT, dict(messages=talk("the cat sat"), seed=1, logprobs=True, top_logprobs=4,
                        max_tokens=20, logit_bias={"7": 3})),
    "stream": (CHAT, dict(messages=talk("12 cats"), seed=2, stream=True, max_tokens=25)),
    "regex": (COMPLETE, dict(prompt="the", seed=3, guided_regex="[a-d]{5,9}", max_tokens=20)),
    "json": (CHAT, dict(messages=talk("a mat"), seed=4, max_tokens=30, logprobs=True,
                        response_format={"type": "json_object"})),
}  # fmt: skip


def content(server, name):
    """All of an answer that must not depend on others."""
    path, body = REQUESTS[name]
    if body.get("stream"):
        chunks = [e["choices"][0] for e in server.events(path, body) if e]
        assert chunks[-1]["finish_reason"]
        return "".join(c["delta"].get("content") or "" for c in chunks)
    status, made, _ = server.request(path, body)
    assert status == 200, made
    return made["choices"]


@pytest.fixture(scope="module")
def alone(server):
    return {name: content(server, name) for name in REQUESTS}


def test_grammars_are_obeyed(alone):
    text = alone["regex"][0]["text"]
    assert 5 <= len(text) <= 9
    assert set(text) <= set("abcd")
    assert alone["json"][0]["message"]["content"].lstrip().startswith("{")


@pytest.mark.parametrize("order", [1, 2])
def test_answers_do_not_depend_on_others(server, alone, order):
    """Together, in other orders and slots, prefixes cached, beside others that are cancelled."""
    rng = random.Random(order)
    names = [name for name in REQUESTS for _ in range(2)]
    rng.shuffle(names)
    stop = threading.Event()

    def disturb(seed):
        """Requests whose clients leave after a while."""
        rng = random.Random(seed)
        while not stop.is_set():
            body = dict(prompt=prompt(rng.randrange(1, 200), seed), max_tokens=99, stream=True)
            send_and_leave(server, COMPLETE, json.dumps(body).encode(), rng.random() * 0.05)

    with ThreadPoolExecutor(16) as pool:
        others = [pool.submit(disturb, 50 + i) for i in range(4)]
        made = list(pool.map(lambda name: content(server, name), names))
        stop.set()
        for other in others:
            other.result()
    for name, found in zip(names, made, strict=True):
        assert found == alone[name], name
    wait_until(lambda: server.engine.status().running == 0)


def send_and_leave(server, path, body, seconds):
    with socket.create_connection(("127.0.0.1", server.port), 20) as s:
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        s.sendall(head.encode() + body)
        time.sleep(seconds)


def test_a_cached_prefix_is_reported(server):
    body = dict(prompt=prompt(100, 77), max_tokens=2)
    counts = [
        server.request(COMPLETE, body)[1]["usage"]["prompt_tokens_details"]["cached_tokens"]
        for _ in range(2)
    ]
    assert counts == [0, 96]


def one_of_a_thousand(server, number):
    """A random request; returns the status, None if its client left."""
    rng = random.Random(number)
    path = rng.choice([CHAT, COMPLETE])
    ids = prompt(rng.randrange(1, 90), number)
    body = {
        "max_tokens": rng.randrange(1, 9),
        "stream": rng.random() < 0.5,
        "n": rng.choice([1, 2]),
    }
    body |= {"messages": talk("cat " * rng.randrange(9))} if path == CHAT else {"prompt": ids}
    for field, value in (("temperature", rng.choice([0, 0.7])), ("top_p", 0.9), ("top_k", 5),
                         ("guided_regex", "[ab]+"), ("stop", ["a"]), ("logit_bias", {"5": 2}),
                         ("presence_penalty", 1)):  # fmt: skip
        if rng.random() < 0.2:
            body[field] = value
    raw = json.dumps(body).encode()
    kind = rng.randrange(6)
    if kind == 0:  # a bad body
        raw = rng.choice([
            raw[: len(raw) // 2], raw.replace(b"max_tokens", b"most_tokens"), b"\xff" + raw,
            raw.replace(b"{", b'{"temperature": "x", ', 1), raw.replace(b"}", b', "seed": -1}', 1),
        ])  # fmt: skip
    if kind == 1:
        send_and_leave(server, path, raw, rng.choice([0, 0.002, 0.01]))
        return None
    return server.request(path, raw)[0]


def test_a_thousand_random_requests(server, alone):
    """With bad bodies and clients that leave: no compilation, no slot or page held, and then the
    same answers as before."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *args, **kwargs: compiled.append(event) if "/compile/" in event else None
    )
    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda i: one_of_a_thousand(server, i), range(1000)))
    assert not compiled
    assert set(found) == {200, 400, None}
    assert found.count(200) > 500
    assert found.count(400) > 100
    wait_until(lambda: server.engine.status().running == server.engine.status().waiting == 0)
    status = server.engine.status()
    assert (status.alive, status.pages_used) == (True, 0)
    assert server.request("/health")[0] == 200
    for name in ("greedy", "chat", "stream"):
        assert content(server, name) == alone[name]
    # A slot is free a moment after the last answer.
    idle = 'vllm:num_requests_running{model_name="tiny"} 0.0'
    wait_until(lambda: idle in server.request("/metrics")[1])


def test_a_disconnect_frees_queued_and_running_requests(server):
    """Streaming, not streaming, and queued behind 16 others."""
    body = lambda stream: json.dumps(
        dict(prompt="the cat", max_tokens=500, n=18, stream=stream, temperature=0)
    ).encode()
    for stream in (True, False):
        connection = server.connect()
        connection.request("POST", COMPLETE, body(stream))
        wait_until(lambda: server.engine.status().waiting == 2)
        connection.close()
        wait_until(lambda: server.engine.status().waiting == 0, 1)
        wait_until(lambda: server.engine.status().running == 0, 1)
        assert server.engine.status().pages_used == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_thread_ends(llm):
    """Health says so, and requests are refused."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        engine = start_engine(llm, monkeypatch)
        with Running(engine, [served_model(llm, "tiny")]) as server:
            monkeypatch.setattr(engine, "_tick", lambda: 1 / 0)
            status, made = server.request(COMPLETE, {"prompt": "a"})[:2]
            assert status in (500, 503), made
            wait_until(lambda: not engine.status().alive)
            status, made, _ = server.request("/health")
            assert (status, made) == (503, {"status": "the engine's thread has ended"})
            assert server.request(COMPLETE, {"prompt": "a"})[0] == 503


STAY = {"type": "function", "function": {"name": "stay", "parameters": {
    "type": "object", "properties": {"for": {"enum": [1, 2]}}, "required": ["for"],
    "additionalProperties": False}}}  # fmt: skip


@pytest.fixture(scope="module")
def bias(llm):
    """Makes the ends of JSON values likelier."""
    ends = [i for i, b in enumerate(llm.tokenizer.token_bytes) if any(c in b'"}]' for c in b)]
    return {str(i): 8 for i in ends}


def test_answers_of_a_random_model_satisfy_random_schemas(server, bias):
    """60 schemas, of which up to eight are answered at a time."""
    rng = np.random.default_rng(5)
    schemas = [random_schema(rng) for _ in range(60)]

    def ask(number):
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schemas[number]}}
        body = dict(messages=talk("the cat"), seed=number, max_tokens=120, response_format=wanted)
        status, made, _ = server.request(CHAT, body | {"logit_bias": bias})
        assert status == 200, made
        return made["choices"][0]

    with ThreadPoolExecutor(8) as pool:
        choices = list(pool.map(ask, range(60)))
    for schema, choice in zip(schemas, choices, strict=True):
        if choice["finish_reason"] == "stop":
            text = choice["message"]["content"]
            assert satisfies(json.loads(text), schema), (schema, text)
    assert sum(c["finish_reason"] == "stop" for c in choices) > 50
    again = [ask(number) for number in range(0, 60, 12)]  # alone
    assert again == choices[::12]


@pytest.mark.parametrize("name", ["stay", "go", None])
def test_forced_calls(server, bias, name):
    """Whole and streamed, alone and beside a request without a grammar."""
    choice = {"type": "function", "function": {"name": name}} if name else "required"
    body = dict(
        messages=talk("the cat"), tools=[GO, STAY], tool_choice=choice, seed=3, max_tokens=200
    )
    body["logit_bias"] = bias
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(
            server.request, CHAT, dict(messages=talk("the cat"), max_tokens=40, seed=1)
        )
        status, made, _ = server.request(CHAT, body)
        assert other.result()[0] == 200
    assert status == 200, made
    (answer,) = made["choices"]
    (call,) = answer["message"]["tool_calls"]
    assert (answer["finish_reason"], answer["message"]["content"]) == ("tool_calls", None)
    assert call["function"]["name"] == (name or call["function"]["name"])
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "stay":
        assert arguments in ({"for": 1}, {"for": 2})
    else:
        assert list(arguments) == ["to"]
    events = server.events(CHAT, body | {"stream": True})
    deltas = [e["choices"][0]["delta"] for e in events if e]
    streamed = [c for d in deltas for c in d.get("tool_calls", [])]
    assert [c["function"] for c in streamed] == [call["function"]]
    assert not any(d.get("content") for d in deltas)


def test_control_tokens_that_are_shown(server, llm):
    """Their names are text, as the parser of calls needs them."""
    bos = llm.tokenizer.bos_id
    sampling = Sampling(logit_bias=((bos, 100.0),))
    for shown, text in (((bos,), "<s><s><s>"), ((), "")):
        answer = submit(server.engine, [5, 6, 7], 3, sampling=sampling, show_ids=shown).wait()
        assert (answer.ids, answer.text) == ([bos] * 3, text)
