"""HTTP for the tests' Hub: requests and replies, the errors of the Hub, and faults between the two."""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Protocol
from urllib.parse import parse_qs, unquote

INVALID_TOKEN = "Invalid credentials in Authorization header"
What = int | Literal["drop", "drop_after", "fail_after", "hang", "truncate", "short", "corrupt"]


@dataclass
class Request:
    """One request; the token itself is not kept."""

    endpoint: str
    method: str
    path: str
    authorized: bool
    """Whether an Authorization header came."""
    status: int | None = None
    """What was answered; None if nothing was."""


@dataclass(eq=False)
class Fault:
    """What goes wrong at an endpoint; `HubServer.faults` loses it once it has happened `times` times.

    The first fault of the list that fits a request and has nothing left to `skip` happens; those before it count the
    request as skipped.
    """

    endpoint: str
    what: What
    """A status: that error, and nothing is done. `drop`: the connection is closed, nothing is done. `drop_after`,
    `fail_after`: it is done, and then the connection closed, or 500 answered. `hang`: nothing, until the client goes away
    or the server stops. Of the reply's body, `truncate` sends half and closes the connection, `short` half as if it were
    all, `corrupt` all with one byte changed."""
    times: int | None = 1
    """None: for ever."""
    skip: int = 0
    """So many requests are let through first."""
    path_contains: str = ""
    message: str | None = None
    """Text of the error; `{token}` in it becomes the token that the client sent."""
    code: str | None = None
    """X-Error-Code; by default what the Hub sends for a 404 there, `""` for none."""


@dataclass
class Reply:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """An error answer."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        line = " ".join(message.split())  # a header is one line
        self.reply = Reply(
            json.dumps({"error": message}).encode(), status, {"X-Error-Message": line, **(headers or {})}
        )
        if code:
            self.reply.headers["X-Error-Code"] = code


def json_reply(value: Any, status: int = 200) -> Reply:
    return Reply(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


def part_reply(content: bytes, headers: Mapping[str, str], wanted: str) -> Reply:
    """The part of `content` that a Range header names; all of it without one."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
    if match is None or match.groups() == ("", ""):
        return Reply(content, 200, dict(headers))
    first, last = match.groups()
    start = int(first) if first else max(0, len(content) - int(last))
    end = min(int(last) + 1 if first and last else len(content), len(content))
    if start >= end:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
    return Reply(content[start:end], 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})


@dataclass
class Call:
    """A request as the endpoints see it."""

    headers: Message
    body: bytes
    query: dict[str, list[str]]

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")


class Hub(Protocol):
    """What answers: see `hub_server.HubServer`."""

    requests: list[Request]
    faults: list[Fault]
    errors: list[str]
    stopping: threading.Event
    lock: threading.RLock
    hanging: set[Any]

    def route(self, method: str, path: str) -> tuple[str, Callable[[Call], Reply]]:
        """The endpoint's name, and what answers there."""
        ...


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: Hub, port: int) -> None:
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """A client may leave whenever it wants; anything else is a mistake in here."""
        if not isinstance(sys.exc_info()[1], OSError):
            self.hub.errors.append(traceback.format_exc())

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # the client was first
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave together: apart, the second waits 40 ms for the first to be acknowledged
    server: Listener  # pyright: ignore[reportIncompatibleVariableOverride]
    _request: Request

    def _handle(self) -> None:
        hub = self.server.hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        endpoint, function = hub.route(self.command, path)
        call = Call(self.headers, body, parse_qs(query))
        self._request = Request(endpoint, self.command, unquote(path), "Authorization" in self.headers)
        with hub.lock:
            hub.requests.append(self._request)
            fault = self._fault()
        what = None if fault is None else fault.what
        if what == "drop":
            return self._close()
        if what == "hang":
            return self._hang()
        reply = self._error(fault, call) if fault and isinstance(what, int) else self._answer(function, call)
        if what == "drop_after":
            return self._close()
        if fault and what == "fail_after":
            reply = self._error(fault, call)
        return self._send(reply, what)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _answer(self, function: Callable[[Call], Reply], call: Call) -> Reply:
        hub = self.server.hub
        with hub.lock:
            try:
                return function(call)
            except HubError as error:
                return error.reply
            except Exception:
                hub.errors.append(traceback.format_exc())
                return HubError(500, "the tests' Hub failed; see its `errors`").reply

    def _fault(self) -> Fault | None:
        faults = self.server.hub.faults
        for fault in list(faults):
            if fault.endpoint != self._request.endpoint or fault.path_contains not in self._request.path:
                continue
            if fault.skip:
                fault.skip -= 1
                continue
            if fault.times is not None:
                fault.times -= 1
                if not fault.times:
                    faults.remove(fault)
            return fault
        return None

    def _error(self, fault: Fault, call: Call) -> Reply:
        status = fault.what if isinstance(fault.what, int) else 500
        usual = {401: INVALID_TOKEN, 403: "Forbidden", 404: "Not found", 412: "A commit has happened since.",
                 429: "Too many requests", 503: "Service unavailable"}.get(status, "Internal error")  # fmt: skip
        message = usual if fault.message is None else fault.message.replace("{token}", call.token)
        code = fault.code
        if code is None:
            of_file = self._request.endpoint in ("head_file", "get_file")
            code = ("EntryNotFound" if of_file else "RepoNotFound") if status == 404 else ""
        return HubError(status, message, code, {"Retry-After": "0"} if status == 429 else {}).reply

    def _send(self, reply: Reply, what: What | None) -> None:
        body = reply.body
        if what == "corrupt" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if what == "short":
            body = body[: len(body) // 2]
        self._request.status = reply.status
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if what == "truncate" else body)
        if what == "truncate":
            self._close()

    def _close(self) -> None:
        self.close_connection = True

    def _hang(self) -> None:
        self._close()
        hub = self.server.hub
        hub.hanging.add(self.client_address)
        try:
            while not hub.stopping.is_set():
                readable, _, _ = select.select([self.connection], [], [], 0.05)
                if readable and not self.connection.recv(1, socket.MSG_PEEK):
                    return
        finally:
            hub.hanging.discard(self.client_address)

    def log_message(self, format: str, *args: object) -> None: ...
