"""The webhook of a watch: MinIO, SeaweedFS and EventBridge post their event notifications here. 200 only once the
ledger has what a body told; else the sender has to come again, and the next listing makes up for those that do not."""

from __future__ import annotations

import hmac
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from jobs.errors import CutfleetError, SettingsError
from producer.ingest.notifications import BadEvent, arrivals_of
from producer.ingest.watcher import Watcher

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as exc:
    raise SettingsError("To listen for webhooks: pip install 'cutfleet[api]'.") from exc

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 4_000_000
"""SeaweedFS names every piece of a file: this is one of some 5 GB."""
RETRY_AFTER_S = 5


@contextmanager
def listening(watcher: Watcher, host: str, port: int, *, token: str) -> Iterator[None]:
    """Serves in a thread of its own until the block ends; senders can connect from its start, so that a listing within
    it misses nothing that they could not tell. `token`: what senders must show (`Authorization: Bearer`). Raises
    `SettingsError` `cannot_listen`."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        line = socket.create_server((host, port), family=family)
    except OSError as exc:
        raise SettingsError(f"It can't listen at {host}:{port}: {exc}", code="cannot_listen") from exc
    server = uvicorn.Server(
        uvicorn.Config(_app(watcher, token), log_config=None, access_log=False, lifespan="off", workers=1)
    )
    thread = threading.Thread(target=lambda: server.run([line]), name="receiver")
    thread.start()
    try:
        log.info("listening", extra={"action": "watch", "host": host, "port": port})
        yield
    finally:
        server.should_exit = True
        thread.join()
        line.close()


def _app(watcher: Watcher, token: str) -> Starlette:
    async def events(request: Request) -> Response:
        shown = request.headers.get("authorization", "").encode("latin-1")  # the bytes that came
        if not hmac.compare_digest(shown, f"Bearer {token}".encode()):
            return _answer(401, "unauthorized", "Send the token of CUTFLEET_WATCH_TOKEN: Authorization: Bearer TOKEN.")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                return _answer(413, "body_too_large", f"A notification has at most {MAX_BODY_BYTES:,} bytes.")
        try:
            taken = await run_in_threadpool(lambda: watcher.take(arrivals_of(bytes(body))))
        except BadEvent as exc:
            log.warning("refused: %s", exc, extra={"action": "watch", "code": exc.code})
            return _answer(400, exc.code, str(exc))
        except CutfleetError as exc:
            log.error("sent back: %s", exc, extra={"action": "watch", "code": exc.code})
            return _answer(503, exc.code, "Come again.", {"Retry-After": str(RETRY_AFTER_S)})
        return JSONResponse({"taken": taken})

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[Route("/events", events, methods=["POST"]), Route("/healthz", health, methods=["GET", "HEAD"])]
    )


def _answer(status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(
        {"status": status, "code": code, "detail": detail},
        status,
        headers,
        media_type="application/problem+json",
    )
