"""Errors of object stores as one line, without credentials."""

import contextlib
import errno
import re
from collections.abc import Iterator
from typing import Any


class StorageError(OSError):
    """A bucket cannot be read or written; one line that says why and what to do."""


LOGIN = re.compile(r"(?<=://)(?:[^/\s@:]+:\S+|[^/\s@]+)@")
"""user:password@ of a URL; the password may contain / and @."""
_MAX_MESSAGE = 10_000
_SECRETS = (
    (re.compile(r"\?[^\s'\"<>]+"), "?..."),  # signed URLs have their signature in the query
    (LOGIN, ""),
    (re.compile(r"(?i)\b(bearer|basic) [\w.~+/=-]+"), r"\1 ..."),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}"), "..."),
    (re.compile(r"\bya29\.[\w.-]+"), "..."),
    (
        re.compile(
            r"(?i)((?:token|secret|signature|credential|password|authorization|"
            r"access_?key)[\w-]*['\"]?\s*[:=]\s*['\"]?)[^\s'\",;&]+"
        ),
        r"\1...",
    ),
)


def redacted(text: str) -> str:
    """The beginning of a message of a library, without query strings, keys, tokens and signatures.

    A server can answer with a page of megabytes, in which the search would take minutes.
    """
    text = text[:_MAX_MESSAGE]
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


_NO_CREDENTIALS = (
    "NoCredentials", "PartialCredentials", "CredentialRetrieval", "TokenRetrieval", "SSOToken",
    "DefaultCredentials", "RefreshError", "InvalidAccessKeyId", "SignatureDoesNotMatch",
    "InvalidToken", "ExpiredToken", "InvalidClientTokenId", "Unauthenticated", "UNAUTHENTICATED",
    "Anonymous caller", "Invalid Credentials", "LoginRefresh", "UnauthorizedSSO",
)  # fmt: skip
_NO_CONNECTION = (
    "EndpointConnection", "ConnectTimeout", "ReadTimeout", "ClientConnector", "ConnectionClosed",
    "ServerDisconnected", "TransportError", "gaierror", "ConnectionError", "ConnectionRefused",
    "TimeoutError", "NameResolution",
)  # fmt: skip
_LOGIN = {
    "s3": "environment variables, the files of `aws configure`, or the role of the machine",
    "gs": "`gcloud auth application-default login`, GOOGLE_APPLICATION_CREDENTIALS, or the "
    "service account of the machine",
}


def reason(error: BaseException, scheme: str) -> str:
    """Why an operation on a bucket failed, and what to do.

    Args:
      error: of fsspec, botocore, aiohttp, google.auth or TensorStore.
      scheme: "gs" or "s3".
    """
    names = " ".join(t.__name__ for t in type(error).__mro__)
    text = f"{names} {error}"
    code = getattr(error, "code", None) or getattr(error, "status", None)
    if any(sign in text for sign in _NO_CREDENTIALS) or code == 401:
        return f"no valid credentials; they are read from {_LOGIN[scheme]}"
    if any(sign in text for sign in ("NoSuchBucket", "specified bucket does not exist")):
        return "the bucket does not exist; create it, or correct the name"
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    denied = ("AccessDenied", "Forbidden", "PERMISSION_DENIED", "Permission denied")
    if isinstance(error, PermissionError) or code == 403 or any(s in text for s in denied):
        return (
            "permission denied; the account needs to list and read objects of this bucket, and to "
            "write and delete them where something is saved"
        )
    if any(sign in names for sign in _NO_CONNECTION):
        return "no connection to the object store; check network, proxy and endpoint"
    line = next(iter(redacted(str(error)).strip().splitlines()), "")[:200]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


@contextlib.contextmanager
def one_line(path: Any) -> Iterator[None]:
    """Turn errors of libraries in the block into a :class:`StorageError` about ``path``; objects
    that are missing stay a FileNotFoundError, and existing ones a FileExistsError."""
    try:
        yield
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "exists", str(path)) from None
    except StorageError:
        raise
    except Exception as e:
        text = reason(e, path.scheme)
        if isinstance(e, FileNotFoundError) and text == "does not exist":
            raise FileNotFoundError(errno.ENOENT, "does not exist", str(path)) from None
        raise StorageError(f"{path}: {text}") from None
