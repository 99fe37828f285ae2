"""An HTTP proxy in front of an S3 server that spoils requests: what networks, load balancers and busy stores do."""

from __future__ import annotations

import http.client
import itertools
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Fault(Enum):
    ERROR = "an answer 500, and nothing was done"
    SLOW_DOWN = "an answer 503 SlowDown, and nothing was done"
    CUT_BEFORE = "the connection ends, and nothing was done"
    CUT_AFTER = "it was done, and the connection ends before the answer"
    ERROR_AFTER = "it was done, and the answer is 500"
    REPEATED = "it was done twice, and the answer is the second one's"
    SHORT = "the answer ends in the middle"
    SILENT = "it was done, and no answer comes, ever"
    LESS = "the answer claims to be whole, and is shorter than what was asked for"


Plan = Callable[[int, str, str], Fault | None]
"""`(number of the request, method, path)` → what happens to it."""


def every_other(fault: Fault) -> Plan:
    return lambda number, _method, _path: None if number % 2 else fault


def first(method: str, fault: Fault, *, times: int = 1, path: str = "") -> Plan:
    """The first requests of a method whose path, query included, has `path` in it."""
    count = itertools.count()

    def plan(_number: int, asked: str, where: str) -> Fault | None:
        return fault if asked == method and path in where and next(count) < times else None

    return plan


def always(fault: Fault, method: str = "") -> Plan:
    return lambda _number, asked, _path: fault if method in ("", asked) else None


class Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.plan: Plan = lambda _number, _method, _path: None
        self.log: list[tuple[str, str, Fault | None]] = []
        """What was asked, and what became of it."""
        self._count = itertools.count()
        self._lock = threading.Lock()

    def decide(self, method: str, path: str) -> Fault | None:
        with self._lock:
            fault = self.plan(next(self._count), method, path)
            self.log.append((method, path, fault))
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no news."""


@contextmanager
def proxy_to(port: int) -> Iterator[Proxy]:
    with Proxy(port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Proxy

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.decide(self.command, self.path)
        if fault is Fault.CUT_BEFORE:
            self.close_connection = True
        elif fault is Fault.ERROR:
            self._refuse(500, "InternalError")
        elif fault is Fault.SLOW_DOWN:
            self._refuse(503, "SlowDown")
        else:
            self._pass_on(body, fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _relay

    def _pass_on(self, body: bytes, fault: Fault | None) -> None:
        status, headers, data = self._ask(body)
        if fault is Fault.REPEATED:
            status, headers, data = self._ask(body)
        if fault is Fault.CUT_AFTER:
            self.close_connection = True
        elif fault is Fault.ERROR_AFTER:
            self._refuse(500, "InternalError")
        elif fault is Fault.SILENT:
            select.select([self.connection], [], [], 60)  # until the other side has lost its patience
            self.close_connection = True
        elif fault is Fault.LESS:
            self._answer(status, headers, data[: len(data) // 2])
        else:
            self._answer(status, headers, data, keep=len(data) // 2 if fault is Fault.SHORT and data else None)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for key, value in self.headers.items():
                upstream.putheader(key, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, keep: int | None = None) -> None:
        self.send_response_only(status)
        for key, value in headers:
            if key.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(key, value)
        known = next((value for key, value in headers if key.lower() == "content-length"), str(len(data)))
        self.send_header("Content-Length", known if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        self.wfile.write(data if keep is None else data[:keep])
        if keep is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def _refuse(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
        data = b"" if self.command == "HEAD" else text.encode()
        self._answer(status, [("Content-Type", "application/xml")], data)
