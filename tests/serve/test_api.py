"""The HTTP side with an engine that answers from a script: endpoints, errors, limits, shutdown."""

import contextlib
import http.client
import json
import random
import resource
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra serve")

from api_tools import (
    GO,
    HERMES,
    MISTRAL,
    TALK,
    FakeEngine,
    Running,
    called,
    chat_tokenizer,
    model,
    wait_until,
)

from llama_jax.data.chat_template import ChatTemplate
from llama_jax.data.template_process import Process
from llama_jax.data.tokenizer import JsonTokenizer
from llama_jax.serve import endpoint, http_protocol
from llama_jax.serve.app import PAGE_FILES
from llama_jax.serve.grammar import GrammarFactory
from llama_jax.serve.request import QueueFull, Stopping, Update


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def shared(tokenizer):
    engine = FakeEngine(tokenizer)
    inner = "{% for i in range(99999) %}{% endfor %}"
    source = f"{{% for i in range(99999) %}}{inner}{{% endfor %}}"
    loops = ChatTemplate(source, "the template that loops")
    models = [
        model(tokenizer),
        model(tokenizer, "poet", adapter="poet"),
        model(tokenizer, "base", template=None, no_template="this is a base model"),
        model(tokenizer, "loops", template=loops),
        model(tokenizer, "caller", template=ChatTemplate(HERMES)),
        model(tokenizer, "mistral", template=ChatTemplate(MISTRAL)),
    ]
    with Running(engine, models) as running:
        yield running


@pytest.fixture
def server(shared):
    engine = shared.engine
    engine.script, engine.error = engine.says("fine thanks"), None
    engine.alive, engine.age = True, 0.0
    engine.requests.clear()
    yield shared
    wait_until(lambda: not engine.live)


def test_chat(server, tokenizer):
    status, made = server.chat(seed=5, max_tokens=9)
    assert status == 200
    (choice,) = made["choices"]
    assert choice["message"] == {"role": "assistant", "content": "fine thanks", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert made["object"] == "chat.completion"
    assert (made["model"], made["seed"]) == ("tiny", 5)
    (request,) = server.engine.requests
    prompt = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    assert list(request.ids) == tokenizer.encode_marked(prompt)
    assert request.eos_ids == (tokenizer.controls["<|im_end|>"],)
    assert (request.max_new_tokens, request.sampling.seed) == (9, 5)
    assert request.sampling.sample.temperature == 1
    new = len(tokenizer.encode("fine thanks"))
    assert made["usage"] == {
        "prompt_tokens": len(request.ids), "completion_tokens": new,
        "total_tokens": len(request.ids) + new, "prompt_tokens_details": {"cached_tokens": 3},
    }  # fmt: skip


def test_all_settings_reach_the_engine(server):
    fields = dict(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.05, repetition_penalty=1.25,
        presence_penalty=-1, frequency_penalty=2, logit_bias={"3": -100, "7": 1.5}, seed=2**32 - 1,
        stop=["a", "b"], ignore_eos=True, logprobs=True, top_logprobs=4, model="poet", n=2,
        max_completion_tokens=11,
    )  # fmt: skip
    status, made = server.chat(**fields)
    assert status == 200, made
    first, second = server.engine.requests
    sampling = first.sampling
    sample = sampling.sample
    assert (sample.temperature, sample.top_p, sample.top_k, sample.min_p) == (0.5, 0.9, 7, 0.05)
    assert sample.repetition_penalty == 1.25
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1, 2)
    assert sampling.logit_bias == ((3, -100), (7, 1.5))
    assert (sampling.seed, sampling.index, second.sampling.index) == (2**32 - 1, 0, 1)
    assert (first.stops, first.eos_ids, first.model) == (("a", "b"), (), "poet")
    assert (first.logprobs, first.top_logprobs, first.max_new_tokens) == (True, 4, 11)
    assert not first.prompt_logprobs


def test_neutral_settings_have_no_effect(server):
    fields = dict(temperature=0, top_p=1, top_k=-1, min_p=0, repetition_penalty=1, stop=None)
    server.chat(**fields, logit_bias=None, user="me", metadata={"a": "b"}, store=True)
    sample = server.engine.requests[0].sampling.sample
    assert (sample.temperature, sample.top_p, sample.top_k) == (0, None, None)
    assert (sample.min_p, sample.repetition_penalty) == (None, None)
    assert server.engine.requests[0].max_new_tokens == 512 - len(server.engine.requests[0].ids)


def test_seeds_without_seed_differ_and_are_returned(server):
    seeds = {server.chat()[1]["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert seeds == {r.sampling.seed for r in server.engine.requests}


def test_chat_stream(server):
    body = {"messages": TALK, "stream": True, "stream_options": {"include_usage": True}, "n": 2}
    events = server.events("/v1/chat/completions", body)
    assert events[-1] is None
    *chunks, last = events[:-1]
    assert all(e["usage"] is None and e["object"] == "chat.completion.chunk" for e in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] > 2
    for index in range(2):
        mine = [c for e in chunks for c in e["choices"] if c["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in mine) == "fine thanks"
        assert [c["finish_reason"] for c in mine[-2:]] == [None, "stop"]
    assert len({e["id"] for e in chunks}) == 1


def test_line_ends_of_unicode_do_not_cut_events(server):
    text = "a\x85b\u2028c\u2029d"
    server.engine.script = server.engine.says(text)
    body = {"messages": TALK, "stream": True}
    lines = server.request("/v1/chat/completions", body)[1].splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    deltas = [e["choices"][0]["delta"].get("content") or "" for e in events]
    assert "".join(deltas) == text


def test_white_space_at_the_ends_is_left_out_as_in_llm_chat(server):
    server.engine.script = server.engine.says(" \n fine  thanks \n ")
    assert server.chat()[1]["choices"][0]["message"]["content"] == "fine  thanks"
    body = {"messages": TALK, "stream": True}
    chunks = server.events("/v1/chat/completions", body)[:-1]
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in chunks)
    assert text == "fine  thanks"
    made = server.request("/v1/completions", {"prompt": "a"})[1]
    assert made["choices"][0]["text"] == " \n fine  thanks \n "


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(server, tokenizer, stream):
    text = "fine 鶴 thanks"
    server.engine.script = server.engine.says(text)
    fields = dict(logprobs=True, top_logprobs=2)
    if stream:
        body = {"messages": TALK, "stream": True, **fields}
        choices = [e["choices"][0] for e in server.events("/v1/chat/completions", body)[:-1]]
        content = [t for c in choices if c["logprobs"] for t in c["logprobs"]["content"]]
    else:
        content = server.chat(**fields)[1]["choices"][0]["logprobs"]["content"]
    assert bytes(b for t in content for b in t["bytes"]) == text.encode()
    assert len(content) == len(tokenizer.encode(text))
    for entry in content:
        assert entry["logprob"] == -0.25
        first, second = entry["top_logprobs"]
        assert first == {k: entry[k] for k in ("token", "logprob", "bytes")}
        assert second["logprob"] == -1.5
    whole = [t for t in content if not t["token"].startswith("bytes:")]
    assert all(t["token"].encode() == bytes(t["bytes"]) for t in whole)
    assert len(whole) < len(content)


def test_completion(server, tokenizer):
    status, made, _ = server.request("/v1/completions", {"prompt": "the cat", "seed": 1})
    assert status == 200
    assert made["choices"] == [
        {"index": 0, "text": "fine thanks", "logprobs": None, "finish_reason": "stop"}
    ]
    (request,) = server.engine.requests
    assert list(request.ids) == tokenizer.encode("the cat", bos=True)
    assert request.max_new_tokens == 16


def test_prompts_of_every_kind(server, tokenizer):
    ids = tokenizer.encode("the cat")
    bos = [tokenizer.bos_id]
    for prompt, want in (
        ([ids], [ids]), (ids, [ids]), (["the cat", "a"], [bos + ids, bos + tokenizer.encode("a")]),
        ([ids, "the cat"], [ids, bos + ids]),
    ):  # fmt: skip
        server.engine.requests.clear()
        made = server.request("/v1/completions", {"prompt": prompt, "n": 2})[1]
        assert [c["index"] for c in made["choices"]] == list(range(2 * len(want)))
        sent = server.engine.requests
        assert [list(r.ids) for r in sent] == [w for w in want for _ in range(2)]
        assert [r.sampling.index for r in sent] == [0, 1] * len(want)
        usage = made["usage"]
        assert usage["prompt_tokens"] == sum(map(len, want))
        assert usage["prompt_tokens_details"]["cached_tokens"] == 3 * len(want)
    # Equal prompts have different samples, as in llm.generate.
    server.engine.requests.clear()
    server.request("/v1/completions", {"prompt": [ids, ids], "n": 2})
    assert [r.sampling.index for r in server.engine.requests] == [0, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(server, tokenizer, stream):
    prompt = tokenizer.encode("the cat sat", bos=True)
    server.engine.script = server.engine.says(" on")
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    if stream:
        parts = [e["choices"][0] for e in server.events("/v1/completions", body | {"stream": True})
                 if e]  # fmt: skip
    else:
        parts = server.request("/v1/completions", body)[1]["choices"]
    logprobs = {k: [x for p in parts for x in p["logprobs"][k]] for k in parts[0]["logprobs"]}
    assert len(logprobs["tokens"]) == len(prompt) + 1
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert set(logprobs["token_logprobs"][1:]) == {-0.25}
    assert all(top[t] == -0.25 for t, top in zip(
        logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True))  # fmt: skip
    text = "".join(p["text"] for p in parts)
    assert text.startswith("the cat sat")
    assert logprobs["text_offset"][0] == 0
    for token, offset in list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[1:]:
        assert text[offset:].startswith(token)
    (request,) = server.engine.requests
    assert request.prompt_logprobs
    assert request.eos_ids == ()  # so that there is always one more entry than the prompt has


def test_echo_without_new_tokens(server):
    body = {"prompt": "the cat", "echo": True, "logprobs": 0, "max_tokens": 0}
    status, made, _ = server.request("/v1/completions", body)
    assert status == 200, made
    assert made["choices"][0]["text"] == "the cat"
    assert made["usage"]["completion_tokens"] == 0
    tops = made["choices"][0]["logprobs"]["top_logprobs"]
    assert tops[0] is None
    assert all(len(top) == 1 for top in tops[1:])


def test_echo_alone(server):
    """The engine needs a reason for a request without new tokens."""
    body = {"prompt": "the cat", "echo": True, "max_tokens": 0}
    status, made, _ = server.request("/v1/completions", body)
    assert status == 200
    assert (made["choices"][0]["text"], made["choices"][0]["logprobs"]) == ("the cat", None)
    assert server.engine.requests[0].prompt_logprobs


def test_responses(server):
    body = {"input": "the cat", "instructions": "be brief", "max_output_tokens": 30}
    status, made, _ = server.request("/v1/responses", body)
    assert status == 200, made
    assert made["status"] == "completed"
    (item,) = made["output"]
    assert item["content"][0]["text"] == "fine thanks"
    assert made["usage"]["input_tokens"] == len(server.engine.requests[0].ids)
    text = server.engine.tokenizer.decode(server.engine.requests[0].ids)
    assert "be brief" in text
    events = server.events("/v1/responses", body | {"stream": True})
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    kinds = [e["type"].removeprefix("response.") for e in events]
    assert kinds[:4] == [
        "created", "in_progress", "output_item.added", "content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert "".join(e["delta"] for e in events if e["type"].endswith("delta")) == "fine thanks"
    server.engine.script = server.engine.says("fine", finish="length")
    made = server.request("/v1/responses", body)[1]
    assert (made["status"], made["incomplete_details"]) == (
        "incomplete", {"reason": "max_output_tokens"})  # fmt: skip


def test_models(server):
    made = server.request("/v1/models")[1]
    assert [m["id"] for m in made["data"]] == ["tiny", "poet", "base", "loops", "caller", "mistral"]
    assert made["data"][1]["parent"] == "tiny"
    assert made["data"][0]["max_model_len"] == 512


def test_tokenize_and_detokenize(server, tokenizer):
    made = server.request("/tokenize", {"prompt": "the cat", "return_token_strs": True})[1]
    ids = tokenizer.encode("the cat", bos=True)
    assert (made["count"], made["tokens"], made["max_model_len"]) == (len(ids), ids, 512)
    assert "".join(made["token_strs"][1:]) == "the cat"
    plain = server.request("/tokenize", {"prompt": "the cat", "add_special_tokens": False})[1]
    assert plain["tokens"] == ids[1:]
    chat = server.request("/tokenize", {"messages": TALK})[1]
    server.chat()
    assert chat["tokens"] == list(server.engine.requests[0].ids)
    assert server.request("/detokenize", {"tokens": ids})[1] == {"prompt": "the cat"}


def test_messages_of_every_kind(server):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "name": None, "parsed": {"a": 1}},
        {"role": "user", "content": "d", "name": "me", "type": "text"},  # lm-evaluation-harness
    ]
    assert server.chat(messages=messages)[0] == 200
    text = server.engine.tokenizer.decode(server.engine.requests[0].ids)
    assert "system\nbe brief" in text
    assert "user\na\nb" in text


def test_health_and_metrics(server):
    assert server.request("/health")[:2] == (200, {"status": "ok"})
    text = server.request("/metrics")[1]
    assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in text
    assert 'vllm:kv_cache_usage_perc{model_name="tiny"} 0.2' in text
    server.engine.alive = False
    assert server.request("/health")[0] == 503
    server.engine.alive, server.engine.age = True, 1e3
    status, made, _ = server.request("/health")
    assert status == 503
    assert "1000 s ago" in made["status"]


def test_metrics_of_requests():
    from llama_jax.serve.metrics import Metrics

    metrics = Metrics("m")
    metrics.admitted(0.1)
    metrics.first_token(0.2)
    metrics.next_token(0.01)
    metrics.finished("end", 10, 4, 3, 0.5)
    metrics.finished("length", 10, 0, 3, 0.5)
    metrics.finished("cancelled", 0, 0, 0, 0)
    text = metrics.text().decode()
    for line in (
        'vllm:prompt_tokens_total{model_name="m"} 20.0',
        'vllm:generation_tokens_total{model_name="m"} 6.0',
        'vllm:prefix_cache_hits_total{model_name="m"} 4.0',
        'vllm:request_success_total{finished_reason="stop",model_name="m"} 1.0',
        'vllm:request_success_total{finished_reason="abort",model_name="m"} 1.0',
        'vllm:time_to_first_token_seconds_count{model_name="m"} 1.0',
        'vllm:inter_token_latency_seconds_sum{model_name="m"} 0.01',
        'vllm:e2e_request_latency_seconds_count{model_name="m"} 3.0',
    ):
        assert line in text


CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
BAD = [
    # path, fields, status, param, part of the message
    (CHAT, {"temperature": "hot"}, 400, "temperature", "'hot'"),
    (CHAT, {"temperature": -1}, 400, "temperature", "-1"),
    (CHAT, {"temperature": True}, 400, "temperature", ""),
    (CHAT, {"temprature": 1}, 400, "temprature", "unknown field"),
    (CHAT, {"top_p": 0}, 400, "top_p", ""),
    (CHAT, {"seed": 2**32}, 400, "seed", "4294967296"),
    (CHAT, {"seed": 1.5}, 400, "seed", ""),
    (CHAT, {"n": 0}, 400, "n", ""),
    (CHAT, {"stop": ["a"] * 17}, 400, "stop", "16"),
    (CHAT, {"stop": [""]}, 400, "stop.0", ""),
    (CHAT, {"logit_bias": {"a": 1}}, 400, "logit_bias", "'a'"),
    (CHAT, {"logit_bias": {"999999": 1}}, 400, "logit_bias", "999999"),
    (CHAT, {"logit_bias": {"1": 101}}, 400, "logit_bias.1", "101"),
    (CHAT, {"logit_bias": {str(i): 1 for i in range(301)}}, 400, "logit_bias", "300"),
    (CHAT, {"top_logprobs": 3}, 400, "top_logprobs", "logprobs=true"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "20"),
    (CHAT, {"max_tokens": 0}, 400, "max_tokens", ""),
    (CHAT, {"max_tokens": 9999}, 400, "messages", "9999"),
    (CHAT, {"model": "other"}, 404, "model", "'other'"),
    (CHAT, {"model": "base"}, 400, "messages", "base model"),
    (CHAT, {"model": 3}, 400, "model", "3"),
    (CHAT, {"messages": []}, 400, "messages", ""),
    (CHAT, {"messages": None}, 400, "messages", "missing"),
    (CHAT, {"messages": "hello"}, 400, "messages", "'hello'"),
    (CHAT, {"messages": [{"role": "king", "content": ""}]}, 400, "messages.0.role", "'king'"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0", "content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
     "messages.0.content", "image_url"),
    (CHAT, {"messages": [{"role": "user", "content": "a " * 600}]}, 400, "messages", "512"),
    (CHAT, {"response_format": {"type": "json_schema"}}, 400, "response_format", "json_schema"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {
        "name": "a", "schema": {"type": "nonsense"}}}}, 400, "response_format", "nonsense"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {
        "name": "a", "schema": "object"}}}, 400, "response_format.json_schema.schema", "'object'"),
    (CHAT, {"guided_json": 5}, 400, "guided_json", "5"),
    (CHAT, {"guided_regex": "("}, 400, "guided_regex", ""),
    (CHAT, {"structured_outputs": {"grammar": "start: ]"}}, 400, "structured_outputs.grammar", ""),
    (CHAT, {"structured_outputs": {"json": "{"}}, 400, "structured_outputs.json", ""),
    (CHAT, {"guided_regex": "a", "ignore_eos": True}, 400, "ignore_eos", "guided_regex"),
    (CHAT, {"tools": [GO], "model": "loops"}, 400, "tools", "does not use tools"),
    (CHAT, {"tools": [GO]}, 400, "messages", "tools"),
    (CHAT, {"tools": [GO, GO], "model": "caller"}, 400, "tools", "same name"),
    (CHAT, {"tools": [{"type": "web_search"}]}, 400, "tools.0.type", "web_search"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400,
     "tools.0.function.name", "a b"),
    (CHAT, {"tool_choice": "required"}, 400, "tool_choice", "tools"),
    (CHAT, {"tool_choice": "maybe", "tools": [GO]}, 400, "tool_choice", "maybe"),
    (CHAT, {"tools": [GO], "model": "caller", "tool_choice": {"type": "function", "function": {
        "name": "stay"}}}, 400, "tool_choice", "stay"),
    (CHAT, {"tools": [GO], "model": "caller", "tool_choice": "required", "guided_regex": "a"}, 400,
     "guided_regex", "tool_choice"),
    (CHAT, {"guided_regex": "a", "guided_choice": ["a"]}, 400, "guided_choice", "one of them"),
    (COMPLETE, {"prompt": None}, 400, "prompt", "missing"),
    (COMPLETE, {"prompt": {"a": 1}}, 400, "prompt", ""),
    (COMPLETE, {"prompt": []}, 400, "prompt", ""),
    (COMPLETE, {"prompt": ["a", 5]}, 400, "prompt.1", "5"),
    (COMPLETE, {"prompt": [1, "a"]}, 400, "prompt", ""),
    (COMPLETE, {"prompt": [1, 10**6]}, 400, "prompt", "1000000"),
    (COMPLETE, {"prompt": [-1]}, 400, "prompt", "-1"),
    (COMPLETE, {"prompt": "a " * 600}, 400, "prompt", "512"),
    (COMPLETE, {"max_tokens": 0}, 400, "max_tokens", "echo"),
    (COMPLETE, {"best_of": 2}, 400, "best_of", "best_of"),
    (COMPLETE, {"suffix": "end"}, 400, "suffix", ""),
    (COMPLETE, {"prompt": ["a"] * 5, "n": 64}, 400, "n", "128"),
    ("/v1/responses", {"input": "a", "store": True}, 400, "store", "keeps no responses"),
    ("/v1/responses", {"input": "a", "previous_response_id": "x"}, 400, "previous_response_id",
     "keeps no responses"),
    ("/v1/responses", {"input": "a", "background": True}, 400, "background", "keeps"),
    ("/v1/responses", {"input": [{"type": "item_reference"}]}, 400, "input.0.type", ""),
    ("/v1/responses", {"input": [{"role": "king", "content": "a"}]}, 400, "input", "king"),
    ("/v1/responses", {"input": "a " * 600}, 400, "input", "input has"),
    ("/v1/responses", {"input": 5}, 400, "input", "input: "),
    ("/v1/responses", {"input": [{"content": "a"}]}, 400, "input", "the field 'role' of an item"),
    ("/v1/responses", {"input": "a", "model": "base"}, 400, "input", "base model"),
    ("/v1/responses", {"input": "a", "text": {"format": {
        "type": "json_schema", "name": "a", "schema": {"type": "nonsense"}}}}, 400, "text.format",
     "text.format: "),
    ("/v1/responses", {"input": "a", "tools": [{"type": "function", "name": "a b"}]}, 400,
     "tools.0.name", "tools.0.name: "),
    ("/tokenize", {}, 400, "prompt", "prompt or messages"),
    ("/detokenize", {"tokens": [10**6]}, 400, "tokens", "1000000"),
    ("/detokenize", {"tokens": ["a"]}, 400, "tokens.0", ""),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "status", "param", "words"), BAD)
def test_bad_fields(server, path, fields, status, param, words):
    body = {CHAT: {"messages": TALK}, COMPLETE: {"prompt": "a"}}.get(path, {}) | fields
    found, made, _ = server.request(path, body)
    assert found == status, made
    error = made["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert words in error["message"]
    assert not server.engine.requests


@pytest.mark.parametrize("stream", [False, True])
def test_both_lengths_of_a_prompt_that_is_too_long(server, stream):
    body = {"prompt": [5] * 506, "max_tokens": 7, "stream": stream}
    status, made, _ = server.request("/v1/completions", body)
    assert (status, made["error"]["code"]) == (400, "context_length_exceeded")
    for number in ("506", "7", "512"):
        assert number in made["error"]["message"]
    assert server.request("/v1/completions", body | {"max_tokens": 6})[0] == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
def test_a_conversation_that_leaves_no_space_for_an_answer(server, path):
    """The answer of a request without a length has the rest of the context, which may be empty."""
    name = "messages" if path == CHAT else "input"
    body = lambda words: {name: [{"role": "user", "content": "the" * words}]}
    status, made, _ = server.request("/tokenize", {"messages": body(1)[name]})
    assert status == 200
    words = 512 - made["count"] + 1
    status, made, _ = server.request(path, body(words - 1))
    assert (status, server.engine.requests[-1].max_new_tokens) == (200, 1), made
    for more in (0, 1):
        status, made, _ = server.request(path, body(words + more))
        assert (status, made["error"]["code"]) == (400, "context_length_exceeded")
        assert (made["error"]["param"], str(512 + more) in made["error"]["message"]) == (name, True)
    assert len(server.engine.requests) == 1


RAW = [
    b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": NaN}',
    b'{"prompt": "a", "temperature": Infinity}', b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"a":' * 5000,
    b'{"prompt": "a", "seed": ' + b"9" * 5000,
    b'{"prompt": "a"} trailing',
]  # fmt: skip


@pytest.mark.parametrize("raw", RAW, ids=lambda raw: repr(raw[:20]))
def test_bodies_that_are_not_json(server, raw):
    status, made, _ = server.request("/v1/completions", raw, method="POST")
    assert status == 400
    assert set(made["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in made["error"]["message"]


@pytest.mark.parametrize(("path", "fields", "param"), [
    (CHAT, {"messages": [{}] * 900_000}, "messages.0.role"),
    (CHAT, {"messages": TALK, **{f"a{i}": 1 for i in range(200_000)}}, None),
    (CHAT, {"messages": [{f"a{i}": 1 for i in range(200_000)}]}, "messages.0"),
    (COMPLETE, {"prompt": "a", "guided_choice": [1] * 900_000}, "guided_choice.0"),
    ("/v1/responses", {"input": [1] * 900_000}, "input"),
    (CHAT, {"messages": TALK, "logit_bias": {f"{i}": "a" for i in range(100_000)}}, "logit_bias"),
    (CHAT, {"messages": TALK * 20_000}, "messages"),
    ("/detokenize", {"tokens": [None] * 500_000}, "tokens.0"),
    ("/detokenize", {"tokens": [1] * 300_000}, "tokens"),
])  # fmt: skip
def test_only_the_first_of_many_errors_is_found(server, path, fields, param):
    """An error object for each of them would take seconds in which nothing else runs."""
    raw = json.dumps(fields).encode()
    start = time.process_time()  # the server is in this process
    status, made, _ = server.request(path, raw)
    assert time.process_time() - start < 1.5
    assert (status, made["error"]["param"]) == (400, param)


def test_a_huge_body_is_refused_before_it_is_read(server):
    for headers in (
        f"content-length: {endpoint.MAX_BODY + 1}\r\n\r\n",
        "content-length: 99999999999999999999999\r\n\r\n",
        "transfer-encoding: chunked\r\n\r\n" + "100000\r\n" + "x" * 0x100000 + "\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port), 10) as s:
            head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
            s.sendall((head + headers).encode())
            chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
            if "chunked" in headers:
                for _ in range(4):
                    s.sendall(chunk)
            answer = b""
            while b"}}" not in answer and (part := s.recv(1 << 16)):
                answer += part
        assert answer.startswith((b"HTTP/1.1 413", b"HTTP/1.1 400")), answer[:200]
        assert b'"error"' in answer


def test_unknown_paths_and_methods(server):
    for path, method, status in (
        ("/v1/nothing", "GET", 404), ("/v1/models/", "GET", 404), ("/v1/models", "POST", 405),
        ("/v1/chat/completions", "GET", 405), ("/%2e%2e/etc/passwd", "GET", 404),
        ("/../api_tools.py", "GET", 404), ("/page/index.html", "GET", 404),
        ("/v1/chat/completions", "OPTIONS", 405),
    ):  # fmt: skip
        found, made, headers = server.request(path, method=method)
        assert found == status, path
        assert made["error"]["message"]
        assert not any(name.startswith("access-control") for name in headers)


def test_not_http(server):
    with socket.create_connection(("127.0.0.1", server.port), 10) as s:
        s.sendall(b"GET \x00 /\r\n\r\n")
        answer = s.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"error"' in answer


def test_page(server):
    status, text, headers = server.request("/")
    assert status == 200
    assert text.startswith("<!doctype html>")
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'")
    assert "unsafe" not in policy
    for path in PAGE_FILES:
        status, _, headers = server.request(path)
        assert (status, headers["x-content-type-options"]) == (200, "nosniff")
    assert set(PAGE_FILES) >= {"/index.html", "/app.js", "/style.css"}


def test_host_and_origin(server):
    ask = lambda **headers: server.request("/v1/models", **headers)[0]
    assert ask(Host="evil.example") == 403
    assert ask(Host="evil.example:8000") == 403
    assert ask(Host="localhost:1") == ask(Host="[::1]") == ask(Host="LOCALHOST") == 200
    assert ask(Origin="https://evil.example") == ask(Origin="null") == 403
    assert ask(Origin=f"http://127.0.0.1:{server.port}") == 200
    assert ask(Origin="http://localhost:1", Host="localhost:2") == 403
    assert ask(Origin="http://[") == ask(Origin="http://") == ask(Origin="") == 403


def test_keys(tokenizer):
    keys = ["one-key", "another-key"]
    with Running(FakeEngine(tokenizer), [model(tokenizer)], keys=keys, hosts=()) as server:
        ask = lambda path, **headers: server.request(path, **headers)[0]
        assert ask("/health") == 200
        assert ask("/v1/models", Host="any.example") == ask("/metrics") == 401
        for key in keys:
            assert ask("/v1/models", Authorization=f"Bearer {key}") == 200
            assert ask("/v1/models", Authorization=f"bearer {key}") == 200
        for wrong in (
            "Bearer one-ke",
            "Bearer",
            "Basic one-key",
            "one-key",
            "Bearer one-key2",
            "é",
        ):
            assert ask("/v1/models", Authorization=wrong) == 401
        status, made, headers = server.request("/v1/chat/completions", {"messages": TALK})
        assert (status, made["error"]["code"]) == (401, "invalid_api_key")
        assert headers["www-authenticate"] == "Bearer"
        assert not server.engine.requests


@pytest.mark.parametrize("fields", [
    {"response_format": {"type": "json_object"}}, {"guided_choice": ["a", "b"]},
    {"guided_json": {"type": "string"}}, {"structured_outputs": {"regex": "a+"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
])  # fmt: skip
def test_each_answer_has_its_own_grammar(server, fields):
    assert server.chat(n=2, **fields)[0] == 200
    first, second = server.engine.requests
    assert None is not first.grammar is not second.grammar is not None
    body = {"prompt": ["a", "b"], **fields}
    assert server.request("/v1/completions", body)[0] == 200
    assert len({id(r.grammar) for r in server.engine.requests}) == 4
    assert server.chat(response_format={"type": "text"})[0] == 200
    assert server.engine.requests[-1].grammar is None


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_functions(server, stream, parallel):
    server.engine.script = server.engine.says(f"I go. {called('x')}\n{called('y')}")
    fields = dict(model="caller", tools=[GO], parallel_tool_calls=parallel, max_tokens=150)
    if stream:
        body = {"messages": TALK, "stream": True, **fields}
        parts = [e["choices"][0] for e in server.events(CHAT, body)[:-1]]
        content = "".join(p["delta"].get("content") or "" for p in parts)
        calls = [c for p in parts for c in p["delta"].get("tool_calls", [])]
        assert [c.pop("index") for c in calls] == list(range(len(calls)))
        reason = parts[-1]["finish_reason"]
    else:
        (choice,) = server.chat(**fields)[1]["choices"]
        content, reason = choice["message"]["content"], choice["finish_reason"]
        calls = choice["message"]["tool_calls"]
    assert (content, reason) == ("I go.", "tool_calls")
    made = [(c["type"], c["function"]["name"], c["function"]["arguments"]) for c in calls]
    both = [("function", "go", '{"to": "x"}'), ("function", "go", '{"to": "y"}')]
    assert made == (both if parallel else both[:1])
    assert len({c["id"] for c in calls}) == len(calls)
    (request,) = server.engine.requests
    prompt = server.engine.tokenizer.decode(request.ids)
    assert '"description": "walk"' in prompt
    assert request.grammar is None


def test_a_conversation_with_calls(server):
    call = {"id": "c1", "type": "function",
            "function": {"name": "go", "arguments": '{"to": "x"}'}}  # fmt: skip
    messages = [
        *TALK, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "there", "tool_call_id": "c1"},
    ]  # fmt: skip
    assert server.chat(model="caller", tools=[GO], messages=messages)[0] == 200
    items = [
        *TALK, {"type": "function_call", "call_id": "c1", "name": "go", "arguments": '{"to": "x"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "there"},
    ]  # fmt: skip
    tool = {"type": "function", **GO["function"]}
    body = dict(model="caller", tools=[tool], input=items)
    assert server.request("/v1/responses", body)[0] == 200
    first, second = server.engine.requests
    assert first.ids == second.ids
    prompt = server.engine.tokenizer.decode(first.ids)
    assert "assistant\n<tool_call>go x</tool_call>" in prompt
    assert "tool\nthere" in prompt


@pytest.mark.parametrize("fields", [{}, {"tools": [GO]}, {"tools": [GO], "tool_choice": "none"}])
def test_ids_of_earlier_calls_have_the_form_that_the_template_demands(server, fields):
    """Also if this request allows no calls, and where only the tokens are counted."""
    call = {"id": "call_0123456789", "function": {"name": "go", "arguments": "{}"}}
    messages = [
        *TALK, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "there", "tool_call_id": "call_0123456789"},
    ]  # fmt: skip
    status, made = server.chat(model="mistral", messages=messages, **fields)
    assert status == 200, made
    fields.pop("tool_choice", None)
    body = dict(model="mistral", messages=messages, **fields)
    assert server.request("/tokenize", body)[0] == 200


def test_a_choice_of_functions(server):
    chat = lambda **more: server.chat(model="caller", tools=[GO], **more)
    assert chat(tool_choice="none")[0] == chat(tool_choice="required")[0] == 200
    named = {"type": "function", "function": {"name": "go"}}
    assert chat(tool_choice=named, n=2)[0] == 200
    none, required, *both = server.engine.requests
    assert "walk" not in server.engine.tokenizer.decode(none.ids)
    assert none.grammar is None
    assert required.grammar is not None
    assert both[0].grammar is not both[1].grammar is not None
    server.engine.script = server.engine.says(called("x"))
    assert "tool_calls" not in chat(tool_choice="none")[1]["choices"][0]["message"]


def test_responses_with_calls(server):
    server.engine.script = server.engine.says("I go. " + called("x"))
    tool = {"type": "function", **GO["function"]}
    body = dict(model="caller", input="the cat", tools=[tool], max_output_tokens=150)
    text, call = server.request("/v1/responses", body)[1]["output"]
    assert text["content"][0]["text"] == "I go."
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "go", '{"to": "x"}')
    kinds = [e["type"] for e in server.events("/v1/responses", body | {"stream": True})]
    assert "response.function_call_arguments.done" in kinds
    assert kinds.count("response.output_item.done") == 2


def test_queue_full_and_stopping(server):
    server.engine.error = QueueFull(6.6)
    for stream in (False, True):
        body = {"messages": TALK, "stream": stream}
        status, made, headers = server.request("/v1/chat/completions", body)
        assert (status, headers["retry-after"]) == (429, "7")
        assert made["error"]["type"] == "rate_limit_error"
    server.engine.error = Stopping()
    assert server.chat()[0] == 503


def test_queue_full_after_some_answers_cancels_them(server):
    server.engine.script = server.engine.holds
    submit = server.engine.submit

    def second_is_refused(request):
        if request.sampling.index == 1:
            raise QueueFull(1)
        return submit(request)

    server.engine.submit = second_is_refused
    try:
        assert server.chat(n=2)[0] == 429
        wait_until(lambda: not server.engine.live)
    finally:
        del server.engine.submit


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("finish", "status", "text"),
    [("error", 500, "stuck"), ("cancelled", 503, "shutting down"), ("deadline", 408, "too long")],
)
def test_answers_that_the_engine_ends(server, stream, finish, status, text):
    def script(request):
        yield Update("fi")
        yield Update(finish=finish, error="the grammar is stuck" if finish == "error" else None)

    server.engine.script = script
    if stream:
        events = server.events("/v1/chat/completions", {"messages": TALK, "stream": True})
        made = events[-1]
    else:
        found, made = server.chat()
        assert found == status
    assert text in made["error"]["message"]


def test_a_disconnect_cancels_at_once(server):
    server.engine.script = lambda request: iter([Update("a"), *[None] * 10**6])
    for stream in (True, False):
        body = json.dumps({"messages": TALK, "stream": stream, "n": 3}).encode()
        connection = server.connect()
        connection.request("POST", "/v1/chat/completions", body)
        wait_until(lambda: len(server.engine.live) == 3)
        if stream:
            assert connection.getresponse().read1(100)
        connection.close()
        wait_until(lambda: not server.engine.live, 2)


def test_small_packets_are_sent_at_once(server):
    """Without TCP_NODELAY, the second packet of an answer waits 40 ms for a client's receipt."""
    connection = server.connect()
    start = time.monotonic()
    for _ in range(20):
        connection.request("GET", "/health")
        connection.getresponse().read()
    assert time.monotonic() - start < 20 * 0.03
    connection.close()


def test_half_a_body_and_a_disconnect(server):
    with socket.create_connection(("127.0.0.1", server.port), 10) as s:
        s.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{"
        )
    assert server.request("/health")[0] == 200


def test_slow_requests_and_slow_readers(tokenizer, monkeypatch):
    monkeypatch.setattr(http_protocol, "TIMEOUT", 0.3)
    engine = FakeEngine(tokenizer)
    long = Update("x" * 100_000)
    engine.script = lambda request: iter([*[long] * 300, *[None] * 10**6])
    with Running(engine, [model(tokenizer)]) as server:
        with socket.create_connection(("127.0.0.1", server.port), 10) as s:
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n")
            answer = s.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 408")
            assert s.recv(1) == b""
        with socket.create_connection(("127.0.0.1", server.port), 10) as s:
            # The second request came with the first, and its body never comes.
            s.sendall(
                b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n"
            )
            while s.recv(1 << 16):
                pass
        connection = server.connect()
        body = json.dumps({"messages": TALK, "stream": True}).encode()
        connection.request("POST", "/v1/chat/completions", body)
        wait_until(lambda: len(engine.live) == 1)
        wait_until(lambda: not engine.live, 8)  # it does not read
        connection.close()


def test_a_connection_is_used_again_after_an_early_answer(tokenizer, monkeypatch):
    """The rest of the body comes after it. The time limit of that request is over then."""
    monkeypatch.setattr(http_protocol, "TIMEOUT", 0.3)
    with Running(FakeEngine(tokenizer), [model(tokenizer)]) as server:
        server.server.config.timeout_keep_alive = 1
        connection = server.connect()
        connection.request("POST", "/nothing", b"x" * 2_000_000)
        assert connection.getresponse().read()
        time.sleep(0.5)
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b'{"status":"ok"}')
        connection.close()
        with socket.create_connection(("127.0.0.1", server.port), 10) as s:
            head = "POST /nothing HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2000000\r\n\r\n"
            s.sendall(head.encode() + b"x" * 2_000_000)
            while part := s.recv(1 << 16):  # until it is closed, because nothing more comes
                assert b"408" not in part


def test_connections_are_limited(tokenizer, monkeypatch):
    monkeypatch.setattr(http_protocol, "MAX_CONNECTIONS", 3)
    with Running(FakeEngine(tokenizer), [model(tokenizer)]) as server:
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        wait_until(lambda: len(server.server.server_state.connections) == 3)
        assert server.request("/health")[0] == 503
        for s in held:
            s.close()
        wait_until(lambda: not server.server.server_state.connections)
        assert server.request("/health")[0] == 200


def test_files_for_all_connections(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(http_protocol, "MAX_CONNECTIONS", 100)
    try:
        for before, after in ((300, 356), (400, 400)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))
            http_protocol.allow_connections()
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (after, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_client_that_falls_far_behind_is_cancelled(server):
    from llama_jax.serve import answers

    behind = answers.Answers(server.engine, answers.Mailbox(server.loop))
    server.engine.script = server.engine.holds
    behind._numbers = {0: -77}
    for _ in range(answers.MAX_PENDING + 1):
        behind.put(0, Update("a"))
    assert -77 in server.engine.cancelled
    assert len(behind._updates) == answers.MAX_PENDING + 1


def test_a_template_that_loops_does_not_stop_the_server(server):
    connection = server.connect()
    body = json.dumps({"messages": TALK, "model": "loops"}).encode()
    connection.request("POST", "/v1/chat/completions", body)
    time.sleep(0.1)
    start = time.monotonic()
    assert server.request("/v1/completions", {"prompt": "a"})[0] == 200
    assert time.monotonic() - start < 5  # half of what the template may take
    answer = connection.getresponse()
    made = json.loads(answer.read())
    assert answer.status == 400
    assert "too long" in made["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
def test_many_requests_at_once_are_read(server, monkeypatch, path):
    """The queue has space for them, so none is refused while the ones before it are read."""
    body = {CHAT: {"messages": TALK}, COMPLETE: {"prompt": "a"}}[path]
    held, encode = threading.Event(), server.engine.tokenizer.encode_array
    wait = lambda *args, **more: held.wait(20) and encode(*args, **more)
    monkeypatch.setattr(server.engine.tokenizer, "encode_array", wait)
    workers = server.state.renderers if path == CHAT else server.state.workers
    with ThreadPoolExecutor(200) as pool:
        found = [pool.submit(server.request, path, body) for _ in range(200)]
        try:
            wait_until(lambda: workers._waiting == 200)
        finally:
            held.set()
        assert {f.result()[0] for f in found} == {200}


LONG_TALK = [*TALK, {"role": "assistant", "content": "sat " * 200}] * 40
SLOW = [
    # path, fields of a request that is slow to read, and the function that takes long
    (CHAT, {"messages": LONG_TALK}, (Process, "ask")),
    (CHAT, {"messages": [TALK[0] | {"content": "a" * 70_000}]}, (Process, "ask")),
    ("/tokenize", {"messages": LONG_TALK}, (Process, "ask")),
    (COMPLETE, {"prompt": "a" * 70_000}, (JsonTokenizer, "encode_array")),
    ("/tokenize", {"prompt": "a" * 70_000}, (JsonTokenizer, "encode_array")),
    (CHAT, {"messages": TALK, "guided_regex": "a"}, (GrammarFactory, "lark")),
]


@pytest.mark.parametrize(("path", "fields", "function"), SLOW)
def test_short_requests_do_not_wait_for_long_ones(server, monkeypatch, path, fields, function):
    held, started, call = threading.Event(), threading.Semaphore(0), getattr(*function)
    is_long = lambda args: function[1] == "lark" or len(args[1]) > 30_000

    def waits(*args, **more):
        if is_long(args):
            started.release()
            # As in a rendering that takes long: its process answers nobody else.
            with args[0]._lock if function[0] is Process else contextlib.nullcontext():
                held.wait(20)
        return call(*args, **more)

    monkeypatch.setattr(*function, waits)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(server.request, path, fields) for _ in range(4)]
        try:
            assert started.acquire(timeout=10)
            for short, body in ((CHAT, {"messages": TALK}), (COMPLETE, {"prompt": "a"})):
                assert server.request(short, body)[0] == 200
            assert not any(f.done() for f in found)
        finally:
            held.set()
        assert all(f.result()[0] in (200, 400) for f in found)


def test_a_defect_is_an_error_without_a_traceback(server, monkeypatch, caplog):
    monkeypatch.setattr(server.state, "model", lambda name: 1 / 0)
    status, made = server.chat()
    assert status == 500
    assert "ZeroDivision" not in json.dumps(made)
    assert "ZeroDivisionError" in caplog.text


def value(rng: random.Random, depth: int = 0):
    """A random JSON value."""
    kind = rng.randrange(10 if depth < 4 else 7)
    if kind < 2:
        return rng.choice(["", "a", "\x00", "é漢\U0001f600", "user", "text", "the cat " * 9])
    if kind < 4:
        return rng.choice([0, 1, -1, 2**31, 2**63, 2**70, 7, -(2**40)])
    if kind < 7:
        return rng.choice([True, False, None, 0.5, -1.5, 1e300, 1e-300])
    if kind < 9:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(["type", "text", "role", "a"]): value(rng, depth + 1) for _ in range(3)}


def test_fuzz_of_bodies(server):
    from llama_jax.serve.responses_body import ResponsesBody
    from llama_jax.serve.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

    rng = random.Random(0)
    paths = {
        CHAT: (ChatBody, {"messages": TALK}), COMPLETE: (CompletionBody, {"prompt": "a"}),
        "/v1/responses": (ResponsesBody, {"input": "a"}), "/tokenize": (TokenizeBody, {}),
        "/detokenize": (DetokenizeBody, {}),
    }  # fmt: skip
    connection, counts = server.connect(), {}
    for _ in range(1000):
        path = rng.choice(list(paths))
        schema, body = paths[path]
        names = rng.sample(list(schema.model_fields), rng.choice([1, 1, 2]))
        body = body | {name: rng.choice([None, value(rng)]) for name in names}
        connection.request("POST", path, json.dumps(body).encode())
        answer = connection.getresponse()
        made = answer.read()
        assert answer.status < 500, (path, body, made)
        if answer.status >= 400:
            error = json.loads(made)["error"]
            assert set(error) == {"message", "type", "param", "code"}, body
            assert len(error["message"]) < 2000
        counts[answer.status] = counts.get(answer.status, 0) + 1
    assert counts[200] > 30
    assert counts[400] > 100
    connection.close()


def test_shutdown_finishes_streams_and_refuses_new_requests(tokenizer):
    engine = FakeEngine(tokenizer)
    engine.script = engine.says("fine thanks", delay=60)
    with Running(engine, [model(tokenizer)]) as server:
        connection = server.connect()
        body = json.dumps({"messages": TALK, "stream": True}).encode()
        connection.request("POST", "/v1/chat/completions", body)
        answer = connection.getresponse()
        assert answer.read1(50)
        server.loop.call_soon_threadsafe(server.server.stop)
        wait_until(lambda: server.state.is_draining)
        status, made = server.chat()
        assert (status, made["error"]["code"]) == (503, "stopping")
        assert server.request("/health")[0] == 503
        text = answer.read().decode()
    assert text.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"stop"' in text
    with pytest.raises((ConnectionError, http.client.HTTPException, OSError)):
        server.request("/health")
