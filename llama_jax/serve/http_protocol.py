"""uvicorn's HTTP/1.1 with limits: connections, the time of a request to arrive, and of a client to
read its answer."""

import asyncio
import resource
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama_jax.serve.errors import APIError, to_json

MAX_CONNECTIONS = 1024
TIMEOUT = 30.0
"""Seconds from the start of a connection or request to the end of the request; and without progress
of a client that reads an answer."""


def allow_connections() -> None:
    """Raise the limit on open files, which is often 1,024, above that on connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + 256
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if 0 <= soft < wanted:  # negative: no limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class LimitedProtocol(H11Protocol):
    """Closes connections beyond the limit, and those of slow clients."""

    _request: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # Each token is a small packet. asyncio does this only for sockets made with IPPROTO_TCP.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(APIError("too many connections", status=503, code="overloaded"))
        else:
            self._request = self.loop.call_later(TIMEOUT, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_request_timer()
        if self._reading is not None:
            self._reading.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._request is None and self.conn.their_state is h11.IDLE:
            self._request = self.loop.call_later(TIMEOUT, self._too_slow)
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        state = self.conn.their_state
        is_idle = state is h11.IDLE and not self.conn.trailing_data[0]
        is_between_requests = is_idle and self.cycle is not None
        if state not in (h11.IDLE, h11.SEND_BODY):
            self._cancel_request_timer()
        elif state is h11.SEND_BODY and self._request is None:
            # Its head came together with the request before, which has been answered now.
            self._request = self.loop.call_later(TIMEOUT, self._too_slow)
        elif is_between_requests and self._request is not None:
            # The rest of a body came after the answer, for example a refusal.
            self._cancel_request_timer()
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(TIMEOUT, self.transport.abort)

    def resume_writing(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(APIError("this is not a valid HTTP/1.1 request", code="invalid_http"))
        else:
            self.transport.close()

    def _cancel_request_timer(self) -> None:
        if self._request is not None:
            self._request.cancel()
            self._request = None

    def _too_slow(self) -> None:
        self._request = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._refuse(APIError("the request did not arrive in time", status=408, code="timeout"))
        else:
            self.transport.close()

    def _refuse(self, error: APIError) -> None:
        content = to_json(error.body())
        head = (
            f"HTTP/1.1 {error.status} \r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + content)
        self.transport.close()
