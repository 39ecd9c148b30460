"""Emulators of object stores on this machine, and the environment in which they are used."""

import contextlib
import functools
import logging
import os
import socket
import socketserver
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest


@functools.cache
def _servers() -> tuple[Any, Any, int]:
    """The servers of this process. They run until it ends, because fsspec and TensorStore remember
    their addresses."""
    moto_server = pytest.importorskip("moto.server")
    gcs_server = pytest.importorskip("gcp_storage_emulator.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    # A client that has what it needs closes its connection.
    socketserver.BaseServer.handle_error = lambda *_: None  # type: ignore[method-assign]
    s3 = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=_free_port(), verbose=False)
    s3.start()
    gcs_port = _free_port()
    gcs = gcs_server.create_server("127.0.0.1", gcs_port, in_memory=True, default_bucket="bucket")
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
