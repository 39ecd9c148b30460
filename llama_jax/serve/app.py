"""The ASGI application: routes, access, errors, the page."""

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from llama_jax.serve import chat_api, completions_api, responses_api, tokens_api
from llama_jax.serve.access import Access
from llama_jax.serve.endpoint import Endpoint, send_json
from llama_jax.serve.errors import APIError, to_json
from llama_jax.serve.responses_body import ResponsesBody
from llama_jax.serve.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from llama_jax.serve.state import State

_PAGE = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
PAGE_FILES = {f"/{p.name}": p for p in sorted(_PAGE.glob("*")) if p.suffix in _TYPES}
"""The page's files, by path; read once."""
_PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
OPEN_PATHS = {"/health", "/", *PAGE_FILES}
"""Need no API key."""
logger = logging.getLogger("llama_jax.serve")


class App:
    """The application.

    Args:
      state: of the server.
      access: who may ask.
    """

    def __init__(self, state: State, access: Access):
        self._access = access
        post = lambda path, schema, handler: Route(
            path, Endpoint(state, schema, handler), methods=["POST"]
        )
        get = lambda path, function: Route(path, _asynchronous(function), methods=["GET"])
        self._router = Router(
            [
                post("/v1/chat/completions", ChatBody, chat_api.create),
                post("/v1/completions", CompletionBody, completions_api.create),
                post("/v1/responses", ResponsesBody, responses_api.create),
                post("/tokenize", TokenizeBody, tokens_api.tokenize),
                post("/detokenize", DetokenizeBody, tokens_api.detokenize),
                get("/v1/models", lambda _: _json(tokens_api.models(state))),
                get("/v1/models/{name:path}", lambda request: _json(
                    tokens_api.model(state, request.path_params["name"])
                )),
                get("/health", lambda _: _health(state)),
                get("/metrics", lambda _: Response(
                    state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
                )),
                *(get(path, file) for path, file in _page().items()),
            ],
            redirect_slashes=False,
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started = False

        async def tracked(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._access.check(scope)
            scope["app"] = self  # with it, the router raises for unknown paths and methods
            await self._router(scope, receive, tracked)
            return
        except APIError as e:
            error = e
        except HTTPException as e:
            error = _unknown(scope, e)
        except Exception:
            logger.exception("%s %r", scope["method"], scope["path"])
            error = APIError("the server has a defect; its log says more", status=500)
        if started:
            raise RuntimeError("the answer had begun") from error
        await send_json(send, to_json(error.body()), error.status, error.headers())


def _unknown(scope: Scope, e: HTTPException) -> APIError:
    what = f"{scope['method']} {scope['path']!r:.200}"
    if e.status_code == 405:
        allowed = (e.headers or {}).get("Allow", "")
        return APIError(f"{what}: the method must be {allowed}", status=405, code="wrong_method")
    return APIError(f"{what} does not exist", status=e.status_code, code="not_found")


def _health(state: State) -> Response:
    problem = state.problem()
    status = {"status": "ok"} if problem is None else {"status": problem}
    return _json(status, 200 if problem is None else 503)


def _json(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")


def _page() -> dict[str, Callable[[Request], Response]]:
    def file(path: Path) -> Callable[[Request], Response]:
        content, kind = path.read_bytes(), f"{_TYPES[path.suffix]}; charset=utf-8"
        return lambda _: Response(content, headers=_PAGE_HEADERS | {"content-type": kind})

    files = {path: file(p) for path, p in PAGE_FILES.items()}
    return {**files, **({"/": files["/index.html"]} if "/index.html" in files else {})}


def _asynchronous(
    function: Callable[[Request], Response],
) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        return function(request)

    return respond
