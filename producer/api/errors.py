"""Error responses of the HTTP API: `{"status", "code", "detail"}` with our stable codes, 503 with `Retry-After` while
Redis or S3 is unavailable. Also limits the size of bodies."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.errors import (
    CutfleetError,
    ImageError,
    JobClosed,
    JobError,
    ServiceUnavailable,
    SettingsError,
    TransientError,
)
from producer.api.auth import Forbidden, Unauthorized
from producer.api.models import Problem
from producer.api.service import KeyReused, RateLimited

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 2_000_000
"""1,000 quoted keys of 1,024 bytes, and room for the other fields."""
_CODES = {404: "not_found", 405: "method_not_allowed"}
"""Of errors that the framework raises; for any other status, `unreadable`."""


_STATUSES: Mapping[type[CutfleetError], int] = {
    Unauthorized: 401,
    Forbidden: 403,
    JobError: 404,
    JobClosed: 409,
    KeyReused: 409,
    SettingsError: 422,
    ImageError: 422,
    RateLimited: 429,
    ServiceUnavailable: 503,
    TransientError: 503,
}
"""The most specific class of an error decides. An error of none of these is a bug, and becomes 500."""
_DETAILS = {404: "There is no such request.", 503: "Redis or S3 is unavailable: try again later."}
"""Sent instead of the error's own text."""
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}
_DESCRIPTIONS = {
    400: "The request can't be read.",
    401: "The API key is missing or unknown.",
    403: "The key is not permitted for this prefix.",
    404: "There is no such request.",
    409: "The request conflicts with an earlier one, or is completed.",
    413: f"The body has more than {MAX_BODY_BYTES} bytes.",
    422: "Validation error; see `code`.",
    429: "The key has used up its calls of this minute; see `Retry-After`.",
    503: "Redis or S3 is unavailable; see `Retry-After`.",
}

Responses = dict[int | str, dict[str, Any]]


def responses(*statuses: int) -> Responses:
    """Describe error responses for OpenAPI."""
    return {status: {"model": Problem, "description": _DESCRIPTIONS[status]} for status in statuses}


COMMON = responses(400, 401, 403, 422, 429, 503)
LINKS: Responses = {
    202: {
        "links": {
            operation: {"operationId": operation, "parameters": {"request_id": "$response.body#/request_id"}}
            for operation in ("status", "results", "cancel")
        }
    }
}
"""Operations on a request that was accepted."""


def add_to(app: FastAPI) -> None:
    for error in _STATUSES:
        app.add_exception_handler(error, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_middleware(_BodyLimit)


def _answer_error(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, CutfleetError)  # noqa: S101  (for the type: registered for no other)
    status = next(_STATUSES[error] for error in type(exc).__mro__ if error in _STATUSES)
    headers = {"Retry-After": str(exc.wait_s)} if isinstance(exc, RateLimited) else _HEADERS.get(status)
    if status >= 500:
        log.error("refused: %s", exc, extra={"action": "api", "code": exc.code})
    return _problem(status, exc.code, _DETAILS.get(status, str(exc)), headers)


def _answer_invalid(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)  # noqa: S101  (for the type)
    problems = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in exc.errors())
    return _problem(422, "invalid", problems)


def _answer_http_error(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)  # noqa: S101  (for the type)
    return _problem(exc.status_code, _CODES.get(exc.status_code, "unreadable"), str(exc.detail), exc.headers)


def _problem(status: int, code: str, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"status": status, "code": code, "detail": detail}, status, headers)


class _BodyLimit:
    """Reads a body of at most `MAX_BODY_BYTES` before the app runs; answers 413 to a larger one."""

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

        async def receive_whole() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, receive_whole, send)
