"""Errors in the shape of OpenAI's API."""

import json
import re
from collections.abc import Collection
from typing import Any

from pydantic import ValidationError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class APIError(Exception):
    """An error that the client sees.

    Args:
      message: what is wrong, what was given, what to do.
      status: of HTTP.
      param: the field of the request, such as "messages.0.content".
      code: one word for programs.
      retry_after: seconds after which the client may try again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The answer to the client."""
        kind = _TYPES.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        error = dict(message=self.message, type=kind, param=self.param, code=self.code)
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Headers that belong to the error."""
        headers = {} if self.retry_after is None else {"retry-after": f"{self.retry_after:.0f}"}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def to_json(value: Any) -> bytes:
    """UTF-8 JSON; a number that JSON does not have becomes null."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="replace")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and value - value != 0 else value


def of_validation(error: ValidationError, fields: Collection[str] = ()) -> APIError:
    """The first error that pydantic found.

    Args:
      error: of the body.
      fields: of the body; an error about several of them is about the first that it names.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    name, *inner = first["loc"] or [""]
    if first["type"] != "extra_forbidden":  # of a value with several types, the type is no field
        inner = [x for x in inner if not re.fullmatch(r"str|bool|(dict|list)\[.*\]", str(x))]
    param = ".".join(map(str, (name, *inner)))[:200] or None
    if first["type"] == "extra_forbidden":
        return APIError(
            f"unknown field {param!r}: this server does not support it; leave it out",
            param=param, code="unknown_parameter",
        )  # fmt: skip
    if first["type"] == "missing":
        return APIError(f"the field {param!r} is missing", param=param, code="missing_parameter")
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "it must")
    if param is None:
        named = next((word for word in re.findall(r"\w+", message) if word in fields), None)
        return APIError(message, param=named, code="invalid_value")
    given = "" if isinstance(first["input"], dict | list) else f", not {first['input']!r:.60}"
    return APIError(f"{param}: {message}{given}", param=param, code="invalid_value")
