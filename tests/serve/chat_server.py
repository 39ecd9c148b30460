"""A server with scripted answers, for the tests of the chat page and of the load script.

The last message of a conversation decides what happens: see :func:`Handler.answer`.
"""

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).parents[2] / "llama_jax/serve/page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ANSWERS = {
    "markdown": "# Lists\n\nSome **bold**, *italic* and `code`, a [link](https://example.org/a).\n\n"
    "1. one\n2. two\n   - inner\n\n```python\nprint('<b>')\n```\n\n> quoted\n",
    "attack": "<img src=x onerror=\"document.title='hacked'\"> "
    "<script>document.title='hacked'</script> [click](javascript:alert(1)) [data](data:text/html,x) ![image](https://example.org/x.png)"
    " [fine](https://example.org/?a=<b>)\n\n```<script>\nalert(1)\n```",
}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """Answers one request; ``server`` has the state."""

    protocol_version = "HTTP/1.1"
    server: "ChatServer"

    def log_message(self, *args) -> None:
        """Nothing."""

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client left
            super().handle()

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            if self.allowed():
                self.send({"data": [{"id": name} for name in self.server.models]})
            return
        file = PAGE / (self.path.strip("/") or "index.html")
        self.send_response(200)
        self.send_header("Content-Type", f"{TYPES[file.suffix]}; charset=utf-8")
        self.send_header("Content-Security-Policy", POLICY)
        data = file.read_bytes()
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        self.server.requests.append(body)
        chat = "messages" in body
        last = body["messages"][-1]["content"] if chat else body["prompt"]
        last = last.rpartition("\n\n")[2]
        if last == "busy" and self.server.refusals:
            self.server.refusals -= 1
            self.fail(429, "8 requests are waiting", "queue_full", {"Retry-After": "1"})
        elif last == "full":
            self.fail(400, "5000 tokens, the context is 4096", "context_length_exceeded")
        elif body.get("model", "base") not in self.server.models:
            self.fail(404, "there is no such model", "model_not_found")
        else:
            self.stream(body, last, chat)

    def allowed(self) -> bool:
        key = self.server.key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return True
        self.fail(401, "a valid API key is needed", "invalid_api_key")
        return False

    def send(self, value, status: int = 200, headers=()) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in dict(headers).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def fail(self, status: int, message: str, code: str, headers=()) -> None:
        self.send({"error": {"message": message, "code": code}}, status, headers)

    def answer(self, body, last: str) -> Iterator[str]:
        """The tokens of the answer."""
        if last in ANSWERS:
            text = ANSWERS[last]
        elif last == "long":
            text = "word " * 1000
        else:
            text = f"{body['model']} with seed {body.get('seed')} says {last}"
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 10**6
        words = [word + " " for word in text.split(" ")]
        if body.get("ignore_eos"):
            words = ["word "] * limit
        yield from words[:limit]

    def stream(self, body, last: str, chat: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        time.sleep(self.server.first_delay)
        count = 0
        try:
            for count, token in enumerate(self.answer(body, last), 1):
                if count > 1:
                    time.sleep(self.server.delay if last != "long" else 0.02)
                if last == "broken" and count == 3:
                    return
                if last == "failing" and count == 3:
                    self.event({"error": {"message": "out of luck", "code": "x"}})
                    return
                choice = {"index": 0, "finish_reason": None}
                choice |= {"delta": {"content": token}} if chat else {"text": token}
                if body.get("logprobs"):
                    choice["logprobs"] = {"content": [logprob(token)]}
                self.event({"choices": [choice]})
        except ConnectionError:
            self.server.left.append(count)
            return
        prompt = 105 if not chat else len(str(body["messages"]).split())
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": count,
            "total_tokens": prompt + count,
        }
        usage["prompt_tokens_details"] = {"cached_tokens": 2}
        end = {"index": 0, "finish_reason": "stop"} | ({"delta": {}} if chat else {"text": ""})
        self.event({"choices": [end]})
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, value) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()


def logprob(token: str) -> dict:
    """Probability 0.6 for each token, and two alternatives."""
    entry = lambda text, p: {"token": text, "logprob": math.log(p), "bytes": list(text.encode())}
    return entry(token, 0.6) | {"top_logprobs": [entry(token, 0.6), entry("other", 0.3)]}


class ChatServer(ThreadingHTTPServer):
    """Listens on a free port of loopback."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models = ["base"]
        self.key: str | None = None
        self.requests: list[dict] = []
        self.left: list[int] = []
        """tokens that were sent before a client left"""
        self.refusals = 0
        self.first_delay = self.delay = 0.0
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def chat_server() -> Iterator[ChatServer]:
    """A running server."""
    server = ChatServer()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
