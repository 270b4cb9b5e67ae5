"""Error responses of the HTTP API: `{"status", "code", "detail"}` with our stable codes, 503 with `Retry-After` while
Redis or S3 is unavailable. Also limits the size of bodies.
"""

from __future__ import annotations

import dataclasses
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
RETRY_AFTER_S = 5
_NO_REQUEST = "There is no such request."
_AWAY = "Redis or S3 is unavailable: try again later."
_CODES = {404: "not_found", 405: "method_not_allowed"}
"""Of errors that the framework raises; for any other status, `unreadable`."""


@dataclasses.dataclass(frozen=True)
class _Answer:
    """`detail` empty: the error's own text."""

    status: int
    detail: str = ""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


_ANSWERS: Mapping[type[CutfleetError], _Answer] = {
    Unauthorized: _Answer(401, headers={"WWW-Authenticate": "Bearer"}),
    Forbidden: _Answer(403),
    JobError: _Answer(404, detail=_NO_REQUEST),
    JobClosed: _Answer(409),
    KeyReused: _Answer(409),
    SettingsError: _Answer(422),
    ImageError: _Answer(422),
    RateLimited: _Answer(429),
    ServiceUnavailable: _Answer(503, detail=_AWAY, headers={"Retry-After": str(RETRY_AFTER_S)}),
    TransientError: _Answer(503, detail=_AWAY, headers={"Retry-After": str(RETRY_AFTER_S)}),
}
"""The most specific class of an error decides. An error of none of these is a bug, and becomes 500."""

Responses = dict[int | str, dict[str, Any]]


def _responses(descriptions: Mapping[int, str]) -> Responses:
    return {status: {"model": Problem, "description": text} for status, text in descriptions.items()}


PROBLEMS = _responses(
    {
        400: "The request can't be read.",
        401: "The API key is missing or unknown.",
        403: "The key is not permitted for this prefix.",
        422: "Validation error; see `code`.",
        429: "The key has used up its calls of this minute; see `Retry-After`.",
        503: "Redis or S3 is unavailable; see `Retry-After`.",
    }
)
NO_REQUEST = _responses({404: _NO_REQUEST})
CONFLICT = _responses({409: "The request conflicts with an earlier one, or is completed."})
TOO_LARGE = _responses({413: f"The body has more than {MAX_BODY_BYTES} bytes."})
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
    for error in _ANSWERS:
        app.add_exception_handler(error, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_middleware(_BodyLimit)


def _answer_error(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, CutfleetError)  # noqa: S101  (for the type: registered for no other)
    answer = next(_ANSWERS[error] for error in type(exc).__mro__ if error in _ANSWERS)
    headers = dict(answer.headers)
    if isinstance(exc, RateLimited):
        headers["Retry-After"] = str(exc.wait_s)
    if answer.status >= 500:
        log.error("refused: %s", exc, extra={"action": "api", "code": exc.code})
    return _problem(answer.status, exc.code, answer.detail or str(exc), headers)


def _answer_invalid(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)  # noqa: S101  (for the type)
    problems = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in exc.errors())
    return _problem(422, "invalid", problems)


def _answer_http_error(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)  # noqa: S101  (for the type)
    code = _CODES.get(exc.status_code, "unreadable")
    return _problem(exc.status_code, code, str(exc.detail), dict(exc.headers or {}))


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
