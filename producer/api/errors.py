"""What the HTTP API answers when it can't do what is asked: `{"status", "code", "detail"}` with our stable codes, 503
with `Retry-After` while Redis or S3 is away. Nothing larger than `MAX_BODY_BYTES` is read.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.errors import CutfleetError, ImageError, JobError, ServiceUnavailable, SettingsError, TransientError
from producer.api import service as requests
from producer.api.auth import Forbidden

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 2_000_000
"""1,000 keys of 1,024 bytes each, quoted, and some more."""
RETRY_AFTER_S = 5


class Problem(BaseModel):
    """`code` never changes once released."""

    status: int
    code: str
    detail: str


class Unauthorized(CutfleetError):
    code = "unauthorized"


def _described(texts: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem, "description": text} for status, text in texts.items()}


PROBLEMS = _described(
    {
        400: "The request can't be read.",
        401: "No key, or none of ours.",
        403: "The key has no right to it.",
        422: "It makes no sense; the code says what.",
        429: "Too many requests of this key; `Retry-After` says when to come again.",
        503: "Redis or S3 is away; `Retry-After` says when to come again.",
    }
)
GONE = _described({404: "There is no such request."})
LINKS: dict[int | str, dict[str, Any]] = {
    202: {
        "links": {
            operation: {"operationId": operation, "parameters": {"request_id": "$response.body#/request_id"}}
            for operation in ("status", "results", "cancel")
        }
    }
}
"""What can be asked of a request that was taken."""
CONFLICT = _described({409: "It does not go with what was asked before."})
LARGE = _described({413: f"More than {MAX_BODY_BYTES} bytes."})


def add_to(app: FastAPI) -> None:
    app.add_exception_handler(CutfleetError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _plain)
    app.add_middleware(_Bounded)


def _ours(_: Request, exc: Exception) -> Response:
    if isinstance(exc, requests.TooMany):
        return _problem(429, exc.code, str(exc), {"Retry-After": str(exc.wait_s)})
    if isinstance(exc, (ServiceUnavailable, TransientError)):
        log.error("sent back: %s", exc, extra={"action": "api", "code": exc.code})
        return _problem(503, exc.code, "Redis or S3 is away: come again.", {"Retry-After": str(RETRY_AFTER_S)})
    if isinstance(exc, Unauthorized):
        return _problem(401, exc.code, str(exc), {"WWW-Authenticate": "Bearer"})
    if isinstance(exc, Forbidden):
        return _problem(403, exc.code, str(exc))
    if isinstance(exc, requests.Conflict) or (isinstance(exc, JobError) and exc.code == "job_closed"):
        return _problem(409, exc.code, str(exc))
    if isinstance(exc, JobError):
        return _problem(404, exc.code, "There is no such request.")
    if isinstance(exc, (SettingsError, ImageError)):
        return _problem(422, exc.code, str(exc))
    raise exc  # a bug


def _invalid(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)  # noqa: S101  (for the type: starlette hands over no other)
    wrong = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in exc.errors())
    return _problem(422, "invalid", wrong)


def _plain(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)  # noqa: S101  (as above)
    code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code, "unreadable")
    return _problem(exc.status_code, code, str(exc.detail), dict(exc.headers or {}))


def _problem(status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"status": status, "code": code, "detail": detail}, status, headers)


class _Bounded:
    """Reads a body, up to the limit, before anybody works on it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY_BYTES:
                answer = _problem(413, "body_too_large", f"A request has at most {MAX_BODY_BYTES:,} bytes.")
                await answer(scope, receive, send)
                return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, again, send)
