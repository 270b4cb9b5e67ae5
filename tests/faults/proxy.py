"""Proxies between the system and its servers, for faults of the network: `Wire` knows bytes, `S3Proxy` knows requests.

Both listen on 127.0.0.1. What the client signed, the Host header among it, reaches the store as it was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import random
import re
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from producer.demo.local_stack import ACCESS_KEY, SECRET_KEY, free_port

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of no time: closing sends a reset."""


class Wire:
    """Passes bytes on to `port` of this machine. Its faults begin and end while connections are open.

    With `tls` it is what clients see of a server that speaks TLS.
    """

    def __init__(self, port: int, *, tls: ssl.SSLContext | None = None) -> None:
        self.delay_s = 0.0
        """Of every chunk, either way."""
        self.port = free_port()
        self._to = port
        self._tls = tls
        self._silent = False
        self._open: set[asyncio.StreamWriter] = set()
        self._dead: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.allow()
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def cut(self) -> int:
        """Resets every open connection; returns how many."""
        return self._do(self._cut())

    def refuse(self) -> None:
        """Nobody listens any more, and what was open is reset."""
        self._do(self._refuse())

    def allow(self) -> None:
        self._do(self._listen())

    def swallow(self) -> None:
        """Half-open, as when a cable is pulled: nothing is passed on, and neither side hears of an end. What is open
        stays so for good; what is opened before `heal` does too."""
        self._silent = True
        self._do(self._leave_half_open())

    def heal(self) -> None:
        """New connections work."""
        self._silent = False

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._tls)

    async def _cut(self) -> int:
        cut = {*self._open, *self._dead}
        for writer in cut:
            _reset(writer)
        self._open.clear()
        self._dead.clear()
        return len(cut) // 2

    async def _refuse(self) -> None:
        self._server.close()
        await self._cut()

    async def _leave_half_open(self) -> None:
        self._dead += self._open
        self._open.clear()

    async def _stop(self) -> None:
        await self._refuse()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            onward_reader, onward = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            _reset(writer)
            return
        pair = {writer, onward}
        (self._dead.extend if self._silent else self._open.update)(pair)
        with contextlib.suppress(OSError, asyncio.CancelledError, ssl.SSLError):
            await asyncio.gather(self._pump(reader, onward), self._pump(onward_reader, writer))
        if pair <= self._open:
            self._open -= pair
            for one in pair:
                one.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65_536):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if sink in self._open:
                sink.write(data)
                await sink.drain()
        if sink in self._open:
            sink.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(AttributeError):  # a TLS transport that is closed has forgotten its socket
        _linger_not(writer)
    writer.transport.abort()


def _linger_not(writer: asyncio.StreamWriter) -> None:
    found = writer.get_extra_info("socket")
    if found is not None:
        with contextlib.suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong with a request whose path starts with one of `paths` (as sent: /BUCKET/KEY) and whose method is
    among `methods`: `share` of them, `times` at most.

    answer: `status` and `code` in the store's place. hang: no answer until the fault is over. reset: the connection, in
    place of an answer. half: the answer, reset in the middle of its body. lose: the store does it, the answer is reset.
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
    """The request's headers but these, signed anew: a signature holds all of them."""
    kept = {name: value for name, value in headers.items() if name.lower() not in (*names, "authorization")}
    request = AWSRequest(method, f"http://{headers['Host']}{path}", headers=kept, data=body)
    S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", "us-east-1").add_auth(request)
    return dict(request.headers.items())


class S3Proxy:
    """In front of the S3 server at `port`. `caused` counts what it did, by kind, or by code for answers; `asked` the
    requests, by method and bucket, listings as LIST."""

    def __init__(self, port: int, *, seed: int = 0) -> None:
        self.to = port
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
        """What this request meets."""
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
        """A client that is gone, or a server that is: what these tests are about."""


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
            self._pass_on(body, kind, fault.forgets if fault else ())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""

    def _pass_on(self, body: bytes, kind: str, forgets: tuple[str, ...] = ()) -> None:
        onward = http.client.HTTPConnection("127.0.0.1", self.server.proxy.to)
        with contextlib.closing(onward):
            onward.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            headers = _without(forgets, self.command, self.path, self.headers, body) if forgets else self.headers
            for name, value in headers.items():
                if name.lower() != "expect":
                    onward.putheader(name, value)
            onward.endheaders(body)
            answer = onward.getresponse()
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
        text = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>a fault of the test</Message></Error>"
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
