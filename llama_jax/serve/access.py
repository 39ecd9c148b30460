"""Who may ask: API keys, and protection against web pages of other sites."""

import hmac
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llama_jax.serve.errors import APIError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def read_keys(path: Path) -> list[str]:
    """The API keys of a file, one per line; lines that begin with # are comments.

    Raises:
      ValueError: there is none, or one that no header can hold.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; write one API key per line") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{path} holds no API key; write one per line")
    for number, key in enumerate(keys, 1):
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError(f"{path}: key {number} must be printable ASCII without spaces")
    return keys


class Access:
    """Checks of the headers of a request.

    Args:
      keys: one of these is needed, unless there is none.
      hosts: names of this server without the port; a request with another name in its header
        ``Host`` is refused, because a web page can make its own name point to this computer (DNS
        rebinding). Empty: any name.
      open_paths: need no key.
    """

    def __init__(self, keys: Collection[str], hosts: Collection[str], open_paths: Collection[str]):
        self._keys = [key.encode() for key in keys]
        self._hosts, self._open_paths = set(hosts), set(open_paths)

    def check(self, scope: Any) -> None:
        """Raise APIError unless the request is allowed."""
        values = lambda name: [v.decode("latin-1") for k, v in scope["headers"] if k == name]
        hosts, origins = values(b"host"), values(b"origin")
        if self._hosts and (len(hosts) != 1 or _name(hosts[0]) not in self._hosts):
            raise APIError(
                f"the header Host is {', '.join(hosts)!r:.100}; this server answers to "
                f"{', '.join(sorted(self._hosts))} only", status=403, code="host_not_allowed",
            )  # fmt: skip
        # Not urlsplit, which raises for some origins.
        sites = [origin.lower().partition("://")[2] for origin in origins]
        if any(site not in map(str.lower, hosts) for site in sites):
            raise APIError(
                f"the header Origin is {', '.join(origins)!r:.100}: web pages of other sites may "
                "not use this server", status=403, code="origin_not_allowed",
            )  # fmt: skip
        if self._keys and scope["path"] not in self._open_paths:
            self._check_key(values(b"authorization"))

    def _check_key(self, headers: list[str]) -> None:
        scheme, _, given = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
        data = given.strip().encode("latin-1")
        # All keys are compared, each in constant time.
        found = [hmac.compare_digest(data, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(found):
            raise APIError(
                "a valid API key is needed: Authorization: Bearer KEY",
                status=401, code="invalid_api_key",
            )  # fmt: skip


def _name(host: str) -> str:
    """The name in a header ``Host``, without its port."""
    name, colon, port = host.rpartition(":")
    return name.lower() if colon and port.isdecimal() and name else host.lower()
