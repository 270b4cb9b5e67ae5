"""Webhook receiver of a watch: MinIO, SeaweedFS and EventBridge POST their event notifications here. The answer is 200
only once the ledger has the arrivals; else the sender must retry. For senders that do not, the next sweep finds the
objects."""

from __future__ import annotations

import hmac
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jobs.errors import CutfleetError, SettingsError
from producer.ingest.notifications import Arrival, BadNotification, parse_notification

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as exc:
    raise SettingsError("To receive webhooks: pip install 'cutfleet[api]'.") from exc

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 4_000_000
"""SeaweedFS lists every chunk of a file: enough for a file of some 5 GB."""
RETRY_AFTER_S = 5


@contextmanager
def receive_webhooks(take: Callable[[list[Arrival]], int], host: str, port: int, *, token: str) -> Iterator[None]:
    """Serve in a thread until the block ends. `take`: `Watcher.take`. Senders can connect before the block runs: a
    listing inside it misses nothing that was written before. `token`: bearer token required from senders. Raises
    `SettingsError` `cannot_listen`."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as exc:
        text = f"Can't listen at {host}:{port}: {exc}. Choose another --listen."
        raise SettingsError(text, code="cannot_listen") from exc
    config = uvicorn.Config(_app(take, token), log_config=None, access_log=False, lifespan="off", workers=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run([listener]), name="receiver")
    thread.start()
    try:
        log.info("listening", extra={"action": "watch", "host": host, "port": port})
        yield
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _app(take: Callable[[list[Arrival]], int], token: str) -> Starlette:
    async def events(request: Request) -> Response:
        authorization = request.headers.get("authorization", "").encode("latin-1")  # the bytes as sent
        if not hmac.compare_digest(authorization, f"Bearer {token}".encode()):
            return _problem(401, "unauthorized", "Send the token of CUTFLEET_WATCH_TOKEN: Authorization: Bearer TOKEN.")
        body = await _read_body(request)
        if body is None:
            return _problem(413, "body_too_large", f"A notification has at most {MAX_BODY_BYTES:,} bytes.")
        try:
            taken = await run_in_threadpool(lambda: take(parse_notification(body)))
        except BadNotification as exc:
            log.warning("refused: %s", exc, extra={"action": "watch", "code": exc.code})
            return _problem(400, exc.code, str(exc))
        except CutfleetError as exc:
            log.error("sender must retry: %s", exc, extra={"action": "watch", "code": exc.code})
            return _problem(503, exc.code, "Try again later.", {"Retry-After": str(RETRY_AFTER_S)})
        return JSONResponse({"taken": taken})

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[Route("/events", events, methods=["POST"]), Route("/healthz", health, methods=["GET", "HEAD"])]
    )


async def _read_body(request: Request) -> bytes | None:
    """Return None for a body above `MAX_BODY_BYTES`."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return None
    return bytes(body)


def _problem(status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(
        {"status": status, "code": code, "detail": detail}, status, headers, media_type="application/problem+json"
    )
