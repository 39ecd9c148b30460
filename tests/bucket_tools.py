"""Emulators of object stores on this machine, and the environment in which they are used."""

import contextlib
import functools
import importlib
import logging
import os
import socket
import socketserver
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# What the servers answer instead of the emulators, which check no permissions.
_DENIED_S3 = (
    "<?xml version='1.0' encoding='UTF-8'?><Error><Code>AccessDenied</Code><Message>User: "
    "arn:aws:iam::123456789012:user/ann is not authorized</Message><RequestId>1</RequestId></Error>"
)
_DENIED_GCS = (
    '{"error": {"code": 403, "message": "ann@example.com does not have storage.objects access to '
    'the Google Cloud Storage bucket. Permission denied on resource (or it may not exist).", '
    '"errors": [{"message": "denied", "domain": "global", "reason": "forbidden"}]}}'
)
_MISSING_S3 = (
    "<Error><Code>NoSuchBucket</Code><Message>The specified bucket does not exist</Message></Error>"
)
_MISSING_GCS = (
    '{"error": {"code": 404, "message": "The specified bucket does not exist.", "errors": '
    '[{"message": "The specified bucket does not exist.", "reason": "notFound"}]}}'
)
_refusal: tuple[int, Callable[[str, str], bool]] | None = None


@contextlib.contextmanager
def refused(code: int, which: Callable[[str, str], bool] = lambda *_: True) -> Iterator[None]:
    """Answer some requests of this process or its children with an error.

    Args:
      code: 403, no permission; 404, the bucket does not exist.
      which: of the method and the path of a request, whether it is answered so.
    """
    global _refusal
    _refusal = code, which
    try:
        yield
    finally:
        _refusal = None


def writes(method: str, path: str) -> bool:
    """Whether a request changes a bucket."""
    return method not in ("GET", "HEAD")


def _code(method: str, path: str) -> int | None:
    return _refusal[0] if _refusal and _refusal[1](method, path) else None


def _refuse_s3(app: Callable) -> Callable:
    def answer(environ: dict[str, Any], start_response: Callable) -> Any:
        code = _code(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if not code:
            return app(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status = {403: "403 Forbidden", 404: "404 Not Found"}[code]
        start_response(status, [("Content-Type", "application/xml")])
        return [(_DENIED_S3 if code == 403 else _MISSING_S3).encode()]

    return answer


def _refuse_gcs(handle: Callable) -> Callable:
    def answer(self: Any, method: str) -> None:
        handler = self._request_handler
        if not (code := _code(method, handler.path)):
            return handle(self, method)
        handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        content = (_DENIED_GCS if code == 403 else _MISSING_GCS).encode()
        handler.send_response(code)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


@functools.cache
def _servers() -> tuple[Any, Any, int]:
    """The servers of this process. They run until it ends, because fsspec and TensorStore remember
    their addresses."""
    moto_server = pytest.importorskip("moto.server")
    gcs_server = pytest.importorskip("gcp_storage_emulator.server")
    threaded = importlib.import_module("moto.moto_server.threaded_moto_server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    # A client that has what it needs closes its connection.
    socketserver.BaseServer.handle_error = lambda *_: None  # type: ignore[method-assign]
    application = threaded.DomainDispatcherApplication
    threaded.DomainDispatcherApplication = lambda *args: _refuse_s3(application(*args))
    gcs_server.Router.handle = _refuse_gcs(gcs_server.Router.handle)
    s3 = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=_free_port(), verbose=False)
    s3.start()
    gcs_port = _free_port()
    gcs = gcs_server.create_server("127.0.0.1", gcs_port, in_memory=True, default_bucket="bucket")
    gcs._api.daemon = True  # or pytest would wait for it at its end
    gcs.start()
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    return s3, gcs, gcs_port


@contextlib.contextmanager
def emulated_buckets() -> Iterator[dict[str, str]]:
    """Servers for S3 (moto) and Google Cloud Storage with an empty bucket ``bucket`` each; yields
    the environment variables for this process and its children, which are set here."""
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # it asks what the emulator lacks
    pytest.importorskip("gcsfs")
    pytest.importorskip("s3fs")
    s3, gcs, gcs_port = _servers()
    environment = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*s3.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "AKIATESTTESTTEST",
        "AWS_SECRET_ACCESS_KEY": "a-secret-key",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{gcs_port}",
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{gcs_port}",
        "FSSPEC_GCS_TOKEN": "anon",
        "NO_GCE_CHECK": "true",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "a-secret-token",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    from llama_jax.storage.paths import filesystem

    filesystem.cache_clear()
    gcs.wipe(keep_buckets=True)
    urllib.request.urlopen(f"{environment['AWS_ENDPOINT_URL']}/moto-api/reset", data=b"").close()
    filesystem("s3").invalidate_cache()
    filesystem("s3").mkdir("bucket")
    try:
        yield environment
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        filesystem.cache_clear()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
