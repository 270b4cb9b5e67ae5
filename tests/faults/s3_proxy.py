"""A proxy of an S3 server that causes faults of requests. The store receives unchanged what the client signed, and the
Host header."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import random
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from producer.demo.local_stack import ACCESS_KEY, SECRET_KEY
from tests.faults.wire import RESET


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault of requests whose path starts with one of `paths` (as sent: /BUCKET/KEY) and whose method is one of
    `methods`. `share`: of these requests. `times`: at most.

    answer: the proxy answers `status` and `code`. hang: no answer until the fault ends. reset: the connection is reset
    before the store gets the request. half: the connection is reset in the middle of the answer's body. lose: the store
    handles the request, then the connection is reset. forget: the store gets the request without the headers `forgets`.
    """

    kind: Literal["answer", "hang", "reset", "half", "lose", "forget"]
    paths: tuple[str, ...] = ("/",)
    methods: tuple[str, ...] = ("GET", "HEAD", "PUT", "POST", "DELETE")
    status: int = 503
    code: str = "SlowDown"
    share: float = 1.0
    times: int | None = None
    forgets: tuple[str, ...] = ()


def _without(names: tuple[str, ...], method: str, path: str, headers: Any, body: bytes) -> dict[str, str]:
    """Return the request's headers except `names`, signed again: the signature covers every header."""
    kept = {name: value for name, value in headers.items() if name.lower() not in (*names, "authorization")}
    request = AWSRequest(method, f"http://{headers['Host']}{path}", headers=kept, data=body)
    S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", "us-east-1").add_auth(request)
    return dict(request.headers.items())


class S3Proxy:
    """A proxy of the S3 server at `port`. `caused`: number of faults by kind, or by code for answers. `asked`: number
    of requests by method and bucket; a listing counts as LIST."""

    def __init__(self, port: int, *, seed: int = 0) -> None:
        self.port = port
        self.caused: Counter[str] = Counter()
        self.asked: Counter[tuple[str, str]] = Counter()
        self._fault: Fault | None = None
        self._times = 0
        self._over = threading.Event()
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()

    @contextmanager
    def fault(self, fault: Fault) -> Iterator[None]:
        self._over = threading.Event()
        self._fault, self._times = fault, 0
        try:
            yield
        finally:
            self._fault = None
            self._over.set()

    def choose(self, method: str, path: str) -> Fault | None:
        """Count a request; return the fault that it gets."""
        with self._lock:
            self.asked["LIST" if "list-type=" in path else method, re.split("[/?]", path)[1]] += 1
            fault = self._fault
            if fault is None or method not in fault.methods or not path.startswith(fault.paths):
                return None
            if self._times == fault.times or self._chance.random() >= fault.share:
                return None
            self._times += 1
            self.caused[fault.code if fault.kind == "answer" else fault.kind] += 1
            return fault

    def wait_until_over(self) -> None:
        self._over.wait(600)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], proxy: S3Proxy) -> None:
        self.proxy = proxy
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client or a server that has disconnected: these tests cause it."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.proxy.choose(self.command, self.path)
        kind = fault.kind if fault else ""
        if fault and kind == "answer":
            self._answer(fault)
        elif kind == "hang":
            self.server.proxy.wait_until_over()
            self._reset()
        elif kind == "reset":
            self._reset()
        else:
            self._forward(body, kind, fault.forgets if fault else ())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def log_message(self, *_: object) -> None: ...

    def _forward(self, body: bytes, kind: str, forgets: tuple[str, ...] = ()) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.proxy.port)
        with contextlib.closing(connection):
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            headers = _without(forgets, self.command, self.path, self.headers, body) if forgets else self.headers
            for name, value in headers.items():
                if name.lower() != "expect":
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
        if kind == "lose":
            self._reset()
            return
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        if answer.status != 204 and length is not None:
            self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if kind == "half" else data)
        if kind == "half":
            self._reset()

    def _answer(self, fault: Fault) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>caused by the test</Message></Error>"
        data = b"" if self.command == "HEAD" else text.encode()
        self.send_response_only(fault.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _reset(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.connection.close()
