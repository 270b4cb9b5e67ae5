"""A TCP proxy that causes network faults: it forwards bytes, and listens on 127.0.0.1."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Coroutine
from typing import Any, Self

from producer.demo.local_stack import free_port

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of zero: closing the socket sends a reset."""


class Wire:
    """Forwards bytes to `port` of this machine. Faults begin and end while connections are open. With `tls`, clients
    connect with TLS."""

    def __init__(self, port: int, *, tls: ssl.SSLContext | None = None) -> None:
        self.delay_s = 0.0
        """Delay of every chunk in both directions."""
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
        """Reset every open connection; return how many."""
        return int(self._do(self._cut()))

    def refuse(self) -> None:
        """Stop listening, and reset every open connection."""
        self._do(self._refuse())

    def allow(self) -> None:
        """Listen again."""
        self._do(self._listen())

    def swallow(self) -> None:
        """Make connections half-open, as when a cable is pulled: no byte is forwarded, and neither side sees an end.
        Connections that are open now, or opened before `heal`, stay half-open."""
        self._silent = True
        self._do(self._leave_half_open())

    def heal(self) -> None:
        """Forward the bytes of connections that are opened from now on."""
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
            server_reader, server = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            _reset(writer)
            return
        pair = {writer, server}
        (self._dead.extend if self._silent else self._open.update)(pair)
        with contextlib.suppress(OSError, asyncio.CancelledError, ssl.SSLError):
            await asyncio.gather(self._pump(reader, server), self._pump(server_reader, writer))
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
    with contextlib.suppress(AttributeError):  # a closed TLS transport has no socket
        _disable_linger(writer)
    writer.transport.abort()


def _disable_linger(writer: asyncio.StreamWriter) -> None:
    found = writer.get_extra_info("socket")
    if found is not None:
        with contextlib.suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
