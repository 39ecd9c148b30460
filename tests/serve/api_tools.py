"""A server on a real socket in this process, and an engine that answers from a script."""

import asyncio
import contextlib
import http.client
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiktoken_tools

from llama_jax.data import tiktoken_text
from llama_jax.data.chat_template import ChatTemplate, load_template
from llama_jax.data.tokenizer import JsonTokenizer, Tokenizer
from llama_jax.serve.access import LOOPBACK, Access
from llama_jax.serve.answers import Mailbox
from llama_jax.serve.app import OPEN_PATHS
from llama_jax.serve.metrics import Metrics
from llama_jax.serve.models import ServedModel
from llama_jax.serve.request import (
    GenerationRequest,
    Status,
    Stopping,
    Token,
    Update,
)
from llama_jax.serve.server import Server
from llama_jax.serve.state import State

TALK = [{"role": "user", "content": "the cat"}]


HERMES = (
    "{% if tools %}<|im_start|>system\ncall with <tool_call></tool_call>: {{ tools | tojson }}"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} "
    "{{ c.function.arguments.to }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The template of a model that calls functions."""
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.id }}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
"""The template of a model that demands ids of 9 characters."""
GO = {
    "type": "function",
    "function": {
        "name": "go",
        "description": "walk",
        "parameters": {
            "type": "object",
            "properties": {"to": {"type": "string"}},
            "required": ["to"],
            "additionalProperties": False,
        },
    },
}


def called(to: str) -> str:
    """A call in an answer."""
    return f'<tool_call>\n{{"name": "go", "arguments": {{"to": "{to}"}}}}\n</tool_call>'


def chat_tokenizer(folder: Path) -> JsonTokenizer:
    """A small byte-level tokenizer with the control tokens of ChatML."""
    tree = tiktoken_text.to_json(tiktoken_tools.ranks(), newer=True)
    last = tree["added_tokens"][-1]
    names = ("<|im_start|>", "<|im_end|>")
    tree["added_tokens"] += [
        last | {"id": last["id"] + 1 + i, "content": name} for i, name in enumerate(names)
    ]
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(tree))
    return JsonTokenizer(path.read_text(), path)


def model(tokenizer: Tokenizer, name: str = "tiny", **changes: Any) -> ServedModel:
    """A model with the template ChatML."""
    template = ChatTemplate(load_template("chatml", None).source)
    ends = (tokenizer.controls["<|im_end|>"],)
    fields = dict(adapter="", vocab_size=tokenizer.vocab_size, eos_ids=ends, template=template)
    return ServedModel(name, tokenizer=tokenizer, **(fields | changes))


Script = Callable[[GenerationRequest], Iterator[Update | None]]


class FakeEngine:
    """Answers each request from a script, in a thread of its own; None is a pause of 1 ms."""

    context = 512

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.script: Script = self.says("fine thanks")
        self.requests: list[GenerationRequest] = []
        self.error: Exception | None = None
        self.live: set[int] = set()
        self.cancelled: set[int] = set()
        self.alive, self.age = True, 0.0
        self._numbers = itertools.count(1)

    def says(self, text: str, finish: str = "end", delay: int = 0) -> Script:
        """A script that answers with a text."""

        def script(request: GenerationRequest) -> Iterator[Update | None]:
            ids = self.tokenizer.encode(text)[: request.max_new_tokens]
            prompt: tuple[Token, ...] = ()
            if request.prompt_logprobs:
                prompt = tuple(self.token(request, i) for i in request.ids)
                prompt = (Token(prompt[0].id, None, {}), *prompt[1:])
            sent = ""
            for number, i in enumerate(ids):
                yield from itertools.repeat(None, delay)
                whole = self.tokenizer.decode(ids[: number + 1])
                new = "" if whole.endswith("\ufffd") else whole[len(sent) :]
                sent += new
                cached = 3 * (number == 0)
                end = finish if number == len(ids) - 1 else None
                token = self.token(request, i)
                yield Update(new, (token,), prompt if number == 0 else (), cached, end)
            if not ids:
                yield Update(prompt=prompt, finish="length")

        return script

    def token(self, request: GenerationRequest, i: int) -> Token:
        if not (request.logprobs or request.prompt_logprobs):
            return Token(i, None, {})
        top = {i: -0.25, (i + 1) % 200: -1.5, (i + 2) % 200: -2.5}
        return Token(i, -0.25, dict(list(top.items())[: request.top_logprobs]))

    @staticmethod
    def holds(request: GenerationRequest) -> Iterator[None]:
        """A script that never answers."""
        yield from itertools.repeat(None)

    def submit(self, request: GenerationRequest) -> int:
        if self.error is not None:
            raise self.error
        number = next(self._numbers)
        self.requests.append(request)
        self.live.add(number)
        threading.Thread(target=self._run, args=(number, request), daemon=True).start()
        return number

    def _run(self, number: int, request: GenerationRequest) -> None:
        for update in self.script(request):
            if number in self.cancelled:
                request.send(Update(finish="cancelled"))
                break
            if update is None:
                time.sleep(0.001)
            else:
                request.send(update)
        self.live.discard(number)

    def cancel(self, number: int) -> None:
        self.cancelled.add(number)

    def status(self) -> Status:
        return Status(True, self.alive, self.age, len(self.live), 0, 2, 1, 10)

    def drain(self, seconds: float) -> None:
        self.error = Stopping()
        end = time.monotonic() + seconds
        while self.live and time.monotonic() < end:
            time.sleep(0.005)
        self.cancelled |= self.live
        while self.live:
            time.sleep(0.005)


class Running:
    """A server in a thread."""

    def __init__(self, engine: Any, models: list[ServedModel], **access: Any):
        self.engine, self._models = engine, models
        options = dict(keys=(), hosts=LOOPBACK, open_paths=OPEN_PATHS) | access
        self._access = Access(**options)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        models = {m.name: m for m in self._models}
        metrics = Metrics(self._models[0].name)
        metrics.watch(self.engine.status)
        self.state = State(self.engine, models, Mailbox(self.loop), metrics)
        self.server = Server(self.state, self._access, self._ready.set)
        await self.server.serve([self.socket])

    def __enter__(self) -> "Running":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended
            self.loop.call_soon_threadsafe(self.server.stop)
        self._thread.join(20)
        assert not self._thread.is_alive()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def request(
        self, path: str, body: Any = None, method: str | None = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON or text, and headers."""
        connection = self.connect()
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        method = method or ("GET" if body is None else "POST")
        connection.request(method, path, data, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        kind = answer.headers.get_content_type()
        content = json.loads(text) if kind == "application/json" else text.decode()
        return answer.status, content, {k.lower(): v for k, v in answer.headers.items()}

    def chat(self, **fields: Any) -> tuple[int, Any]:
        return self.request("/v1/chat/completions", {"messages": TALK} | fields)[:2]

    def events(self, path: str, body: Any) -> list[Any]:
        """The data of a stream's events."""
        status, text, headers = self.request(path, body)
        assert status == 200, text
        assert headers["content-type"] == "text/event-stream"
        lines = [line for line in text.split("\n\n") if line]
        data = [line.partition("data: ")[2] for line in lines]
        return [None if d == "[DONE]" else json.loads(d) for d in data]


def wait_until(condition: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)
